"""How good a geometry model is on clips of the world, by kind of scene and camera, beside controls that must fail."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from geometry.cameras import relative, so3_log, unproject
from geometry.types import Geometry
from vggrpo.bootstrap.lesson import Lesson

Model = Callable[[Tensor, Tensor | None], Geometry]
"""Videos [B T 3 H W] and their intrinsics, if known, to geometry."""
CLIPS_AT_ONCE = 4
MOVES = 0.08
"""A camera that is closer than this to its start at the end, in median depths, has no direction to get right."""

TURNS = 0.2
"""Degrees between neighbouring frames from which on a camera counts as turning; half of the world's do not turn."""


@torch.no_grad()
def predict(model: Model, lessons: Lesson, *, with_focal: bool = True) -> Geometry:
    """The model's geometry of every clip."""
    parts = []
    for start in range(0, len(lessons), CLIPS_AT_ONCE):
        some = lessons.map(lambda x, start=start: x[start : start + CLIPS_AT_ONCE])  # type: ignore[misc]
        parts.append(vars(model(some.video.float() / 255, some.intrinsics if with_focal else None)))
    tensors = {name: torch.cat([part[name] for part in parts]) for name, x in parts[0].items() if isinstance(x, Tensor)}
    return Geometry(**tensors, flow_grid="frame")


def measure(scene: Geometry, lessons: Lesson) -> dict[str, float]:
    """Errors of a batch of clips against the truth; both in units of their own median depth, clip by clip.

    Returns:
        rotation: degrees between neighbouring frames, median. turning: the same where the camera turns.
        clip_rotation: degrees in the last frame, median.
        direction: degrees of the way from the first to the last frame, median over clips that move.
        speed: Spearman correlation of |translation| between neighbouring frames, over all of them.
        abs_rel: |depth - truth| / truth, mean over valid pixels. dynamic: AUC of |scene flow| in clips with motion.
        NaN where there is nothing to measure.
    """
    valid, depth = lessons.valid, lessons.depth.float()
    unit, own = _median(depth, valid), _median(scene.depth, valid)
    wanted, found = lessons.c2w.clone(), scene.c2w.clone()
    wanted[..., :3, 3] /= unit[:, None, None]
    found[..., :3, 3] /= own[:, None, None]
    steps, mine = relative(wanted), relative(found)
    off = _angle(mine, steps)
    last, ours = wanted[:, -1, :3, 3], found[:, -1, :3, 3]
    goes = last.norm(dim=-1) > MOVES
    apart = torch.rad2deg(torch.acos(F.cosine_similarity(ours[goes], last[goes], dim=-1).clamp(-1, 1)))
    scaled = scene.depth * (unit / own)[:, None, None, None]
    moving = lessons.dynamic.flatten(1).any(1)
    score = torch.zeros_like(depth) if scene.scene_flow is None else scene.scene_flow.norm(dim=-1)
    return {
        "rotation": off.median().item(),
        "turning": off[torch.rad2deg(so3_log(steps[..., :3, :3]).norm(dim=-1)) > TURNS].median().item(),
        "clip_rotation": _angle(found[:, -1], wanted[:, -1]).median().item(),
        "direction": apart.median().item(),
        "speed": spearman(mine[..., :3, 3].norm(dim=-1), steps[..., :3, 3].norm(dim=-1)),
        "abs_rel": ((scaled - depth).abs() / depth)[valid].mean().item(),
        "dynamic": auc(score[moving], lessons.dynamic[moving]),
    }


def report(model: Model, lessons: Lesson, motions: Sequence[str]) -> dict[str, dict[str, float]]:
    """`measure` of all clips, of static and dynamic ones, of each camera motion, without the focal length; controls.

    Controls: "constant" creeps forward through a plane; "frozen" sees the first frame throughout; "shuffled" sees the
    frames in another order than the truth's.
    """
    scene = predict(model, lessons)
    moving = lessons.dynamic.flatten(1).any(1)
    groups: dict[str, Tensor] = {"all": torch.ones_like(moving), "bodies stand": ~moving, "bodies move": moving}
    for name in sorted(set(motions)):
        groups[f"camera: {name}"] = torch.tensor([m == name for m in motions], device=moving.device)
    result = {name: _part(scene, lessons, mask) for name, mask in groups.items()}
    result["all, focal length unknown"] = measure(predict(model, lessons, with_focal=False), lessons)
    result["control: constant"] = measure(constant(lessons), lessons)
    frozen = replace(lessons, video=lessons.video[:, :1].expand_as(lessons.video))
    result["control: frozen"] = measure(predict(model, frozen), lessons)
    order = torch.randperm(lessons.video.shape[1], generator=torch.Generator().manual_seed(0)).to(moving.device)
    shuffled = replace(lessons, video=lessons.video[:, order])
    result["control: shuffled"] = measure(predict(model, shuffled), lessons)
    return result


def constant(lessons: Lesson) -> Geometry:
    """The same answer for every clip: a plane at 1 and a camera that creeps forward."""
    c2w = torch.eye(4, device=lessons.c2w.device).repeat(*lessons.c2w.shape[:2], 1, 1)
    c2w[..., 2, 3] = 1e-3 * torch.arange(c2w.shape[1], device=c2w.device)
    depth = torch.ones_like(lessons.depth, dtype=torch.float32)
    return Geometry(c2w, lessons.intrinsics, depth, unproject(depth, lessons.intrinsics, c2w))


def spearman(a: Float[Tensor, "..."], b: Float[Tensor, "..."]) -> float:
    """Rank correlation, ties at their mean rank; 0 where one of the two does not vary, NaN of nothing."""
    if not a.numel():
        return float("nan")
    x, y = (_ranks(v.flatten()) for v in (a, b))
    x, y = x - x.mean(), y - y.mean()
    return (x @ y / (x.norm() * y.norm()).clamp(min=1e-12)).item()


def auc(score: Float[Tensor, "..."], label: Bool[Tensor, "..."]) -> float:
    """Probability that a true pixel scores above a false one, ties counting half; NaN where there is only one kind."""
    num_true = int(label.sum())
    num_false = label.numel() - num_true
    if not num_true or not num_false:
        return float("nan")
    total = _ranks(score.flatten())[label.flatten()].sum()
    return ((total - num_true * (num_true - 1) / 2) / (num_true * num_false)).item()


def _part(scene: Geometry, lessons: Lesson, mask: Bool[Tensor, " B"]) -> dict[str, float]:
    return measure(scene.map(lambda x: x[mask]), lessons.map(lambda x: x[mask]))


def _ranks(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """From 0; equal values share their mean rank."""
    _, group, count = torch.unique(x, return_inverse=True, return_counts=True)
    return (count.cumsum(0).double() - (count.double() + 1) / 2)[group]


def _median(depth: Float[Tensor, "B T H W"], valid: Bool[Tensor, "B T H W"]) -> Float[Tensor, " B"]:
    return torch.where(valid, depth, torch.nan).flatten(1).nanmedian(dim=1).values


def _angle(a: Float[Tensor, "*batch 4 4"], b: Float[Tensor, "*batch 4 4"]) -> Float[Tensor, "*batch"]:
    return torch.rad2deg(so3_log(b[..., :3, :3].mT @ a[..., :3, :3]).norm(dim=-1))
