"""The world against code that nobody here wrote: pycolmap finds its cameras, kornia its epipolar lines."""

from typing import NamedTuple

import cv2
import kornia
import numpy as np
import pycolmap
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from geometry.cameras import inverse, so3_log
from geometry.world import make_clips

SEEDS = range(150, 158)


class Pair(NamedTuple):
    """Two frames of each of B clips, 256 x 256."""

    video: Tensor  # [B 2 3 256 256]
    c2w: Tensor  # [B 2 4 4]
    intrinsics: Tensor  # [B 3 3]


@pytest.fixture(scope="module")
def pair():
    """Texture fine enough for SIFT, rendered at twice the size and averaged so that it does not alias."""
    clips = make_clips(SEEDS, frames=4, size=(512, 512), motion="truck", texture_scale=0.1, supersample=1)
    frames = [0, 1]
    video = avg_pool2d(clips.video[:, frames].flatten(0, 1), 2).unflatten(0, (len(clips), 2))
    intrinsics = clips.geometry.intrinsics[:, 0] * torch.tensor([0.5, 0.5, 1.0])[:, None]
    return Pair(video, clips.geometry.c2w[:, frames].double(), intrinsics)


def estimate(video, intrinsics):
    """Rotation and direction of translation, second camera from first, by pycolmap from OpenCV's SIFT matches."""
    sift = cv2.SIFT_create(contrastThreshold=0.005)
    found = [sift.detectAndCompute((f.permute(1, 2, 0).numpy() * 255).astype(np.uint8), None) for f in video]
    pairs = cv2.BFMatcher().knnMatch(found[0][1], found[1][1], k=2)
    good = [first for first, second in pairs if first.distance < 0.8 * second.distance]
    # OpenCV puts pixel centres on integers, we and COLMAP at +0.5.
    a, b = (np.array([found[k][0][(m.queryIdx, m.trainIdx)[k]].pt for m in good]) + 0.5 for k in range(2))
    options = pycolmap.TwoViewGeometryOptions(compute_relative_pose=True, max_H_inlier_ratio=1.0)
    options.ransac.random_seed, options.ransac.max_error = 0, 1.0
    params = [intrinsics[0, 0], intrinsics[1, 1], intrinsics[0, 2], intrinsics[1, 2]]
    camera = pycolmap.Camera(model="PINHOLE", width=256, height=256, params=[float(p) for p in params])
    matches = np.stack([np.arange(len(good))] * 2, axis=1).astype(np.uint32)
    result = pycolmap.estimate_calibrated_two_view_geometry(camera, a, camera, b, matches, options)
    assert len(result.inlier_matches) > 50
    pose = result.cam2_from_cam1
    return torch.from_numpy(pose.rotation.matrix()), torch.from_numpy(pose.translation.copy())


def errors(video, intrinsics, c2w):
    """Angle between rotations and between directions of translation, degrees, of the estimate against `c2w [2 4 4]`."""
    rotation, translation = estimate(video, intrinsics)
    truth = inverse(c2w[1]) @ c2w[0]
    turn = so3_log(rotation @ truth[:3, :3].mT).norm()
    cosine = torch.cosine_similarity(translation, truth[:3, 3], dim=0).clamp(-1, 1)
    return torch.rad2deg(turn).item(), torch.rad2deg(cosine.acos()).item()


def test_pycolmap_recovers_the_true_relative_pose(pair):
    found = [errors(*clip) for clip in zip(pair.video, pair.intrinsics, pair.c2w, strict=True)]
    print("seeds", SEEDS, "rotation, translation direction (degrees)", np.round(found, 2).tolist())
    rotation, translation = zip(*found, strict=True)
    assert max(rotation) < 0.5
    assert max(translation) < 3.0


def test_the_inverse_pose_is_not_what_pycolmap_finds(pair):
    """The control: w2c for c2w."""
    _, translation = errors(pair.video[0], pair.intrinsics[0], inverse(pair.c2w[0]))
    assert translation > 90


def epipolar_distance(shift=0.0):
    """kornia's symmetric epipolar distance (pixels) of true correspondences under true cameras."""
    clips = make_clips(SEEDS, motion="orbit", supersample=1)
    frames = [0, 12]
    pixels = 2 + 60 * torch.rand(len(clips), 300, 2, generator=torch.Generator().manual_seed(0))
    tracks = clips.track(pixels)
    w2c = inverse(clips.geometry.c2w[:, frames].double())
    projection = clips.geometry.intrinsics[:, frames].double() @ w2c[..., :3, :]
    fundamental = kornia.geometry.epipolar.fundamental_from_projections(projection[:, 0], projection[:, 1])
    a, b = (tracks.pixels[:, t].double() for t in frames)
    distance = kornia.geometry.epipolar.symmetrical_epipolar_distance(a, b + shift, fundamental)
    return distance.sqrt()[tracks.visible[:, 12]]


def test_true_correspondences_lie_on_kornias_epipolar_lines():
    distance = epipolar_distance()
    assert len(distance) > 1000
    assert distance.quantile(0.99) < 0.01
    assert epipolar_distance(shift=0.5).median() > 0.1  # the control: half a pixel off
