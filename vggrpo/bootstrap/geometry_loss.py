"""What the geometry model is asked for: its correspondence, its cameras, its depth, what moves, and its own doubts."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from geometry.cameras import inverse, pixel_grid, project, relative, so3_log, unproject
from geometry.models.correlation import SPANS
from geometry.models.prediction import Prediction
from vggrpo.bootstrap.lesson import Lesson

FAR = 15.0
"""Depth of the sky in median depths: a target, so that the solver learns to use it for rotation."""
ROTATION_FLOOR = 0.01
"""Radians per frame: errors of a camera that turns less than this are compared with it."""
SHIFT_FLOOR = 0.01
"""Median depths per frame: the same of a camera that moves less."""
AGREE = (2, 8)
"""Frames apart whose errors of depth should be the same: an error that stays is no inconsistency, one that comes is."""
SAME = 0.05
"""Of its depth: how far a point may be from what the later frame sees there, to be what it sees."""


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
    intrinsics: Float[Tensor, "B T 3 3"]


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
        lesson.intrinsics,
    )


def moved(wanted: Truth, span: int) -> tuple[Float[Tensor, "B n H W 2"], Float[Tensor, "B n H W"]]:
    """Where and at which depth later cameras, `span` frames on, have each pixel's point, if it stands still."""
    n = wanted.c2w.shape[1] - span
    depth = wanted.log_depth[:, :n].exp()
    points = unproject(depth, wanted.intrinsics[:, :n], wanted.c2w[:, :n])
    return project(points, wanted.intrinsics[:, span:], wanted.c2w[:, span:])


def losses(found: Prediction, wanted: Truth, *, focal_given: bool) -> dict[str, Tensor]:
    """Each term by name; their sum is trained. Poses twice, on the coarse depth and the final one; depth thrice, before
    and after parallax was looked at, too.
    """
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
        "guess": 0.75 * (heed * (found.guess - wanted.log_depth).abs()).mean(),
        "depth": 0.75 * (heed * error).mean(),
        "edges": 0.5 * _slope(found.log_depth - wanted.log_depth, wanted.valid),
        "confidence": 0.05 * F.binary_cross_entropy_with_logits(found.confidence, close),
        "dynamic": 0.3
        * F.binary_cross_entropy_with_logits(found.dynamic, wanted.dynamic, pos_weight=error.new_tensor(2.0)),
        "coarse dynamic": 0.2
        * F.binary_cross_entropy_with_logits(found.coarse_dynamic, F.avg_pool2d(wanted.dynamic, patch)),
        "spans": 0.5 * _spans(found, wanted, patch),
        "agreement": 1.5 * torch.stack([disagreement(found.log_depth, wanted, span) for span in AGREE]).sum(),
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


def disagreement(log_depth: Float[Tensor, "B T H W"], wanted: Truth, span: int) -> Tensor:
    """Of the error of log-depth between frames `span` apart, where both see one point that stands still."""
    n = wanted.c2w.shape[1] - span
    if n < 1:
        return log_depth.new_zeros(())
    at, z = moved(wanted, span)
    size = at.new_tensor([at.shape[3], at.shape[2]])
    later = torch.stack([log_depth[:, span:] - wanted.log_depth[:, span:], wanted.log_depth[:, span:]], dim=2)
    there = F.grid_sample(later.flatten(0, 1), (2 * at / size - 1).flatten(0, 1), "bilinear", "border", False)
    error, depth = there.unflatten(0, (-1, n)).unbind(2)
    seen = ((at > 0) & (at < size)).all(-1) & (wanted.dynamic[:, :n] == 0) & (wanted.valid[:, :n] > 0)
    seen = seen & ((z.clamp(min=1e-3).log() - depth).abs() < SAME)
    gap = (log_depth[:, :n] - wanted.log_depth[:, :n] - error).abs()
    return (gap * seen).sum() / seen.sum().clamp(min=1)


def _spans(found: Prediction, wanted: Truth, patch: int) -> Tensor:
    """Of displacements between frames further apart, as "flow" is of neighbours'; of what stands still."""
    spans, terms = found.correspondence.spans, []
    for span in (span for span in SPANS if span < wanted.c2w.shape[1]):
        mine = spans.target - spans.source == span
        at, z = moved(wanted, span)
        n = at.shape[1]
        flow = F.avg_pool2d(
            (at - pixel_grid(at.shape[2], at.shape[3], at)).flatten(0, 1).movedim(-1, 1), patch
        ).movedim(1, -1)
        still = (wanted.dynamic[:, :n] == 0) & (z > 0)
        still = (F.avg_pool2d(still.float(), patch) == 1).float()
        off = (spans.flow[:, mine] - flow.unflatten(0, (-1, n))).abs().sum(-1)
        spread = spans.spread[:, mine].clamp(-4, 3)
        terms.append((still * (off * torch.exp(-spread) + spread)).sum() / still.sum().clamp(min=1))
    return torch.stack(terms).mean() if terms else found.log_depth.new_zeros(())


def _distance(found: Tensor, wanted: Tensor) -> Tensor:
    off = inverse(wanted) @ found
    return (so3_log(off[..., :3, :3]).norm(dim=-1) + off[..., :3, 3].norm(dim=-1)).mean()


def _slope(error: Float[Tensor, "B T H W"], valid: Float[Tensor, "B T H W"]) -> Tensor:
    across = (error[..., 1:] - error[..., :-1]).abs() * valid[..., 1:] * valid[..., :-1]
    down = (error[..., 1:, :] - error[..., :-1, :]).abs() * valid[..., 1:, :] * valid[..., :-1, :]
    return across.mean() + down.mean()
