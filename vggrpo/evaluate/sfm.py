"""Structure from motion on a whole video, by pycolmap alone: does one solid world explain all of its frames?

    registered        share of the frames that the largest model holds
    reprojection      mean reprojection error (pixels); it falls when points are given up, so read it with track_length
    track_length      mean number of frames that a point is seen in
    focal_deviation   |log of the focal length found over the one expected|: a drifting world is absorbed by it
    path_jerk         `path.path_jerk` of the cameras found

COLMAP's SIFT finds some thirty keypoints in a frame of 64 pixels and registers nothing; enlarged to `LEAST_SIDE`, it
registers most frames of three clips in five, at seconds a video (launch/LOG.md). So smaller frames are N/A unless asked
for. Where less than `REGISTERED` of the frames find a place, all but `registered` are N/A.
"""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vggrpo.evaluate.path import path_jerk
from vggrpo.evaluate.value import NA, Value

LEAST_SIDE = 256
"""Of the longer side; smaller frames are refused, or enlarged to it."""
REGISTERED, POINTS = 0.8, 30
"""Least share of frames and number of points of a model that may speak for the video."""
LARGEST_ERROR = 4.0
"""Pixels that COLMAP forgives a point; a mean beyond it is a model that has fallen apart."""
VAGUE = 0.15
"""Relative standard deviation of the focal length from which on the path does not tell it (a truck's never does)."""
START_FOV = 62.0
"""Degrees across the image that the search for the focal length starts from where none is expected."""
NAMES = ("registered", "reprojection", "track_length", "focal_deviation", "path_jerk")


@dataclass(frozen=True)
class Reconstruction:
    """The largest model of a video of T frames."""

    registered: float
    """Share of the frames."""
    num_points: int
    reprojection: float
    """Pixels."""
    track_length: float
    focal: float
    """Pixels."""
    focal_doubt: float
    """Its relative standard deviation; infinite where it cannot be told."""
    c2w: Float[Tensor, "T 4 4"] | None
    """In units of its own; None unless every frame is registered."""
    median_depth: float
    """In the same units."""


def sfm(
    frames: Sequence[np.ndarray], fov: float | None = None, seed: int = 0, *, enlarge: bool = False
) -> dict[str, Value]:
    """`NAMES` of frames [H W 3], RGB uint8; lengths are pixels of the frames as given.

    `fov`: the expected field of view, degrees across the image. `enlarge`: try frames below `LEAST_SIDE`, too.
    """
    height, width = frames[0].shape[:2]
    zoom = LEAST_SIDE / max(height, width)
    if zoom > 1 and not enlarge:
        return _none(f"frames of {height} x {width}: structure from motion needs {LEAST_SIDE} pixels")
    if zoom > 1:
        height, width = round(zoom * height), round(zoom * width)
        frames = [cv2.resize(frame, (width, height), interpolation=cv2.INTER_CUBIC) for frame in frames]
    found = reconstruct(frames, START_FOV if fov is None else fov, seed)
    if found is None:
        return {**_none("nothing could be reconstructed"), "sfm/registered": Value(0.0)}
    told = {"sfm/registered": Value(found.registered)}
    if not found.reprojection <= LARGEST_ERROR:
        return {**_none("the model is degenerate: its points project nowhere near where they were seen"), **told}
    if found.registered < REGISTERED or found.num_points < POINTS:
        placed = f"{found.registered:.0%} of the frames and {found.num_points} points registered"
        return {**_none(placed), **told}
    told["sfm/reprojection"] = Value(found.reprojection / max(zoom, 1.0))
    told["sfm/track_length"] = Value(found.track_length)
    if fov is None:
        told["sfm/focal_deviation"] = Value(NA, "no field of view is expected")
    elif not found.focal_doubt <= VAGUE:
        told["sfm/focal_deviation"] = Value(NA, f"the path tells the focal length to {found.focal_doubt:.0%} only")
    else:
        expected = focal_of(fov, width)
        told["sfm/focal_deviation"] = Value(abs(math.log(found.focal / expected)))
    if found.c2w is None:
        told["sfm/path_jerk"] = Value(NA, f"{found.registered:.0%} of the frames registered, and a path has them all")
    else:
        told["sfm/path_jerk"] = path_jerk(found.c2w, found.median_depth)
    return told


def focal_of(fov: float, width: int) -> float:
    """Focal length (pixels) of a field of view (degrees across the image)."""
    return width / 2 / math.tan(math.radians(fov) / 2)


def reconstruct(frames: Sequence[np.ndarray], fov: float, seed: int = 0) -> Reconstruction | None:
    """Incremental mapping with one shared focal length, refined from that of `fov`; None if no two frames fit.

    One thread, seeded.
    """
    import pycolmap

    height, width = frames[0].shape[:2]
    before, pycolmap.logging.minloglevel = pycolmap.logging.minloglevel, pycolmap.logging.Level.FATAL.value
    pycolmap.set_random_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        images, database = Path(folder) / "images", Path(folder) / "database.db"
        images.mkdir()
        for number, frame in enumerate(frames):
            cv2.imwrite(str(images / f"{number:05d}.png"), frame[..., ::-1])
        reader = pycolmap.ImageReaderOptions()
        reader.camera_model = "SIMPLE_PINHOLE"
        reader.camera_params = f"{focal_of(fov, width)},{width / 2},{height / 2}"
        extraction = pycolmap.FeatureExtractionOptions()
        extraction.num_threads, extraction.use_gpu = 1, False
        matching = pycolmap.FeatureMatchingOptions()
        matching.num_threads, matching.use_gpu = 1, False
        verification = pycolmap.TwoViewGeometryOptions()
        verification.ransac.random_seed = seed
        mapping = pycolmap.IncrementalPipelineOptions()
        mapping.num_threads, mapping.random_seed, mapping.ba_refine_principal_point = 1, seed, False
        single = pycolmap.CameraMode.SINGLE
        try:
            pycolmap.extract_features(
                database, images, camera_mode=single, reader_options=reader, extraction_options=extraction
            )
            pycolmap.match_exhaustive(database, matching_options=matching, verification_options=verification)
            models = pycolmap.incremental_mapping(database, images, Path(folder), options=mapping)
            if not models:
                return None
            return _read(max(models.values(), key=lambda model: model.num_reg_images()), len(frames))
        finally:
            pycolmap.logging.minloglevel = before


def _read(model: Any, count: int) -> Reconstruction:
    placed = {image.name: image for image in model.images.values() if image.has_pose}
    (camera,) = model.cameras.values()
    focal, reprojection = float(camera.focal_length), float(model.compute_mean_reprojection_error())
    poses, depths = [], []
    for name in sorted(placed):
        from_world = placed[name].cam_from_world()
        poses.append(np.vstack([from_world.inverse().matrix(), [0, 0, 0, 1]]))
        seen = [model.points3D[p.point3D_id].xyz for p in placed[name].points2D if p.has_point3D()]
        depths += [(from_world * xyz)[2] for xyz in seen]
    return Reconstruction(
        len(placed) / count,
        model.num_points3D(),
        reprojection,
        float(model.compute_mean_track_length()),
        focal,
        _focal_doubt(model),  # last: it moves the model, where that is degenerate to anywhere
        torch.from_numpy(np.stack(poses)) if len(placed) == count else None,
        float(np.median(depths)) if depths else math.nan,
    )


def _focal_doubt(model: Any) -> float:
    """Relative standard deviation of the focal length: its covariance in a last bundle adjustment."""
    import pycolmap

    options = pycolmap.BundleAdjustmentOptions()
    options.print_summary, options.refine_principal_point = False, False
    config = pycolmap.BundleAdjustmentConfig()
    for image in model.reg_image_ids():
        config.add_image(image)
    config.fix_gauge(pycolmap.BundleAdjustmentGauge.TWO_CAMS_FROM_WORLD)
    adjuster = pycolmap.create_default_ceres_bundle_adjuster(options, config, model)
    adjuster.solve()
    wanted = pycolmap.BACovarianceOptions()
    wanted.params = pycolmap.BACovarianceOptionsParams.ALL
    covariance = pycolmap.estimate_ba_covariance(wanted, model, adjuster)
    (camera,) = model.cameras.values()
    focal = None if covariance is None else covariance.get_other_params_cov(camera.params)
    if focal is None or not focal[0, 0] >= 0 or camera.focal_length <= 0:
        return math.inf
    return float(focal[0, 0]) ** 0.5 / float(camera.focal_length)


def _none(reason: str) -> dict[str, Value]:
    return {f"sfm/{name}": Value(NA, reason) for name in NAMES}
