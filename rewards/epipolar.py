"""Whether the estimated cameras agree with correspondences that someone else found."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from geometry.cameras import inverse
from geometry.types import Geometry, check_geometry
from rewards.base import length, median_depth, ratio


@dataclass(frozen=True)
class Matches:
    """N points seen in both frames of each of P pairs."""

    first: Int[Tensor, " P"]
    """Frame of `at`."""
    second: Int[Tensor, " P"]
    """Frame of `there`."""
    at: Float[Tensor, "*batch P N 2"]
    """(u, v) in pixels of the geometry's depth grid, pixel centres at +0.5."""
    there: Float[Tensor, "*batch P N 2"]
    """The same points in the other frame."""
    usable: Bool[Tensor, "*batch P N"]
    """False: no match, or a point that moves by itself. The place may then be anything, NaN included."""


def sampson_errors(scene: Geometry, matches: Matches) -> Float[Tensor, "*batch P N"]:
    """Sampson distance of each match to the epipolar geometry of its two cameras, in image diagonals; 0 if unusable.

    sqrt of (x'Fx)^2 / ((Fx)_1^2 + (Fx)_2^2 + (F'x')_1^2 + (F'x')_2^2) (Hartley and Zisserman, 11.4.3), with F from the
    scene's poses and intrinsics. It does not depend on the length of the baseline, nor on depth.
    """
    H, W = scene.depth.shape[-2:]
    a, b = ([x[..., frames, :, :] for x in (scene.c2w, scene.intrinsics)] for frames in (matches.first, matches.second))
    motion = inverse(b[0]) @ a[0]  # camera a seen from camera b: x_b = R x_a + t
    x, y, z = motion[..., :3, 3].unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))
    essential = cross @ motion[..., :3, :3]
    fundamental = torch.linalg.inv(b[1]).mT @ essential @ torch.linalg.inv(a[1])
    one, other = (
        torch.cat([place.where(matches.usable[..., None], torch.ones_like(place)), torch.ones_like(place[..., :1])], -1)
        for place in (matches.at.to(scene.c2w), matches.there.to(scene.c2w))
    )
    line, back = one @ fundamental.mT, other @ fundamental
    off = (other * line).sum(-1).abs()
    slope = length(torch.cat([line[..., :2], back[..., :2]], dim=-1))
    error = torch.where(slope == 0, 0.0, off / torch.where(slope == 0, 1.0, slope)) / (H * H + W * W) ** 0.5
    return error.where(matches.usable, torch.zeros_like(error))


def epipolar(
    scene: Geometry, matches: Matches, *, baseline: float = 0.02, cap: float = 0.05, min_matches: int = 8
) -> Float[Tensor, "*batch"]:
    """Minus the mean Sampson error over matches, then over pairs, in [-1, 0]; 0 is a camera that explains them all.

    In multiples of `cap`, at which a match counts as an outlier and has no more say. Differentiable in poses and
    intrinsics. A pair whose cameras are closer than `baseline` says nothing (without translation there is no epipolar
    geometry), nor does one with too few matches; NaN where none is left, so that a frozen clip is not scored.

    Args:
        scene: a clip or a batch of clips.
        matches: found in the video or in latents, not in this geometry, which always agrees with itself.
        baseline: in median depths.
        cap: in image diagonals.
        min_matches: of a pair.

    Raises:
        ValueError: a geometry that breaks the conventions, matches of frames that there are not or of other clips, or
            an argument out of range.
    """
    check_geometry(scene)
    _check(scene, matches)
    if baseline <= 0 or cap <= 0 or min_matches < 1:
        raise ValueError(f"baseline, cap and min_matches must be > 0, got {baseline:g}, {cap:g}, {min_matches}")
    apart = (scene.c2w[..., matches.second, :3, 3] - scene.c2w[..., matches.first, :3, 3]).detach().norm(dim=-1)
    number = matches.usable.sum(-1)
    counts = (apart >= baseline * median_depth(scene).detach()[..., None]) & (number >= min_matches)
    error = (sampson_errors(scene, matches) / cap).clamp(max=1)
    error = error.sum(-1) / number.clamp(min=1)
    total = error.where(counts, torch.zeros_like(error)).sum(-1)
    nothing = torch.full_like(total, torch.nan)
    mean = ratio(total, counts.sum(-1).to(total))
    return -mean.where(counts.any(-1) & scene.c2w.flatten(-3).isfinite().all(-1), nothing)


def _check(scene: Geometry, matches: Matches) -> None:
    T, P = scene.c2w.shape[-3], len(matches.first)
    for name in ("first", "second"):
        frames = getattr(matches, name)
        if list(frames.shape) != [P] or P == 0 or frames.min() < 0 or frames.max() >= T:
            raise ValueError(f"matches.{name} must be {P or 'some'} frames of 0 to {T - 1}, got {frames.tolist()}")
    expected = [*scene.batch, P, *matches.usable.shape[-1:]]
    for name, shape in (("at", [*expected, 2]), ("there", [*expected, 2]), ("usable", expected)):
        if list(getattr(matches, name).shape) != shape:
            raise ValueError(f"matches.{name} must be {shape}, got {list(getattr(matches, name).shape)}")
