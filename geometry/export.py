"""Geometry for other people's viewers: PLY, glTF and rerun files, and open3d fusion into one mesh or one cloud.

One clip at a time. trimesh, rerun and open3d come with `pip install vggrpo[viz]`; each is imported when first used.
Files keep the legend's world unless said: frame 0's OpenCV camera (x right, y down, z forward), scene units.
`video`, RGB in [0, 1] of any height and width, is resized to the depth grid for the colours; None colours the frames
from blue (first) to red (last), which shows at a glance what they disagree on.

Every function raises ValueError on a batch, on a geometry or a video that breaks the legend, on a path with the wrong
ending or without a folder, and when no pixel counts; ImportError (one line) when its library is missing.
"""

import ctypes
import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn.functional import interpolate, pad

from geometry.cameras import inverse, unproject
from geometry.reproject import dynamic_mask
from geometry.types import Geometry, check_geometry

Video = Float[Tensor, "T 3 h w"] | None


def select(scene: Geometry, *, min_confidence: float | None = None, max_motion: float | None = None) -> Geometry:
    """The same geometry without pixels of confidence < `min_confidence` or of more motion than `max_motion`.

    `max_motion` is the threshold of `dynamic_mask`, scene units. Use: `save_ply(path, select(scene, ...))`.
    """
    keep = torch.ones_like(scene.depth, dtype=torch.bool) if scene.valid is None else scene.valid
    if min_confidence is not None:
        if scene.confidence is None:
            raise ValueError("min_confidence needs a geometry with confidence, and this one has none")
        keep = keep & (scene.confidence >= min_confidence)
    if max_motion is not None:
        if scene.scene_flow is None:
            raise ValueError("max_motion needs a geometry with scene_flow, and this one has none")
        keep = keep & ~dynamic_mask(scene, max_motion)
    return replace(scene, valid=keep)


def cloud(
    scene: Geometry, video: Video = None, *, stride: int = 1, max_points: int | None = None
) -> tuple[Float[Tensor, "N 3"], UInt8[Tensor, "N 3"]]:
    """World points (scene units) and sRGB colours of the valid pixels, frame by frame, row by row, on the CPU.

    `stride` takes every so many rows and columns; `max_points` a random subset, the same one every time.
    """
    scene, keep, colors = _one_clip(scene, video, stride)
    points, colors = scene.points[keep], colors[keep]
    if max_points is not None and max_points < 1:
        raise ValueError(f"max_points must be at least 1, got {max_points}")
    if max_points is not None and len(points) > max_points:
        some = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:max_points].sort().values
        points, colors = points[some], colors[some]
    return points, colors


def save_ply(
    path: str | Path, scene: Geometry, video: Video = None, *, stride: int = 1, max_points: int | None = None
) -> None:
    """Write `cloud` as a binary PLY (.ply)."""
    path, trimesh = _checked(path, ".ply"), _require("trimesh")
    points, colors = cloud(scene, video, stride=stride, max_points=max_points)
    trimesh.PointCloud(points.numpy(), colors=colors.numpy()).export(path)


def save_gltf(
    path: str | Path, scene: Geometry, video: Video = None, *, stride: int = 1, max_points: int | None = None
) -> None:
    """Write `cloud`, a camera node a frame, and frusta and path as lines, into one binary glTF (.glb).

    OpenCV's axes become glTF's (x right, y up, z backward: y and z change sign), the world's and the cameras' own, so
    `camera_0000` stays the identity. Colours become linear. The frusta are exact; camera nodes lack a principal point.
    """
    path, trimesh = _checked(path, ".glb"), _require("trimesh")
    points, colors = cloud(scene, video, stride=stride, max_points=max_points)
    scene, keep, _ = _one_clip(scene, None)
    reach = 0.05 * float(scene.depth[keep].median())
    turn = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))
    srgb = colors / 255
    linear = torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    drawing = trimesh.Scene()
    dots = trimesh.PointCloud((points @ turn[:3, :3]).numpy(), colors=(linear * 255).round().byte().numpy())
    drawing.add_geometry(dots, geom_name="cloud")
    drawing.add_geometry(_frusta(trimesh.path, scene, reach, turn[:3, :3]), geom_name="frusta")
    for i, c2w in enumerate(turn @ scene.c2w @ turn):
        drawing.graph.update(frame_to=f"camera_{i:04d}", matrix=c2w.numpy())

    def finish(tree: dict[str, Any]) -> None:
        # trimesh writes at most one camera, and white lines.
        nodes = {node["name"]: node for node in tree["nodes"]}
        (H, W), tree["cameras"] = scene.depth.shape[1:], []
        for i, matrix in enumerate(scene.intrinsics):
            tan_x, tan_y = float(W / 2 / matrix[0, 0]), float(H / 2 / matrix[1, 1])
            lens = {"yfov": 2 * math.atan(tan_y), "aspectRatio": tan_x / tan_y, "znear": 0.1 * reach}
            tree["cameras"].append({"type": "perspective", "perspective": lens})
            nodes[f"camera_{i:04d}"]["camera"] = i
        tree["materials"].append({"pbrMetallicRoughness": {"baseColorFactor": [1.0, 0.2, 0.0, 1.0]}})
        tree["meshes"][1]["primitives"][0]["material"] = len(tree["materials"]) - 1

    path.write_bytes(drawing.export(file_type="glb", tree_postprocessor=finish))


def save_rerun(path: str | Path, scene: Geometry, video: Video = None, *, stride: int = 1) -> None:
    """Write a rerun recording (.rrd) with the timeline "frame".

    Per frame: the pinhole `world/camera` with its `image` and `depth` (0 where not valid), both on the depth grid, and
    `world/points` (on `stride`). Always: `world/path`, the line of all camera centres.
    """
    path, rr = _checked(path, ".rrd"), _require("rerun", "rerun-sdk")
    sparse = _one_clip(scene, video, stride)[1]
    scene, keep, colors = _one_clip(scene, video)
    (T, H, W), depth = keep.shape, scene.depth.where(keep, 0.0)
    reach = 0.05 * float(scene.depth[keep].median())
    recording = rr.RecordingStream("vggrpo")
    # Wall-clock timelines would say when the file was written, not when anything was seen.
    recording.set_log_time_enabled(False)
    recording.set_log_tick_enabled(False)
    recording.save(path)
    recording.log("world", rr.ViewCoordinates.RDF, static=True)
    recording.log("world/path", rr.LineStrips3D([scene.c2w[:, :3, 3].numpy()]), static=True)
    for i in range(T):
        recording.set_time("frame", sequence=i)
        # No shift: rerun, too, puts pixel centres at +0.5 (rerun issue 3896).
        pinhole = rr.Pinhole(image_from_camera=scene.intrinsics[i], resolution=[W, H], image_plane_distance=reach)
        motion = rr.Transform3D(translation=scene.c2w[i, :3, 3].numpy(), mat3x3=scene.c2w[i, :3, :3].numpy())
        recording.log("world/camera", motion, pinhole)
        recording.log("world/camera/image", rr.Image(colors[i].numpy()))
        recording.log("world/camera/depth", rr.DepthImage(depth[i].numpy(), meter=1.0))
        points, shades = scene.points[i][sparse[i]].numpy(), colors[i][sparse[i]].numpy()
        recording.log("world/points", rr.Points3D(points, colors=shades))
    recording.disconnect()


def fuse(scene: Geometry, video: Video = None, voxel: float | None = None, *, min_views: int = 1) -> Any:
    """Fuse a clip's depth maps (not `points`) into one coloured `open3d.geometry.TriangleMesh` by TSDF.

    What moves smears: drop it with `select`. `voxel` is an edge in scene units (None: a pixel's width at the median
    depth, but at least 1/256 of that depth); `min_views` frames must have seen it. Skew is a ValueError.
    """
    o3d = _require("open3d")
    scene, keep, colors = _one_clip(scene, video)
    voxel = _voxel(scene, keep, voxel)
    if (scene.intrinsics[:, 0, 1].abs() > 1e-6 * scene.intrinsics[:, 0, 0]).any():
        raise ValueError("open3d's cameras have no skew, but intrinsics[..., 0, 1] is not 0")
    tensor, f32, t, trunc = o3d.core.Tensor, o3d.core.float32, o3d.t.geometry, 4.0
    # Not the legacy ScalableTSDFVolume: in open3d 0.20 it integrates next to nothing.
    grid = t.VoxelBlockGrid(("tsdf", "weight", "color"), (f32, f32, f32), ((1), (1), (3)), voxel, 16, 10000)
    # No half-pixel shift: a voxel at u reads pixel int(u), centred at +0.5 as ours is.
    intrinsics, w2c = scene.intrinsics.double(), inverse(scene.c2w).double()
    world = unproject(scene.depth, scene.intrinsics, scene.c2w)
    # open3d skips whatever lands in the last row or column of an image: let that be a border without depth.
    depth, shade = pad(scene.depth.where(keep, 0.0), (0, 1, 0, 1)), pad(colors / 255, (0, 0, 0, 1, 0, 1))
    for i in keep.any(-1).any(-1).nonzero()[:, 0].tolist():
        camera = tensor(intrinsics[i].numpy()), tensor(w2c[i].numpy())
        blocks = grid.compute_unique_block_coordinates(t.PointCloud(tensor(world[i][keep[i]].numpy())), trunc)
        images = t.Image(tensor(depth[i].numpy())), t.Image(tensor(shade[i].numpy()))
        grid.integrate(blocks, *images, *camera, 1.0, float("inf"), trunc)
    mesh = grid.extract_triangle_mesh(min_views - 0.5).to_legacy()
    if len(mesh.triangles) == 0:
        raise ValueError(f"no surface found with voxel {voxel:.3g} and min_views {min_views}")
    return mesh


def fuse_cloud(scene: Geometry, video: Video = None, voxel: float | None = None) -> Any:
    """A clip's `points` as an `open3d.geometry.PointCloud`, one a voxel (as in `fuse`): the mean of those in it."""
    o3d = _require("open3d")
    scene, keep, colors = _one_clip(scene, video)
    fused = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(scene.points[keep].double().numpy()))
    fused.colors = o3d.utility.Vector3dVector((colors[keep].double() / 255).numpy())
    return fused.voxel_down_sample(_voxel(scene, keep, voxel))


def save_fused(path: str | Path, fused: Any) -> None:
    """Write what `fuse` or `fuse_cloud` returned as a PLY (.ply)."""
    path, o3d = _checked(path, ".ply"), _require("open3d")
    write = o3d.io.write_triangle_mesh if hasattr(fused, "triangles") else o3d.io.write_point_cloud
    if not write(str(path), fused):
        raise OSError(f"open3d could not write {path}")


def _one_clip(scene: Geometry, video: Video, stride: int = 1) -> tuple[Geometry, Bool[Tensor, "T H W"], Tensor]:
    """The clip in fp32 on the CPU, which pixels count (on `stride`), and every pixel's colour (uint8 [T H W 3])."""
    if scene.batch:
        raise ValueError(f"one clip at a time, this is a batch {list(scene.batch)}: scene.map(lambda x: x[0]) is one")
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    check_geometry(scene)
    scene = scene.map(lambda x: x.detach().cpu() if x.dtype == torch.bool else x.detach().cpu().float())
    if not (scene.c2w.isfinite().all() and scene.intrinsics.isfinite().all()):
        raise ValueError("c2w and intrinsics must be finite to be exported")
    T, H, W = scene.depth.shape
    keep = torch.zeros(T, H, W, dtype=torch.bool)
    keep[:, ::stride, ::stride] = (scene.points.isfinite().all(-1) & scene.depth.isfinite())[:, ::stride, ::stride]
    keep = keep if scene.valid is None else keep & scene.valid
    if not keep.any():
        raise ValueError(f"there is nothing to export: no pixel on stride {stride} is valid and finite")
    if video is None:
        red = torch.linspace(0, 1, T)[:, None, None]
        video = torch.stack([red, torch.full_like(red, 0.3), 1 - red], 1).expand(T, 3, H, W)
    if video.ndim != 4 or video.shape[:2] != (T, 3):
        raise ValueError(f"video must be [T 3 H W] with the geometry's T = {T}, got {list(video.shape)}")
    low, high = float(video.amin()), float(video.amax())
    if not (low > -1e-3 and high < 1 + 1e-3):
        raise ValueError(f"video must be RGB in [0, 1], got values from {low:.3g} to {high:.3g}")
    small = interpolate(video.detach().cpu().float(), (H, W), mode="bilinear", antialias=True).movedim(1, -1)
    return scene, keep, (small.clamp(0, 1) * 255).round().byte().contiguous()


def _voxel(scene: Geometry, keep: Tensor, voxel: float | None) -> float:
    if voxel is not None and voxel <= 0:
        raise ValueError(f"voxel must be > 0 scene units, got {voxel}")
    return voxel or float(scene.depth[keep].median()) * max(1 / float(scene.intrinsics[:, 0, 0].median()), 1 / 256)


def _frusta(path: Any, scene: Geometry, reach: float, turn: Float[Tensor, "3 3"]) -> Any:
    """A trimesh path: each camera's pyramid through its image corners, `reach` deep, and the line of all centres."""
    T, H, W = scene.depth.shape
    corners = torch.tensor([[0.0, 0, 1], [W, 0, 1], [W, H, 1], [0, H, 1]]) @ torch.linalg.inv(scene.intrinsics).mT
    rim = reach * corners @ scene.c2w[:, :3, :3].mT
    vertices = torch.cat([torch.zeros(T, 1, 3), rim], 1) + scene.c2w[:, None, :3, 3]
    strokes = [[5 * i + k for k in stroke] for i in range(T) for stroke in ([0, 1, 2, 0], [0, 3, 4, 0], [2, 3], [4, 1])]
    strokes += [[5 * i - 5, 5 * i] for i in range(1, T)]
    return path.Path3D([path.entities.Line(s) for s in strokes], (vertices.flatten(0, 1) @ turn).numpy(), process=False)


def _checked(path: str | Path, ending: str) -> Path:
    path = Path(path)
    if path.suffix != ending or not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: it must end in {ending}, in a folder that exists")
    return path


def _require(module: str, package: str | None = None) -> Any:
    """Import a library of the viz extra, or say in one line how to get it."""
    if module == "open3d" and importlib.util.find_spec("libusb_package"):
        # open3d 0.20 links libusb and does not ship it; without this package, the system's may do.
        ctypes.CDLL(str(importlib.import_module("libusb_package").get_library_path()), ctypes.RTLD_GLOBAL)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        message = f"{package or module} cannot be imported ({error}): pip install vggrpo[viz]"
        raise type(error)(message, name=module) from None
