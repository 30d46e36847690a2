"""Correspondence from pixels: where the cells of a frame are seen in frames one, two and four away. Nothing is learnt.

Lucas and Kanade's equations with the gradients of the template (inverse compositional: a cell's normal matrix is made
once for each level), coarse to fine, on the colours. Far frames start from the displacements of near ones, one after
the other, and are then aligned with the picture itself, so that errors do not add up.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from geometry.cameras import pixel_grid

CELL = 4
"""Pixels per side of what has one displacement."""
STRIDES = (1, 2, 4)
"""Frames between which displacements are found; each is twice the one before."""
LEVELS = {4: (3, 4), 2: (2, 4), 1: (2, 1)}
"""Pixels of the video per side of a pixel of this level: steps there, and how often the equations of a cell are
averaged with its neighbours'. Wide when coarse and narrow when fine is best."""
DAMPING = 1e-4
"""Of the normal matrix: what has no texture stays where the coarser level put it."""
NOISE = 1e-3
"""Mean squared difference (of colours in [0, 1]) that is expected of a perfect match."""
LONGEST = 1.5
"""Pixels of a level that one step may go, along each axis."""


class Tracks(NamedTuple):
    """Displacements of every cell along E edges, each from one frame to another; in the order of `edges`."""

    source: Int[Tensor, " E"]
    target: Int[Tensor, " E"]
    flow: Float[Tensor, "B E h w 2"]
    """Pixels (u, v), from the centre of the cell."""
    information: Float[Tensor, "B E h w 2 2"]
    """How sharply the cell's own gradients fix it: 1 / pixels^2 up to a factor, by direction."""
    loop: Float[Tensor, "B E h w"]
    """Pixels between a cell and where the displacement at its other end leads back to."""


def edges(T: int) -> tuple[Int[Tensor, " E"], Int[Tensor, " E"], Int[Tensor, " E"]]:
    """Source and target of the edges of a clip of T frames, and which one it is of its source's: 2 per stride."""
    source, target, slot = [], [], []
    for k, stride in enumerate(s for s in STRIDES if s < T):
        i = torch.arange(T - stride)
        source += [i, i + stride]
        target += [i + stride, i]
        slot += [torch.full_like(i, 2 * k), torch.full_like(i, 2 * k + 1)]
    return (
        (torch.cat(source), torch.cat(target), torch.cat(slot)) if source else (torch.zeros(0, dtype=torch.long),) * 3
    )


@torch.no_grad()
def follow(video: Float[Tensor, "B T 3 H W"]) -> Tracks:
    """Displacements between all frames one, two and four apart, both ways; sides must be multiples of `CELL`."""
    B, T, _, H, W = video.shape
    source, target, _ = (x.to(video.device) for x in edges(T))
    pyramid = {level: F.avg_pool2d(video.flatten(0, 1), level).unflatten(0, (B, T)) for level in LEVELS}
    flows = [video.new_zeros(B, 0, 2, H // CELL, W // CELL)]
    sharp, loops, near = [video.new_zeros(B, 0, 3, H // CELL, W // CELL)], [flows[0][:, :, 0]], None
    for stride in (s for s in STRIDES if s < T):
        n = T - stride
        start = None if near is None else _chained(*near, n)
        pairs = {}
        for level, x in pyramid.items():
            if start is None or level < CELL:
                a, b = x[:, :n], x[:, stride:]
                pairs[level] = (torch.cat([a, b], 1).flatten(0, 1), torch.cat([b, a], 1).flatten(0, 1))
        flow, information = (x.unflatten(0, (B, 2 * n)) for x in align(pairs, start))
        near = (flow[:, :n], flow[:, n:])
        flows.append(flow)
        sharp.append(information)
        loops.append((flow + _carried(flow.roll(n, 1), flow)).norm(dim=2))
    xx, xy, yy = torch.cat(sharp, 1).unbind(2)
    information = torch.stack([xx, xy, xy, yy], dim=-1).unflatten(-1, (2, 2))
    return Tracks(source, target, torch.cat(flows, 1).movedim(2, -1), information, torch.cat(loops, 1))


def align(
    pairs: dict[int, tuple[Tensor, Tensor]], start: Float[Tensor, "P 2 h w"] | None
) -> tuple[Float[Tensor, "P 2 h w"], Float[Tensor, "P 3 h w"]]:
    """The displacement (pixels) at which the second picture looks like each cell of the first.

    Also (xx, xy, yy) of the cell's own normal matrix at the finest level, over the mean squared difference that is left
    around it. `pairs`: pictures `[P 3 H W]` by level, the coarsest first.
    """
    flow = start
    for level, (first, second) in pairs.items():
        steps, windows = LEVELS[level]
        cells = CELL // level
        right, down = _gradient(first)
        own = F.avg_pool2d(torch.stack([(right**2).sum(1), (right * down).sum(1), (down**2).sum(1)], dim=1), cells)
        flow = own.new_zeros(len(own), 2, *own.shape[-2:]) if flow is None else flow
        for _ in range(steps):
            seen, inside = _warp(second, flow / level)
            off = seen - first
            terms = [(right * off).sum(1), (down * off).sum(1), off.square().mean(1)]
            inside = F.avg_pool2d(inside, cells)
            pooled = torch.cat([own, F.avg_pool2d(torch.stack(terms, dim=1), cells)], dim=1)
            pooled = torch.cat([pooled * inside, inside], dim=1)
            for _ in range(windows):
                pooled = _smooth(pooled)
            xx, xy, yy, xe, ye, left = (pooled[:, :-1] / (pooled[:, -1:] + 1e-3)).unbind(1)
            xx, yy = xx + DAMPING, yy + DAMPING
            step = torch.stack([xy * ye - yy * xe, xy * xe - xx * ye], dim=1) / (xx * yy - xy * xy)[:, None]
            flow = flow + step.clamp(-LONGEST, LONGEST) * level
    assert flow is not None
    return flow, own / (left + NOISE)[:, None]


def _chained(ahead: Tensor, back: Tensor, n: int) -> Tensor:
    """Displacements over twice the stride, from two of them after one another: `[B * 2n 2 h w]`, both ways."""
    half = ahead.shape[1] - n
    there = ahead[:, :n] + _carried(ahead[:, half:], ahead[:, :n])
    return torch.cat([there, back[:, half:] + _carried(back[:, :n], back[:, half:])], dim=1).flatten(0, 1)


def _carried(x: Float[Tensor, "B n 2 h w"], flow: Float[Tensor, "B n 2 h w"]) -> Tensor:
    """`x` where the flow leads."""
    moved, _ = _warp(x.flatten(0, 1), flow.flatten(0, 1) / CELL)
    return moved.view(x.shape)


def _warp(x: Float[Tensor, "P C H W"], flow: Float[Tensor, "P 2 h w"]) -> tuple[Tensor, Tensor]:
    """`x` where the flow (in its pixels, resized to its grid) points, and 1 where that is inside, else 0."""
    height, width = x.shape[-2:]
    if flow.shape[-2:] != x.shape[-2:]:
        flow = F.interpolate(flow, size=(height, width), mode="bilinear", align_corners=False)
    at = (pixel_grid(height, width, x) + flow.movedim(1, -1)) * x.new_tensor([2 / width, 2 / height]) - 1
    inside = (at.abs() <= 1).all(-1)[:, None].to(x.dtype)
    return F.grid_sample(x, at, mode="bilinear", padding_mode="border", align_corners=False), inside


def _gradient(x: Float[Tensor, "P C H W"]) -> tuple[Tensor, Tensor]:
    wide, tall = F.pad(x, (1, 1, 0, 0), mode="replicate"), F.pad(x, (0, 0, 1, 1), mode="replicate")
    return (wide[..., 2:] - wide[..., :-2]) / 2, (tall[..., 2:, :] - tall[..., :-2, :]) / 2


def _smooth(x: Tensor) -> Tensor:
    """Binomial, 3 x 3."""
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    x = (x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]) / 4
    return (x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]) / 4
