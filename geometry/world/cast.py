"""Ray casting: which surface each ray of a batch of shots meets first, and where.

Rays have z = 1 in camera axes, so the ray parameter of a hit *is* z-depth. Nothing mixes clips, and nothing is a matrix
product over pixels (whose rounding may depend on the batch): a clip has the same bits alone and inside any batch.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geometry.cameras import inverse, pixel_grid
from geometry.world.shot import SHAPE_CODES, Shot

SKY_DEPTH = 100.0
"""Placeholder depth of the sky, scene units; such pixels are not valid."""
GROUND_DEPTH = 40.0
"""Open ground further off than this, scene units, is sky."""


class Hit(NamedTuple):
    """What each ray met first."""

    depth: Float[Tensor, "B T H W"]
    instance: Int[Tensor, "B T H W"]
    """-1 sky, 0 room or ground, n + 1 body n."""


def rays(shot: Shot, size: tuple[int, int], shift: Tensor | None = None, supersample: int = 1) -> tuple[Tensor, Tensor]:
    """Ray directions (x, y, 1) in camera axes through the pixel centres, each broadcastable to `[B T H W]`."""
    pixels = pixel_grid(*size, like=shot.camera) / supersample
    if shift is not None:
        return rays_through(shot, pixels + shift)
    x, y = rays_through(shot, pixels[None, None])
    return x[:, :, :1], y[:, :, :, :1]


def rays_through(shot: Shot, pixels: Float[Tensor, "... 2"]) -> tuple[Tensor, Tensor]:
    """Ray directions (x, y, 1) through any pixels `[B T H W 2]` (or broadcastable to it)."""
    focal, centre = shot.intrinsics[:, [0, 1], [0, 1]], shot.intrinsics[:, :2, 2]
    both = (pixels - centre[:, None, None, None]) / focal[:, None, None, None]
    return both[..., 0], both[..., 1]


def cast(shot: Shot, x: Tensor, y: Tensor) -> Hit:
    """First surface met by each ray (x, y, 1): `x` and `y` broadcast to `[B T H W]`."""
    stage = Ray(shot.camera[:, :, None, None], x, y)
    indoors = shot.indoors > 0
    if indoors.all():
        depth = _leave_room(stage, shot.room)
    elif not indoors.any():
        depth = _meet_ground(stage, shot.room)
    else:
        depth = torch.where(indoors[:, None, None, None], _leave_room(stage, shot.room), _meet_ground(stage, shot.room))
    instance = torch.where(depth < SKY_DEPTH, 0, -1)
    for n in range(shot.shape.shape[1]):
        for name, meet in (("box", _meet_box), ("sphere", _meet_sphere), ("cylinder", _meet_cylinder)):
            clips = (shot.shape[:, n] == SHAPE_CODES[name]).nonzero()[:, 0]
            if len(clips) == 0:
                continue
            mine = slice(None) if len(clips) == len(shot.shape) else clips
            to_body, half = inverse(shot.pose[mine, :, n]) @ shot.camera[mine], shot.half[mine, n]
            rows, columns = _window(to_body, half.norm(dim=-1), x[mine], y[mine])
            part = (mine, slice(None), rows, columns)
            t = meet(Ray(to_body[:, :, None, None], x[mine][..., columns], y[mine][:, :, rows]), half)
            nearer = t < depth[part]
            depth[part] = torch.where(nearer, t, depth[part])
            instance[part] = torch.where(nearer, n + 1, instance[part])
    return Hit(depth, instance)


def _window(
    to_body: Float[Tensor, "B T 4 4"], radius: Float[Tensor, " B"], x: Tensor, y: Tensor
) -> tuple[slice, slice]:
    """Rows and columns of a regular grid of rays outside which a sphere around the body's origin is never met."""
    if x.shape[2] > 1 or y.shape[3] > 1:  # not a regular grid
        return slice(None), slice(None)
    centre = -(to_body[..., :3, :3] * to_body[..., :3, 3:]).sum(-2)
    windows = []
    for axis, line in ((1, y[..., 0]), (0, x[:, :, 0])):
        # In the plane of this axis and z, the tangents to the sphere enclose the middle by asin(radius / distance).
        away = torch.hypot(centre[..., axis], centre[..., 2])
        middle, aside = torch.atan2(centre[..., axis], centre[..., 2]), (radius[:, None] / away).clamp(max=1).asin()
        around = away <= radius[:, None]
        low, high = ((middle + side * aside).clamp(-_UPRIGHT, _UPRIGHT).tan() for side in (-1.001, 1.001))
        low, high = low.where(~around, low.new_tensor(-math.inf)), high.where(~around, high.new_tensor(math.inf))
        met = ((line >= low[..., None]) & (line <= high[..., None])).any(1).any(0).nonzero()
        windows.append(slice(int(met[0, 0]), int(met[-1, 0]) + 1) if len(met) else slice(0, 0))
    return windows[0], windows[1]


_UPRIGHT = math.pi / 2 - 1e-4


class Ray:
    """Rays in the axes of a body: `origin[k]` broadcasts to, and `direction[k]` has, the shape of the rays."""

    def __init__(self, camera: Float[Tensor, "*batch 4 4"], x: Tensor, y: Tensor) -> None:
        """`camera` is camera to body and broadcasts over the rays (x, y, 1)."""
        self.origin = [camera[..., k, 3] for k in range(3)]
        self.direction = [camera[..., k, 0] * x + (camera[..., k, 1] * y + camera[..., k, 2]) for k in range(3)]

    def slab(self, k: int, half: Tensor) -> tuple[Tensor, Tensor]:
        """Where each ray enters and leaves |coordinate k| <= half `[B]`."""
        inverse_k = 1.0 / _away_from_zero(self.direction[k])
        middle, width = -self.origin[k] * inverse_k, inverse_k.abs() * half[:, None, None, None]
        return middle - width, middle + width

    def quadric(self, axes: tuple[int, ...], radius: Tensor) -> tuple[Tensor, Tensor]:
        """Where each ray enters and leaves the sphere or cylinder spanned by `axes`; NaN where it misses."""
        o, d = [self.origin[k] for k in axes], [self.direction[k] for k in axes]
        a, b, c = dot(d, d), dot(o, d), dot(o, o) - (radius * radius)[:, None, None, None]
        root = (b * b - a * c).sqrt()
        return (-b - root) / a, (-b + root) / a


def _meet_box(ray: Ray, half: Tensor) -> Tensor:
    slabs = [ray.slab(k, half[:, k]) for k in range(3)]
    near = torch.maximum(torch.maximum(slabs[0][0], slabs[1][0]), slabs[2][0])
    far = torch.minimum(torch.minimum(slabs[0][1], slabs[1][1]), slabs[2][1])
    return _entered(near, far)


def _meet_sphere(ray: Ray, half: Tensor) -> Tensor:
    return _entered(*ray.quadric((0, 1, 2), half[:, 0]))


def _meet_cylinder(ray: Ray, half: Tensor) -> Tensor:
    side, caps = ray.quadric((0, 2), half[:, 0]), ray.slab(1, half[:, 1])
    return _entered(torch.maximum(side[0], caps[0]), torch.minimum(side[1], caps[1]))


def _entered(near: Tensor, far: Tensor) -> Tensor:
    """The entry point where there is one ahead of the camera (cameras never start inside a body), else infinity."""
    return torch.where((near <= far) & (near > 0), near, math.inf)


def _leave_room(ray: Ray, room: Tensor) -> Tensor:
    depth = None
    for k in range(3):
        wall = torch.where(ray.direction[k] > 0, room[:, 1, k, None, None, None], room[:, 0, k, None, None, None])
        t = ((wall - ray.origin[k]) / _away_from_zero(ray.direction[k])).abs()
        depth = t if depth is None else torch.minimum(depth, t)
    assert depth is not None
    return depth


def _meet_ground(ray: Ray, room: Tensor) -> Tensor:
    t = (room[:, 1, 1, None, None, None] - ray.origin[1]) / _away_from_zero(ray.direction[1])
    return torch.where((t > 0) & (t < GROUND_DEPTH), t, SKY_DEPTH)


def dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Inner product of vectors held as a tensor per coordinate."""
    total = a[0] * b[0]
    for p, q in zip(a[1:], b[1:], strict=True):
        total = total + p * q
    return total


def _away_from_zero(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 1e-9, 1e-9, x)
