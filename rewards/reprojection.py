"""Whether the frames of a clip agree on one solid world."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from geometry.reproject import dynamic_mask, render_cloud
from geometry.types import Geometry, check_geometry
from rewards.base import median_depth, not_finite, seen

Scale = Literal["relative", "absolute"]
EXACT_FLOW = 0.004
"""Scene flow, in median depths, from which on a point of an exact geometry moves by itself."""
ESTIMATED_FLOW = 0.06
"""The same of a geometry that a model has estimated, whose flow explains wobble as motion (launch/LOG.md)."""


def reprojection_errors(
    scene: Geometry,
    *,
    scale: Scale = "relative",
    exclude_self: bool = True,
    dynamic_threshold: float = EXACT_FLOW,
    occlusion: float = 0.1,
    min_overlap: float = 0.02,
) -> Float[Tensor, "*batch T"]:
    """Mean depth disagreement of each view with the cloud of the others (VGGRPO, arXiv 2603.26599, Eq. 14).

    The points of the frames are fused, rendered into each view with a z-buffer, and compared with that view's depth
    where both are known. Points that move by themselves belong to no solid world and are left out on both sides. NaN
    for a view that cannot be compared.

    Args:
        scene: a clip or a batch of clips.
        scale: "relative" divides by the clip's median depth; "absolute" is the paper's, in scene units, and can be won
            by shrinking the scene.
        exclude_self: leave a view's own points out of the cloud it is compared with, and compare where each point
            falls, at sub-pixel precision. False is the paper's form: its own points in the cloud, pixel against pixel.
        dynamic_threshold: scene flow longer than this (median depths, or scene units if absolute) is dynamic.
        occlusion: points further than this fraction behind what the view sees are hidden from it, not wrong.
            With `exclude_self=False` nothing can be behind.
        min_overlap: a view with fewer compared pixels than this share of its frame does not count.

    Raises:
        ValueError: a geometry that breaks the conventions, or an argument out of range.
    """
    check_geometry(scene)
    if scale not in ("relative", "absolute"):
        raise ValueError(f'scale must be "relative" or "absolute", got {scale!r}')
    if dynamic_threshold < 0 or occlusion <= 0 or not 0 < min_overlap <= 1:
        raise ValueError(
            "dynamic_threshold must be >= 0, occlusion > 0 and 0 < min_overlap <= 1,"
            f" got {dynamic_threshold}, {occlusion}, {min_overlap}"
        )
    broken = not_finite(scene)
    scene = scene.map(lambda x: x.nan_to_num(0.0, 0.0, 0.0) if x.is_floating_point() else x) if broken.any() else scene
    unit = median_depth(scene).nan_to_num(1.0) if scale == "relative" else torch.ones_like(scene.depth[..., 0, 0, 0])
    usable = seen(scene) & ~dynamic_mask(scene, dynamic_threshold * unit.detach()) & (scene.depth > 0)
    view = render_cloud(scene, usable, exclude_self=exclude_self, subpixel=exclude_self)
    both = view.both & (view.rendered < (1 + occlusion) * view.observed) if exclude_self else view.both
    gap = (view.rendered - view.observed).abs() / unit[..., None, None, None]
    pixels = both.flatten(-2).sum(-1)
    error = gap.where(both, torch.zeros_like(gap)).flatten(-2).sum(-1) / pixels.clamp(min=1)
    enough = (pixels >= min_overlap * scene.depth.shape[-2] * scene.depth.shape[-1]) & ~broken[..., None]
    return error.where(enough, torch.full_like(error, torch.nan))


def reprojection_consistency(
    scene: Geometry,
    *,
    scale: Scale = "relative",
    exclude_self: bool = True,
    dynamic_threshold: float = EXACT_FLOW,
    occlusion: float = 0.1,
    min_overlap: float = 0.02,
    worst: int = 3,
) -> Float[Tensor, "*batch"]:
    """Minus the mean error of the worst views, <= 0; 0 is one solid world (VGGRPO, arXiv 2603.26599, Eq. 15).

    The default is scale-free and aware of occlusion; `scale="absolute", exclude_self=False` is the paper's form. NaN if
    no view can be compared with the others: a single frame, no overlap, everything dynamic, values that are not finite.
    With fewer than `worst` such views the mean is over those that there are.

    Args and errors as in `reprojection_errors`.
    """
    if worst < 1:
        raise ValueError(f"worst must be >= 1, got {worst}")
    error = reprojection_errors(
        scene,
        scale=scale,
        exclude_self=exclude_self,
        dynamic_threshold=dynamic_threshold,
        occlusion=occlusion,
        min_overlap=min_overlap,
    )
    counts = ~error.isnan()
    top = error.where(counts, torch.full_like(error, -1.0)).topk(min(worst, error.shape[-1]), dim=-1).values
    used = top >= 0
    mean = top.where(used, torch.zeros_like(top)).sum(-1) / used.sum(-1)  # 0/0, NaN, where no view counts
    return -mean
