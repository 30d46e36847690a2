"""What every reward shares: its type, the measures of a clip, and safe arithmetic.

A reward is any callable of a `Geometry` that returns one number a clip, `[*batch]`: differentiable, stateless, higher
is better, NaN where the clip cannot be scored. Nothing is registered; a function of yours is a reward as it stands.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from geometry.cameras import so3_log
from geometry.types import Geometry

RewardFn = Callable[[Geometry], Float[Tensor, "*batch"]]


def seen(scene: Geometry) -> Bool[Tensor, "*batch T H W"]:
    """Pixels at which something was seen."""
    return torch.ones_like(scene.depth, dtype=torch.bool) if scene.valid is None else scene.valid


def not_finite(scene: Geometry) -> Bool[Tensor, "*batch"]:
    """Clips with a value that is not finite where it matters."""
    mask = seen(scene)
    broken = ~scene.c2w.flatten(-3).isfinite().all(-1) | ~scene.intrinsics.flatten(-3).isfinite().all(-1)
    for pixels in (scene.depth[..., None], scene.points, scene.scene_flow):
        if pixels is not None and scene.flow_grid != "first":
            broken |= (~pixels.isfinite().all(-1) & mask).flatten(-3).any(-1)
    return broken


def median_depth(scene: Geometry) -> Float[Tensor, "*batch"]:
    """Median over all that a clip sees, scene units: what makes a measure scale-free. NaN if nothing is seen."""
    depth = scene.depth.where(seen(scene), torch.full_like(scene.depth, torch.nan))
    return depth.flatten(-3).nanmedian(dim=-1).values


def steps(scene: Geometry, stride: int = 1) -> tuple[Float[Tensor, "*batch pairs 3"], Float[Tensor, "*batch pairs 3"]]:
    """What the camera does in `stride` frames: c_{i+s} - c_i (world) and log(R_i^T R_{i+s}) (radians)."""
    before, after = scene.c2w[..., :-stride, :, :], scene.c2w[..., stride:, :, :]
    turn = before[..., :3, :3].mT @ after[..., :3, :3]
    return after[..., :3, 3] - before[..., :3, 3], so3_log(turn)


def length(x: Float[Tensor, "*batch axes"]) -> Float[Tensor, "*batch"]:
    """Euclidean norm whose gradient at zero is zero, not NaN."""
    square = (x * x).sum(-1)
    zero = square == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b for 0 <= a <= b, with 0/0 = 0; NaN stays NaN."""
    zero = b == 0
    return torch.where(zero, 0.0, a / torch.where(zero, 1.0, b))
