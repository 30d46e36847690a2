"""Whether what is seen changes smoothly: still things stay where they were, moving things do not jolt."""

import torch
from jaxtyping import Float
from torch import Tensor

from geometry.reproject import dynamic_mask, succeed
from geometry.types import Geometry, check_geometry
from rewards.base import length, median_depth, not_finite, ratio, seen

HIDDEN = 0.1
"""A point further than this share behind what the next frame sees is hidden there; the largest step that is told."""


def scene_smoothness(
    scene: Geometry, *, floor: float = 0.01, dynamic_threshold: float = 0.004, min_overlap: float = 0.02
) -> Float[Tensor, "*batch"]:
    """r = 1 - (e_structure + e_flow) / 2, in [0, 1]: the smoothness of the scene beside that of the camera.

    VGGRPO (arXiv 2603.26599) names camera, structure and flow; it gives a formula for the camera only, so these are
    ours. e_structure: still points of each frame, seen again in the next: the mean of |expected - seen| depth over a
    tenth of the expected depth, at most 1. Only neighbours are compared, so a slow drift costs next to nothing (that is
    `reprojection_consistency`'s to see) and a step costs in full. e_flow: moving points, followed along their own
    scene flow: the mean of |v' - v| / max(|v| + |v'|, floor), 0 where nothing moves.

    Nothing is smoother than a still clip: use `camera_motion_floor` beside it, with more weight than all the rewards
    that stillness wins. NaN where neighbours cannot be compared: a single frame, no overlap, values not finite.

    Args:
        scene: a clip or a batch of clips.
        floor: the speed (median depths, over two frames) below which flow counts as noise.
        dynamic_threshold: scene flow longer than this (median depths) is motion.
        min_overlap: pairs of frames with fewer still pixels in common than this share of a frame do not count.

    Raises:
        ValueError: a geometry that breaks the conventions, or an argument out of range.
    """
    check_geometry(scene)
    if floor < 0 or dynamic_threshold < 0 or not 0 < min_overlap <= 1:
        raise ValueError(
            "floor and dynamic_threshold must be >= 0 and 0 < min_overlap <= 1,"
            f" got {floor}, {dynamic_threshold}, {min_overlap}"
        )
    if scene.depth.shape[-3] < 2:
        return torch.full_like(scene.depth[..., 0, 0, 0], torch.nan)
    broken = not_finite(scene)
    scene = scene.map(lambda x: x.nan_to_num(0.0, 0.0, 0.0) if x.is_floating_point() else x) if broken.any() else scene
    unit = median_depth(scene).nan_to_num(1.0).detach()
    moving = dynamic_mask(scene, dynamic_threshold * unit)
    usable = seen(scene) & (scene.depth > 0)
    structure = _structure(scene, usable & ~moving, min_overlap)
    flow = _flow(scene, usable & moving, floor * unit[..., None, None, None])
    return (1 - (structure + flow) / 2).where(~broken, torch.full_like(structure, torch.nan))


def _structure(scene: Geometry, still: Tensor, min_overlap: float) -> Float[Tensor, "*batch"]:
    follow = succeed(scene, still)
    shared = follow.both & (follow.expected < (1 + HIDDEN) * follow.observed)
    step = ((follow.expected - follow.observed).abs() / (HIDDEN * follow.expected)).clamp(max=1)
    pixels = shared.flatten(-2).sum(-1)
    error = step.where(shared, torch.zeros_like(step)).flatten(-2).sum(-1) / pixels.clamp(min=1)
    counts = pixels >= min_overlap * still.shape[-2] * still.shape[-1]
    return error.where(counts, torch.zeros_like(error)).sum(-1) / counts.sum(-1)  # 0/0, NaN, where no pair counts


def _flow(scene: Geometry, moving: Tensor, floor: Float[Tensor, "*batch 1 1 1"]) -> Float[Tensor, "*batch"]:
    """Zero where nothing can be followed."""
    if scene.scene_flow is None or scene.scene_flow.shape[-4] < 3:
        return torch.zeros_like(floor[..., 0, 0, 0])
    if scene.flow_grid == "first":  # the paths of frame 0's points are given
        velocity = scene.scene_flow.diff(dim=-4)
        before, after = velocity[..., :-1, :, :, :], velocity[..., 1:, :, :, :]
        followed = moving[..., :1, :, :].expand(before.shape[:-1])
    else:
        follow = succeed(scene, moving)
        same = (follow.expected - follow.observed).abs() < HIDDEN * follow.expected
        before, after, followed = scene.scene_flow[..., :-1, :, :, :], follow.flow, follow.both & same
    jolt = ratio(length(after - before), torch.maximum(length(after) + length(before), floor))
    total = jolt.where(followed, torch.zeros_like(jolt)).flatten(-3).sum(-1)
    return total / followed.flatten(-3).sum(-1).clamp(min=1)
