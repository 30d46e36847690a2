"""How smoothly a camera's path is flown: the third derivative beside the first, of its own six numbers a frame."""

import torch
from jaxtyping import Float
from torch import Tensor

from geometry.cameras import relative, so3_log
from vggrpo.evaluate.value import NA, Value

STILL = 0.003
"""Radians, or median depths, a frame: below it a camera stands still. A slow pan of 17 frames has 0.018."""


def path_jerk(c2w: Float[Tensor, "T 4 4"], unit: float) -> Value:
    """Mean |change of acceleration| over mean |speed|, frame by frame, of rotation (radians) and translation together.

    0 is a camera of constant acceleration. Translations are in units of `unit` scene units (the median depth): then a
    number of either kind moves a picture about equally. Any scale of the world gives the same.
    """
    if len(c2w) < 4:
        return Value(NA, "fewer than 4 frames")
    if not unit > 0:
        return Value(NA, "no depth to measure translation by")
    step = relative(c2w.double())
    speed = torch.cat([so3_log(step[:, :3, :3]), step[:, :3, 3] / unit], dim=-1)
    size = float(speed.norm(dim=-1).mean())
    if size < STILL:
        return Value(NA, "the camera stands still")
    return Value(float(speed.diff(n=2, dim=0).norm(dim=-1).mean()) / size)
