"""Small geometries made by hand."""

from dataclasses import fields, replace

import torch
from torch import Tensor

from geometry.cameras import pinhole, rigid, so3_exp, transform, unproject
from geometry.types import Geometry


def walk(position: Tensor, rotation: Tensor | None = None, depth: float = 2.0, size: int = 8) -> Geometry:
    """A camera at `position [T 3]`, turned by `rotation [T 3]` (rotation vectors), before a wall of constant depth."""
    rotation = torch.zeros_like(position) if rotation is None else rotation
    c2w = rigid(so3_exp(rotation), position)
    planes = torch.full((len(position), size, size), depth, dtype=position.dtype)
    intrinsics = pinhole(torch.tensor(60.0, dtype=position.dtype), size, size).expand(len(position), 3, 3)
    return Geometry(c2w, intrinsics, planes, unproject(planes, intrinsics, c2w))


def line(frames: int, step: tuple[float, float, float], dtype: torch.dtype = torch.float32) -> Tensor:
    """Constant velocity: `[T 3]`."""
    return torch.arange(frames, dtype=dtype)[:, None] * torch.tensor(step, dtype=dtype)


def moved(scene: Geometry, pose: Tensor) -> Geometry:
    """The same clip in another world: everything moved by a rigid motion."""

    points = transform(pose.expand(*scene.batch, 4, 4), scene.points)
    flow = None if scene.scene_flow is None else scene.scene_flow @ pose[:3, :3].mT
    return replace(scene, c2w=pose @ scene.c2w, points=points, scene_flow=flow)


def scaled(scene: Geometry, factor: float) -> Geometry:
    """The same clip in other units."""

    c2w = scene.c2w.clone()
    c2w[..., :3, 3] *= factor
    flow = None if scene.scene_flow is None else scene.scene_flow * factor
    return replace(scene, c2w=c2w, depth=scene.depth * factor, points=scene.points * factor, scene_flow=flow)


def backwards(scene: Geometry) -> Geometry:
    """The same clip played from its end; static clips only, whose flow is zero either way."""

    flipped = {
        f.name: getattr(scene, f.name).flip(len(scene.batch))
        for f in fields(scene)
        if isinstance(getattr(scene, f.name), Tensor)
    }
    return replace(scene, **flipped)
