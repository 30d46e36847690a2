"""What the geometry model is asked for: its correspondence, its cameras, its depth, what moves, and its own doubts."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from geometry.cameras import inverse, relative, so3_log
from geometry.models.prediction import Prediction
from vggrpo.bootstrap.lesson import Lesson

FAR = 15.0
"""Depth of the sky in median depths: a target, so that the solver learns to use it for rotation."""
ROTATION_FLOOR = 0.01
"""Radians per frame: errors of a camera that turns less than this are compared with it."""
SHIFT_FLOOR = 0.01
"""Median depths per frame: the same of a camera that moves less."""


class Truth(NamedTuple):
    """A lesson in the units of the network: lengths in median depths of the lesson."""

    relative: Float[Tensor, "B _ 4 4"]
    c2w: Float[Tensor, "B T 4 4"]
    log_depth: Float[Tensor, "B T H W"]
    valid: Float[Tensor, "B T H W"]
    dynamic: Float[Tensor, "B T H W"]
    motion: Float[Tensor, "B T H W 3"]
    flow: Float[Tensor, "B _ 2 h w 2"]
    log_focal: Float[Tensor, " B"]


def truth(lesson: Lesson) -> Truth:
    """What a perfect network would answer."""
    depth = lesson.depth.float()
    unit = torch.where(lesson.valid, depth, torch.nan).flatten(1).nanmedian(dim=1).values[:, None, None, None]
    c2w = lesson.c2w.clone()
    c2w[..., :3, 3] /= unit[:, 0]
    return Truth(
        relative(c2w),
        c2w,
        torch.log((depth / unit).clamp(max=FAR)),
        lesson.valid.float(),
        lesson.dynamic.float(),
        lesson.motion.float() / unit[..., None],
        lesson.flow[:, :-1].float(),
        torch.log(lesson.intrinsics[:, 0, 0, 0] / depth.shape[-1]),
    )


def losses(found: Prediction, wanted: Truth, *, focal_given: bool) -> dict[str, Tensor]:
    """Each term by name; their sum is trained. Poses twice: on the coarse depth and on the final one."""
    pair, patch = found.correspondence, wanted.log_depth.shape[-1] // found.coarse_log_depth.shape[-1]
    off = (pair.flow - wanted.flow).abs().sum(-1)
    spread = pair.spread.clamp(-4, 3)
    coarse = F.avg_pool2d(wanted.log_depth, patch)
    heed = wanted.valid + 0.1 * (1 - wanted.valid)
    error = (found.log_depth - wanted.log_depth).abs()
    close = ((error < 0.0953) & (wanted.valid > 0)).float()
    terms = {
        "flow": 0.5 * (off * torch.exp(-spread) + spread).mean(),
        "aligned": 0.1 * (pair.aligned - wanted.flow).abs().sum(-1).clamp(max=8).mean(),
        "coarse pose": 0.3 * pose_loss(found.coarse_relative, wanted.relative),
        "pose": pose_loss(found.relative, wanted.relative),
        "path": 2 * _distance(found.c2w, wanted.c2w),
        "coarse depth": 0.8 * (F.avg_pool2d(heed, patch) * (found.coarse_log_depth - coarse).abs()).mean(),
        "depth": 1.5 * (heed * error).mean(),
        "edges": 0.5 * _slope(found.log_depth - wanted.log_depth, wanted.valid),
        "confidence": 0.05 * F.binary_cross_entropy_with_logits(found.confidence, close),
        "dynamic": 0.3
        * F.binary_cross_entropy_with_logits(found.dynamic, wanted.dynamic, pos_weight=error.new_tensor(2.0)),
        "coarse dynamic": 0.2
        * F.binary_cross_entropy_with_logits(found.coarse_dynamic, F.avg_pool2d(wanted.dynamic, patch)),
        "motion": 4 * ((found.motion - wanted.motion).abs().sum(-1) * wanted.dynamic).mean(),
    }
    if not focal_given:
        terms["focal"] = 0.5 * (found.log_focal - wanted.log_focal).abs().mean()
    return terms


def pose_loss(found: Float[Tensor, "B n 4 4"], wanted: Float[Tensor, "B n 4 4"]) -> Tensor:
    """Rotation (radians) and translation (median depths), as they are and in shares of the clip's own speed."""
    turn = so3_log(wanted[..., :3, :3].mT @ found[..., :3, :3]).norm(dim=-1)
    shift = (found[..., :3, 3] - wanted[..., :3, 3]).norm(dim=-1)
    turning = so3_log(wanted[..., :3, :3]).norm(dim=-1).mean(1, keepdim=True) + ROTATION_FLOOR
    shifting = wanted[..., :3, 3].norm(dim=-1).mean(1, keepdim=True) + SHIFT_FLOOR
    return 8 * (turn + shift).mean() + 0.4 * (turn / turning + shift / shifting).mean()


def _distance(found: Tensor, wanted: Tensor) -> Tensor:
    off = inverse(wanted) @ found
    return (so3_log(off[..., :3, :3]).norm(dim=-1) + off[..., :3, 3].norm(dim=-1)).mean()


def _slope(error: Float[Tensor, "B T H W"], valid: Float[Tensor, "B T H W"]) -> Tensor:
    across = (error[..., 1:] - error[..., :-1]).abs() * valid[..., 1:] * valid[..., :-1]
    down = (error[..., 1:, :] - error[..., :-1, :]).abs() * valid[..., 1:, :] * valid[..., :-1, :]
    return across.mean() + down.mean()
