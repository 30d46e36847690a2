"""Colour of what rays hit: procedural textures in the body's own axes under one distant light, and a sky.

Vectors are lists with a tensor per coordinate; every tensor has (or broadcasts to) the shape of the rays.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from geometry.world.cast import Ray, dot
from geometry.world.shot import NUM_WALLS, Shot

_ROOM, _GROUND = -2, -3  # shape codes of slot 0
_SPHERE, _CYLINDER = 1, 2
Vector = list[Tensor]


def shade(
    shot: Shot, frame: Int[Tensor, "..."], ray: Ray, depth: Float[Tensor, "..."], instance: Int[Tensor, "..."]
) -> tuple[Vector, Int[Tensor, "..."]]:
    """RGB of each ray and a number that changes wherever the surface does (for antialiasing).

    `frame` counts frames over the batch (clip * T + frame). `ray` is in stage axes.
    """
    table = _slots(shot)
    rows = frame * table.shape[1] + instance.clamp(min=0)
    seen = table.flatten(0, 1).index_select(0, rows.flatten()).view(*depth.shape, -1).unbind(-1)
    offset = [ray.origin[i] + depth * ray.direction[i] - seen[9 + i] for i in range(3)]
    local = [dot(list(seen[3 * k : 3 * k + 3]), offset) for k in range(3)]
    shape = seen[18]
    normal = _normal([local[k] / seen[15 + k] for k in range(3)], shape)
    lambert = 0.62 + 0.38 * dot(normal, list(seen[12:15]))
    axis, side = _dominant(normal)
    wall = 2 * axis + (side < 0)  # the wall on the + side looks back along -
    slot = torch.where(shape < 0, wall, instance + NUM_WALLS - 1)
    rows = frame * shot.material.shape[2] + slot
    paint = shot.material.flatten(0, 2).index_select(0, rows.flatten()).view(*depth.shape, -1).unbind(-1)
    color = [(c * lambert).clamp(0, 1) for c in _texture(paint, local, axis)]
    sky = instance < 0
    if sky.any():
        clip = (frame // shot.camera.shape[1]).expand(depth.shape)[sky]
        for channel, value in zip(color, _sky(shot.sky[clip], [d[sky] for d in ray.direction]), strict=True):
            channel[sky] = value
    return color, torch.where(sky, -1, 3 * slot + axis)


def _slots(shot: Shot) -> Float[Tensor, "frames slots 19"]:
    """Of the room (slot 0) and each body: axes (rows of stage to body), centre, light in them, half extents, shape."""
    B, T, N = shot.pose.shape[:3]
    rotation, centre = shot.pose[..., :3, :3].mT, shot.pose[..., :3, 3]
    eye = torch.eye(3, dtype=rotation.dtype, device=rotation.device).expand(B, T, 1, 3, 3)
    middle, extent = (shot.room[:, 1] + shot.room[:, 0]) / 2, (shot.room[:, 1] - shot.room[:, 0]) / 2
    rotation = torch.cat([eye, rotation], dim=2)
    centre = torch.cat([middle[:, None, None].expand(B, T, 1, 3), centre], dim=2)
    light = (rotation * shot.light[:, None, None, None]).sum(-1)
    half = torch.cat([extent[:, None], shot.half], dim=1)[:, None].expand(B, T, N + 1, 3)
    place = torch.where(shot.indoors > 0, _ROOM, _GROUND)[:, None]
    shape = torch.cat([place, shot.shape], dim=1)[:, None, :, None].expand(B, T, N + 1, 1)
    return torch.cat([rotation.flatten(-2), centre, light, half, shape.to(half.dtype)], dim=-1).flatten(0, 1)


def _normal(scaled: Vector, shape: Tensor) -> Vector:
    """Unit normal in the body's axes from position over half extents; a room's points inwards, the ground's up."""
    x, y, z = scaled
    size = [s.abs() for s in scaled]
    flat_y = (size[1] >= size[0]) & (size[1] >= size[2]) | (shape == _GROUND)
    flat_x = ~flat_y & (size[0] >= size[2])
    inwards = torch.where(shape < 0, -1.0, 1.0)
    flat = [
        torch.where(on, inwards * s.sign(), 0.0)
        for on, s in zip((flat_x, flat_y, ~(flat_x | flat_y)), scaled, strict=True)
    ]
    flat[1] = torch.where(shape == _GROUND, -1.0, flat[1])
    around = (x * x + z * z).sqrt()
    cap = (shape == _CYLINDER) & (size[1] >= around)
    across = torch.where(shape == _CYLINDER, 0.0, y)
    length = (x * x + z * z + across * across).sqrt().clamp(min=1e-6)
    bent = [
        torch.where(cap, 0.0, x / length),
        torch.where(cap, y.sign(), across / length),
        torch.where(cap, 0.0, z / length),
    ]
    curved = shape >= _SPHERE
    return [torch.where(curved, b, f) for b, f in zip(bent, flat, strict=True)]


def _dominant(normal: Vector) -> tuple[Tensor, Tensor]:
    """Axis (0, 1, 2) along which a surface mostly faces, and the normal's coordinate there."""
    size = [n.abs() for n in normal]
    z = (size[2] > size[0]) & (size[2] > size[1])
    y = ~z & (size[1] > size[0])
    axis = torch.where(z, 2, torch.where(y, 1, 0))
    return axis, torch.where(z, normal[2], torch.where(y, normal[1], normal[0]))


def _texture(paint: tuple[Tensor, ...], local: Vector, axis: Tensor) -> Vector:
    """Mix of the two colours of a material at a point of its body."""
    pattern, cell = paint[0], paint[1]
    q = [p / cell for p in local]
    first, second = torch.where(axis == 0, q[1], q[0]), torch.where(axis == 2, q[1], q[2])
    u, v = paint[11] * first + paint[12] * second, paint[11] * second - paint[12] * first
    noise = value_noise([q[k] + paint[8 + k] for k in range(3)])
    wave = (math.pi * u).sin()
    marble = 0.5 + 0.5 * (7 * noise + 1.1 * u).sin()
    checks = (0.5 + 2.5 * wave * (math.pi * v).sin()).clamp(0, 1)
    stripes = (0.5 + 1.2 * wave).clamp(0, 1)
    blend = 0.5 + 0.5 * (0.9 * u).sin()
    regular = torch.where(pattern == 1, checks, torch.where(pattern == 2, stripes, blend))
    mix = torch.where(pattern == 0, marble, 0.7 * regular + 0.3 * noise)
    fade = 1 / (
        1 + paint[13] * (local[0] * local[0] + local[2] * local[2])
    )  # open ground only: calm towards the horizon
    mix = 0.5 + fade * (mix - 0.5)
    return [paint[2 + k] + mix * (paint[5 + k] - paint[2 + k]) for k in range(3)]


def _sky(colors: Float[Tensor, "n 2 3"], direction: Vector) -> Vector:
    """From the horizon's colour to the zenith's, with clouds; a function of direction alone."""
    length = dot(direction, direction).sqrt()
    d = [x / length for x in direction]
    height = (-2.2 * d[1]).clamp(0, 1)
    cloud = 0.6 * (2.4 * (value_noise([5 * d[0] + 3, 9 * d[1] + 3, 5 * d[2] + 3]) - 0.55)).clamp(0, 1)
    blue = [colors[:, 0, k] + height * (colors[:, 1, k] - colors[:, 0, k]) for k in range(3)]
    return [b + cloud * (0.95 - b) for b in blue]


LATTICE = 32


def _lattice() -> Tensor:
    """Random values in [0, 1] on a periodic lattice, the first layer repeated at the end of each axis."""
    values = torch.rand(LATTICE, LATTICE, LATTICE, generator=torch.Generator().manual_seed(0))
    for axis in range(3):
        values = torch.cat([values, values.narrow(axis, 0, 1)], dim=axis)
    return values[None, None]


_VALUES = _lattice()


def value_noise(q: Vector) -> Tensor:
    """Smooth noise in [0, 1] of period `LATTICE`: three coordinates of any one shape, lattice spacing 1."""
    smooth = []
    for x in q:
        whole = x.floor()
        part = x - whole
        wrapped = whole - LATTICE * (whole / LATTICE).floor()
        smooth.append((wrapped + part * part * (3 - 2 * part)) * (2 / LATTICE) - 1)
    at = torch.stack(smooth, dim=-1).flatten(0, -2)
    # grid_sample runs one thread per batch element, so the points go in as a batch of two rows.
    odd = len(at) % 2
    rows = F.pad(at, (0, 0, 0, odd)).view(2, -1, 1, 1, 3)
    values = _VALUES.to(at).expand(2, -1, -1, -1, -1)
    noise = F.grid_sample(values, rows, mode="bilinear", padding_mode="border", align_corners=True)
    return noise.flatten()[: len(at)].view(q[0].shape)
