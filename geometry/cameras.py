"""Pinhole cameras and rigid motions, batched and differentiable; conventions in `geometry/types.py`.

SO(3) exp and log are kornia's (0.9: differentiable at the identity, right up to pi; both checked in the tests against
scipy). Projection and unprojection are ours, because kornia's put pixel centres on integers and take one batch axis.
"""

import torch
from jaxtyping import Float
from kornia.geometry.conversions import axis_angle_to_rotation_matrix, rotation_matrix_to_axis_angle
from torch import Tensor


def so3_exp(omega: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3 3"]:
    """Rotation matrix of a rotation vector (radians)."""
    return axis_angle_to_rotation_matrix(omega.reshape(-1, 3)).reshape(*omega.shape, 3)


def so3_log(rotation: Float[Tensor, "*batch 3 3"]) -> Float[Tensor, "*batch 3"]:
    """Rotation vector (radians, |omega| <= pi) of a rotation matrix."""
    return rotation_matrix_to_axis_angle(rotation.reshape(-1, 3, 3)).reshape(rotation.shape[:-1])


def cross_matrix(vector: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3 3"]:
    """The matrix of v x, the cross product with v."""
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))


def rigid(rotation: Float[Tensor, "*batch 3 3"], translation: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 4 4"]:
    """The 4x4 matrix of x -> rotation x + translation."""
    top = torch.cat([rotation, translation[..., None]], dim=-1)
    bottom = top.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*top.shape[:-2], 1, 4)
    return torch.cat([top, bottom], dim=-2)


def inverse(pose: Float[Tensor, "*batch 4 4"]) -> Float[Tensor, "*batch 4 4"]:
    """Inverse of a rigid motion: c2w <-> w2c."""
    rotation = pose[..., :3, :3].mT
    return rigid(rotation, -(rotation @ pose[..., :3, 3:])[..., 0])


def relative(c2w: Float[Tensor, "*batch T 4 4"]) -> Float[Tensor, "*batch T-1 4 4"]:
    """Camera i+1 seen from camera i: its rotation is R_i^T R_{i+1}, its translation is in the axes of camera i."""
    return inverse(c2w[..., :-1, :, :]) @ c2w[..., 1:, :, :]


def anchored(c2w: Float[Tensor, "*batch T 4 4"]) -> Float[Tensor, "*batch T 4 4"]:
    """The same path with frame 0's camera as the world; a frame with frame 0's pose has exactly the identity."""
    first = c2w[..., :1, :, :]
    eye = torch.eye(4, dtype=c2w.dtype, device=c2w.device)
    return torch.where((c2w == first).flatten(-2).all(-1)[..., None, None], eye, inverse(first) @ c2w)


def transform(pose: Float[Tensor, "*batch 4 4"], points: Float[Tensor, "... 3"]) -> Tensor:
    """Rigid motion of points: pose `[*batch 4 4]`, points `[*batch *grid 3]` with any number of grid axes."""
    grid = points.shape[pose.ndim - 2 : -1]
    flat = points.reshape(*points.shape[: pose.ndim - 2], -1, 3)
    moved = flat @ pose[..., :3, :3].mT + pose[..., None, :3, 3]
    return moved.reshape(*moved.shape[:-2], *grid, 3)


def pixel_grid(height: int, width: int, like: Tensor) -> Float[Tensor, "height width 2"]:
    """(u, v) of every pixel centre, with the dtype and device of `like`."""
    u = torch.arange(width, dtype=like.dtype, device=like.device) + 0.5
    v = torch.arange(height, dtype=like.dtype, device=like.device) + 0.5
    return torch.stack(torch.meshgrid(u, v, indexing="xy"), dim=-1)


def pinhole(fov_degrees: Float[Tensor, "*batch"], height: int, width: int) -> Float[Tensor, "*batch 3 3"]:
    """Intrinsics of a centred pinhole with square pixels and a horizontal field of view."""
    focal = width / 2 / torch.tan(torch.deg2rad(fov_degrees) / 2)
    intrinsics = torch.zeros(*fov_degrees.shape, 3, 3, dtype=focal.dtype, device=focal.device)
    intrinsics[..., 0, 0] = intrinsics[..., 1, 1] = focal
    intrinsics[..., 0, 2], intrinsics[..., 1, 2], intrinsics[..., 2, 2] = width / 2, height / 2, 1.0
    return intrinsics


def rescaled(
    intrinsics: Float[Tensor, "*batch 3 3"], before: tuple[int, int], after: tuple[int, int]
) -> Float[Tensor, "*batch 3 3"]:
    """Intrinsics of the same view when an image of (H, W) `before` is resized to (H, W) `after`."""
    scale = intrinsics.new_tensor([after[1] / before[1], after[0] / before[0], 1.0])
    return intrinsics * scale[:, None]


def unproject(
    depth: Float[Tensor, "*batch H W"], intrinsics: Float[Tensor, "*batch 3 3"], c2w: Float[Tensor, "*batch 4 4"]
) -> Float[Tensor, "*batch H W 3"]:
    """World points seen at the pixel centres."""
    height, width = depth.shape[-2:]
    pixels, entry = pixel_grid(height, width, depth), intrinsics[..., None, None, :, :]
    y = (pixels[..., 1] - entry[..., 1, 2]) / entry[..., 1, 1]
    x = (pixels[..., 0] - entry[..., 0, 2] - entry[..., 0, 1] * y) / entry[..., 0, 0]
    return transform(c2w, torch.stack([x * depth, y * depth, depth], dim=-1))


def project(
    points: Float[Tensor, "... 3"], intrinsics: Float[Tensor, "*batch 3 3"], c2w: Float[Tensor, "*batch 4 4"]
) -> tuple[Tensor, Tensor]:
    """Pixel `[*batch *grid 2]` and z-depth `[*batch *grid]` of world points `[*batch *grid 3]`; depth <= 0: behind."""
    camera = transform(inverse(c2w), points)
    depth = camera[..., 2]
    homogeneous = transform(rigid(intrinsics, torch.zeros_like(intrinsics[..., 0])), camera)
    return homogeneous[..., :2] / torch.where(depth == 0, torch.full_like(depth, 1e-12), depth)[..., None], depth
