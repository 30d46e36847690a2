"""Which way a camera went, in the world's own words: the verb and the side of a path, without any training.

Every path of `geometry/world/trajectory.py` is a direction in the space of all paths: six numbers a frame, rotation
(radians) and position (median depths), which move a picture about equally. Whatever its speed, the nearest direction
names a path; one that stays close to its mean stands still, and one that is near to no direction drifts freely. Of
every path only what is slow counts, its best cubic in time: a caption says where a camera goes, not how steadily it is
held.
"""

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geometry.cameras import inverse, so3_log
from geometry.world.trajectory import MOTIONS, Motion, Move, path

SLOW = 3
"""Degree of the polynomial that a path is taken for; an arc that eases in and out needs 3."""
STILL = 0.02
"""Length of a frame's six numbers, about their mean and root mean square, below which a camera stands still: a slow
pan has 0.08."""
NEAR = 0.75
"""Squared cosine from which on a path is one of the named ones. At 0.85 no path of the truth is misread, but more of
the estimated ones are."""
RADII = (0.6, 0.8, 1.0, 1.3)
"""Distances to the focus of an orbit or arc that are tried, in median depths."""
FORWARD = 0.6
"""Weight of position along the line of sight and of roll: less of the picture moves by them."""


def read_motion(
    c2w: Float[Tensor, "*batch T 4 4"], depth: Float[Tensor, "*batch T H W"]
) -> tuple[list[Motion], list[int]]:
    """Verb and side (+1, -1, or 0 where there are none: `trajectory.Move`) of each clip, in order.

    Neither the unit of length nor the speed counts.

    Raises:
        ValueError: fewer than two frames.
    """
    T = c2w.shape[-3]
    if T < 2:
        raise ValueError(f"a camera's motion needs two frames or more, got {T}")
    unit = depth.flatten(-3).median(dim=-1).values.reshape(-1)
    seen = _numbers(c2w.reshape(-1, T, 4, 4).double().cpu(), unit.double().cpu())
    names, templates = _bank(T)
    norm = seen.flatten(1).norm(dim=1)
    cosine = seen.flatten(1) @ templates.T / norm.clamp(min=1e-12)[:, None]
    best, which = cosine.max(dim=1)
    found: list[tuple[Motion, int]] = []
    for size, near, k in zip((norm / T**0.5).tolist(), best.tolist(), which.tolist(), strict=True):
        found.append(("static", 0) if size < STILL else names[k] if max(near, 0) ** 2 > NEAR else ("random", 0))
    return [motion for motion, _ in found], [side for _, side in found]


def _numbers(c2w: Float[Tensor, "B T 4 4"], unit: Float[Tensor, " B"]) -> Float[Tensor, "B T 6"]:
    """Rotation and position of each frame as seen from the middle one, less their mean."""
    middle = inverse(c2w[:, c2w.shape[1] // 2])[:, None] @ c2w
    numbers = torch.cat([so3_log(middle[..., :3, :3]), middle[..., :3, 3] / unit[:, None, None]], dim=-1)
    return _slow(numbers * numbers.new_tensor([1, 1, FORWARD, 1, 1, FORWARD]))


def _slow(numbers: Float[Tensor, "*batch T 6"]) -> Float[Tensor, "*batch T 6"]:
    """The nearest path that is a polynomial of degree `SLOW`, less its mean."""
    time = torch.linspace(-1, 1, numbers.shape[-2], dtype=numbers.dtype)
    powers = time[:, None] ** torch.arange(min(SLOW, len(time) - 1) + 1)
    basis = torch.linalg.qr(powers)[0][:, 1:]  # the first is the mean
    slow: Tensor = basis @ (basis.mT @ numbers)
    return slow


@cache
def _bank(T: int) -> tuple[list[tuple[Motion, int]], Float[Tensor, "templates numbers"]]:
    """Names and unit vectors of the world's paths of T frames."""
    names, rows = [], []
    for move, seed, radius in _moves():
        position, rotation = path(np.random.default_rng(seed), move, T, 1.0)
        numbers = torch.from_numpy(np.concatenate([rotation, radius * position], axis=1))
        numbers = numbers * numbers.new_tensor([1, 1, FORWARD, 1, 1, FORWARD])
        numbers = _slow(numbers).flatten()
        names.append((move.motion, move.side))
        rows.append(numbers / numbers.norm())
    return names, torch.stack(rows)


def _moves() -> Iterator[tuple[Move, int, float]]:
    """Commands, seeds (of an arc, some rise and some sink) and distances to the focus."""
    for motion in MOTIONS:
        if motion in ("static", "random"):
            continue
        sides = (0,) if motion in ("dolly_in", "dolly_out") else (-1, 1)
        around = motion in ("orbit", "arc")
        for side in sides:
            for seed in range(8) if motion == "arc" else (0,):
                for radius in RADII if around else (1.0,):
                    yield Move(motion, 1.0, side), seed, radius
