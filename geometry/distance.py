"""How far one geometry is from another, output by output: what distillation lowers and reports print."""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from geometry.cameras import so3_log
from geometry.types import Geometry


@dataclass(frozen=True)
class OutputWeights:
    """What each output's distance counts for in a sum."""

    translation: float = 5.0
    """Per median depth of the teacher. Poses count five times, as in VIST3A (its paper, with VGGT)."""
    rotation: float = 5.0
    """Per radian."""
    focal: float = 1.0
    """Per unit of log focal length."""
    log_depth: float = 1.0
    """Per unit of log depth."""
    points: float = 1.0
    """Per median depth."""
    scene_flow: float = 1.0
    """Per median depth."""
    confidence: float = 0.01
    """Per unit."""

    def __post_init__(self) -> None:
        if min(vars(self).values()) < 0:
            raise ValueError(f"weights of outputs must be >= 0, got {self}")

    def total(self, distances: dict[str, Float[Tensor, "*batch"]]) -> Float[Tensor, "*batch"]:
        """The weighted sum; an output that neither geometry has counts nothing."""
        return torch.stack([getattr(self, name) * x for name, x in distances.items()]).sum(0)


OUTPUTS = tuple(f.name for f in fields(OutputWeights))


def output_distances(student: Geometry, teacher: Geometry) -> dict[str, Float[Tensor, "*batch"]]:
    """L1 distance of each output, per clip: the keys of `OutputWeights`, less those that the two do not have.

    translation, points, scene flow: L1 norm in units of the *teacher's* median depth, so that a large scene counts no
    more than a small one while a student of the wrong scale still pays; rotation: geodesic angle in radians; focal and
    depth: of the logarithm. Pixels count where the teacher's `valid` says so, and by its confidence if it has one.

    Raises:
        ValueError: geometries of different sizes, or only one of them with scene flow or confidence.
    """
    if student.depth.shape != teacher.depth.shape:
        raise ValueError(f"geometries of {list(student.depth.shape)} and {list(teacher.depth.shape)} (*batch T H W)")
    valid = torch.ones_like(teacher.depth, dtype=torch.bool) if teacher.valid is None else teacher.valid
    unit = teacher.depth.masked_fill(~valid, torch.nan).flatten(-3).nanmedian(-1).values
    share = valid.to(teacher.depth.dtype)
    trust = share if teacher.confidence is None else share * teacher.confidence

    def mean(distance: Tensor, weight: Tensor) -> Tensor:
        zero = torch.zeros_like(distance)  # placeholders may be anything: they must not meet the sum
        total = torch.where(valid, distance * weight, zero).sum((-3, -2, -1))
        return total / weight.sum((-3, -2, -1)).clamp(min=1e-12)

    turn = so3_log(teacher.c2w[..., :3, :3].mT @ student.c2w[..., :3, :3])
    focal = [scene.intrinsics.diagonal(dim1=-2, dim2=-1)[..., :2].log() for scene in (student, teacher)]
    distances = {
        "translation": (student.c2w - teacher.c2w)[..., :3, 3].abs().sum(-1).mean(-1) / unit,
        "rotation": turn.norm(dim=-1).mean(-1),
        "focal": (focal[0] - focal[1]).abs().mean((-2, -1)),
        "log_depth": mean((_positive(student.depth, valid).log() - _positive(teacher.depth, valid).log()).abs(), trust),
        "points": mean((student.points - teacher.points).abs().sum(-1), trust) / unit,
    }
    for name in ("scene_flow", "confidence"):
        ours, theirs = getattr(student, name), getattr(teacher, name)
        if (ours is None) != (theirs is None):
            raise ValueError(f"only one of the two geometries has {name}")
        if ours is not None:
            gap = (ours - theirs).abs()
            distances[name] = mean(gap.sum(-1), trust) / unit if name == "scene_flow" else mean(gap, share)
    return distances


def _positive(depth: Tensor, valid: Tensor) -> Tensor:
    """Depth with 1 where it is a placeholder."""
    return torch.where(valid, depth, torch.ones_like(depth))
