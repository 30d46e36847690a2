"""Where the cells of one picture are seen in another: Gauss-Newton on features (Lucas and Kanade), coarse to fine."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from geometry.cameras import pixel_grid

STEPS = (2, 2, 2)
"""Gauss-Newton steps on features of one, two and four places per cell side."""
WINDOWS = (4, 4, 3)
"""Times that the equations of a cell are averaged with those of its eight neighbours, at each of these."""
LONGEST = 1.5
"""Places that one step may go, along each axis."""


class Template(NamedTuple):
    """A picture and all of Lucas and Kanade's equations that does not depend on the other picture."""

    features: Float[Tensor, "P C H W"]
    right: Float[Tensor, "P C H W"]
    down: Float[Tensor, "P C H W"]
    products: Float[Tensor, "P 3 H W"]
    """Sums over channels: right right, right down, down down."""
    cells: int
    """Places per side of a cell."""


def template(features: Float[Tensor, "P C H W"], cells: int) -> Template:
    """With central differences."""
    wide = F.pad(features, (1, 1, 0, 0), mode="replicate")
    tall = F.pad(features, (0, 0, 1, 1), mode="replicate")
    right, down = (wide[..., 2:] - wide[..., :-2]) / 2, (tall[..., 2:, :] - tall[..., :-2, :]) / 2
    products = torch.stack([(right * right).sum(1), (right * down).sum(1), (down * down).sum(1)], dim=1)
    return Template(features, right, down, products, cells)


def align(
    first: Float[Tensor, "P C H W"], second: Float[Tensor, "P C H W"], patch: int, damping: Float[Tensor, " levels"]
) -> tuple[Float[Tensor, "P 2 h w"], Float[Tensor, "P 3 h w"], Float[Tensor, "P h w"], Template]:
    """For each patch x patch cell, the displacement (pixels) at which `second` looks like `first` does there.

    Also the normal matrix (xx, xy, yy) of each cell alone and the mean squared difference that is left around it, both
    at the finest level: flat or changing features cannot be followed, and say so. And that level's template.
    """
    height, width = first.shape[-2] // patch, first.shape[-1] // patch
    flow = first.new_zeros(len(first), 2, height, width)
    for level, (steps, windows) in enumerate(zip(STEPS, WINDOWS, strict=True)):
        cells = min(2**level, patch)
        here, there = template(shrunk(first, patch, cells), cells), shrunk(second, patch, cells)
        for _ in range(steps):
            pooled = equations(here, there, flow * (cells / patch))
            own, pooled = pooled[:, :3], averaged(pooled, windows)
            left = pooled[:, 5]
            flow = flow + solved(pooled, damping[level]) * (patch / cells)
    return flow, own, left, here


def equations(
    here: Template, second: Float[Tensor, "P C H W"], flow: Float[Tensor, "P 2 h w"]
) -> Float[Tensor, "P 7 h w"]:
    """Of each cell alone at this flow (in places): xx, xy, yy, xe, ye, mean squared difference, share inside."""
    seen, inside = warp(second, flow)
    off = seen - here.features
    terms = [(here.right * off).sum(1), (here.down * off).sum(1), off.square().mean(1)]
    stacked = torch.cat([here.products, torch.stack(terms, dim=1)], dim=1)
    return F.avg_pool2d(torch.cat([stacked * inside, inside], dim=1), here.cells)


def averaged(equations: Float[Tensor, "P 7 h w"], times: int) -> Float[Tensor, "P 7 h w"]:
    """Over the eight neighbours, so many times, and per share inside the picture."""
    for _ in range(times):
        equations = F.avg_pool2d(equations, 3, stride=1, padding=1, count_include_pad=False)
    return equations / (equations[:, -1:] + 1e-3)


def solved(equations: Float[Tensor, "P 7 h w"], damping: Tensor, longest: float = LONGEST) -> Float[Tensor, "P 2 h w"]:
    """The displacement that they ask for, in places."""
    xx, xy, yy, xe, ye, _, _ = equations.unbind(1)
    xx, yy = xx + damping, yy + damping
    step = torch.stack([xy * ye - yy * xe, xy * xe - xx * ye], dim=1) / (xx * yy - xy * xy)[:, None]
    return step.clamp(-longest, longest)


def warp(x: Float[Tensor, "P C H W"], flow: Float[Tensor, "P 2 h w"]) -> tuple[Tensor, Tensor]:
    """`x` where the flow (in pixels of `x`, resized to its grid) points, and 1 where that is inside, else 0."""
    height, width = x.shape[-2:]
    if flow.shape[-2:] != x.shape[-2:]:
        flow = F.interpolate(flow, size=(height, width), mode="bilinear", align_corners=False)
    at = (pixel_grid(height, width, x) + flow.movedim(1, -1)) * x.new_tensor([2 / width, 2 / height]) - 1
    inside = (at.abs() <= 1).all(-1)[:, None].to(x.dtype)
    return F.grid_sample(x, at, mode="bilinear", padding_mode="border", align_corners=False), inside


def shrunk(x: Float[Tensor, "P C H W"], patch: int, cells: int) -> Float[Tensor, "P C _ _"]:
    """Means, `cells` of them per `patch` pixels along each side."""
    if patch % cells:
        return F.adaptive_avg_pool2d(x, (x.shape[-2] // patch * cells, x.shape[-1] // patch * cells))
    return x if cells == patch else F.avg_pool2d(x, patch // cells)  # what adaptive pooling says, and faster
