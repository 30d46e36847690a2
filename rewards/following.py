"""Whether the camera went where it was told to go."""

import torch
from jaxtyping import Float
from torch import Tensor

from geometry.cameras import inverse, so3_log
from geometry.types import Geometry, check_geometry
from rewards.base import length, median_depth, ratio

STILL = 1e-3
"""A command whose segments are all shorter than this (in its own units) asks for no translation."""


def camera_following(
    scene: Geometry, commanded: Float[Tensor, "*#batch T 4 4"], *, segments: int = 4, floor: float = 0.06
) -> Float[Tensor, "*batch"]:
    """r = 1 - mean over segments of (e_trans + e_rot) / 2, in [0, 1]; 1 is the commanded path.

    The clip is cut into segments. In each, what the camera does from its first frame to its last (translation and
    rotation in the axes of that first camera) is compared with what it was told: e = |difference| over the sum of both
    sizes, so that 1 is "nothing of the sort", such as a frozen camera or one that goes the other way. Translation is
    compared up to one scale for the whole clip (the ratio of the two lengths: a command has units of its own, and
    speeds within the clip still count). Errors of rotation and of scale-aligned translation are the field's measure
    (CameraCtrl, arXiv 2404.02101); by segment they do not add up along the path. NaN for T < 2 and values that are not
    finite.

    Args:
        scene: a clip or a batch of clips.
        commanded: c2w, world = frame 0's camera, in units of its own; for the same T frames.
        segments: as many as there are pairs of frames, at most.
        floor: motion over a segment that counts as a whole one: radians, and median depths. Below it, noise would be
            judged as if it were motion.

    Raises:
        ValueError: a geometry that breaks the conventions, commands of other frames, segments < 1 or floor <= 0.
    """
    check_geometry(scene)
    T = scene.c2w.shape[-3]
    if commanded.ndim < 3 or list(commanded.shape[-3:]) != [T, 4, 4]:
        raise ValueError(f"commanded must be c2w [*batch {T} 4 4], one for each frame, got {list(commanded.shape)}")
    if segments < 1 or floor <= 0:
        raise ValueError(f"segments must be >= 1 and floor > 0, got {segments} and {floor:g}")
    if T < 2:
        return torch.full_like(scene.depth[..., 0, 0, 0], torch.nan)
    ends = torch.linspace(0, T - 1, min(segments, T - 1) + 1, device=scene.c2w.device).round().long()
    done, wanted = (_segments(path, ends) for path in (scene.c2w, commanded.to(scene.c2w)))
    turned = ratio(
        length(so3_log(done[..., :3, :3].mT @ wanted[..., :3, :3])),
        (length(so3_log(done[..., :3, :3])) + length(so3_log(wanted[..., :3, :3]))).clamp(min=floor),
    )
    least = floor * median_depth(scene)[..., None]
    there, told = done[..., :3, 3], wanted[..., :3, 3]
    size, asked = (_size(x).expand(*scene.batch, 1) for x in (there, told))
    rests = asked < STILL  # nothing to align with: whatever there is of translation is wrong
    scale = torch.where(rests, 1.0, asked / torch.maximum(size, least))
    told = told.where(~rests[..., None], torch.zeros_like(told))
    there = scale[..., None] * there
    moved = ratio(length(there - told), torch.maximum(length(there) + length(told), scale * least))
    return 1 - (moved + turned).mean(-1) / 2


def _segments(c2w: Float[Tensor, "*batch T 4 4"], ends: Tensor) -> Float[Tensor, "*batch segments 4 4"]:
    at = c2w[..., ends, :, :]
    return inverse(at[..., :-1, :, :]) @ at[..., 1:, :, :]


def _size(moves: Float[Tensor, "*batch segments 3"]) -> Float[Tensor, "*batch 1"]:
    """Root mean square over the segments."""
    return length(moves.flatten(-2))[..., None] / moves.shape[-2] ** 0.5
