"""Other models' conventions, turned into those of `geometry/types.py` at the border."""

import torch
from jaxtyping import Float
from torch import Tensor

from geometry.cameras import anchored, inverse, pixel_grid, rigid

NARROWEST = 0.05
"""Width of a view, as a share of its distance, below which fitted intrinsics are not believed (three degrees)."""


def rotation_of(xyzw: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 3 3"]:
    """Rotation matrix of a quaternion with its real part last (VGGT, DA3, Any4D), of any length but zero."""
    x, y, z, w = (xyzw / xyzw.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = [
        *(1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        *(2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        *(2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    ]
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def path_of_w2c(w2c: Float[Tensor, "*batch T rows 4"]) -> Float[Tensor, "*batch T 4 4"]:
    """c2w, anchored at frame 0, of world-to-camera matrices of three or four rows."""
    return anchored(inverse(rigid(w2c[..., :3, :3], w2c[..., :3, 3])))


def pinhole_of_fov(
    fov_h: Float[Tensor, "*batch"], fov_w: Float[Tensor, "*batch"], size: tuple[int, int]
) -> Float[Tensor, "*batch 3 3"]:
    """A centred pinhole from fields of view in radians, vertical and horizontal; pixels of (H, W)."""
    H, W = size
    zero, one = torch.zeros_like(fov_h), torch.ones_like(fov_h)
    fx, fy = (side / 2 / torch.tan(fov / 2).clamp(min=1e-6) for side, fov in ((W, fov_w), (H, fov_h)))
    rows = [fx, zero, W / 2 * one, zero, fy, H / 2 * one, zero, zero, one]
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def pinhole_of_rays(ray: Float[Tensor, "*batch H W 3"]) -> Float[Tensor, "*batch 3 3"]:
    """The pinhole that is nearest to the directions (of any length, z > 0) seen at the pixel centres.

    Least squares of x / z against u, and of y / z against v: the pixels are exact, the directions estimated.
    """
    H, W = ray.shape[-3:-1]
    pixels = pixel_grid(H, W, ray)
    entries = []
    for axis, side in ((0, W), (1, H)):
        place, at = ray[..., axis] / ray[..., 2], pixels[..., axis]
        mean = place.mean(dim=(-2, -1))
        off = at - side / 2
        spread = off.square().sum()
        # A side of one pixel says nothing of its focal length.
        slope = (place * off).sum(dim=(-2, -1)) / spread if spread > 0 else torch.ones_like(mean)
        focal = 1 / slope.clamp(min=NARROWEST / side)
        entries.append((focal, side / 2 - mean * focal))
    (fx, cx), (fy, cy) = entries
    zero, one = torch.zeros_like(fx), torch.ones_like(fx)
    return torch.stack([fx, zero, cx, zero, fy, cy, zero, zero, one], dim=-1).unflatten(-1, (3, 3))


def confidence_of(one_plus_exp: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """In [0, 1) from 1 + exp(x), which starts at 1: sigmoid(x)."""
    return 1 - 1 / one_plus_exp.clamp(min=1)
