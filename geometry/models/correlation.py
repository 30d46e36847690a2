"""Correspondence of neighbouring frames from their tokens alone: where each token of one is seen in the other.

A token is spread over its own pixels as learnt features, and the features of two frames are aligned by Gauss-Newton
(Lucas and Kanade, coarse to fine) for one displacement per token; a small network then corrects it, twice, and says how
far it is to be trusted. The alignment's windows are wide, which blurs its flow where depth jumps; so the network also
sees where a token and its neighbours alone would go. No pixel is looked at: whatever produces the tokens, an encoder or
a stitched latent, drives it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from geometry.cameras import pixel_grid

STEPS = (2, 2, 2)
"""Gauss-Newton steps on features of one, two and four cells per token side."""
WINDOWS = (4, 4, 3)
"""Times that the equations of a token are averaged with those of its eight neighbours, at each of these."""

PASSES = 2
"""Times that the network corrects the flow, each time with a look at what its last correction left unexplained."""

NOISE = 0.01
"""Mean squared difference of features that is expected of a perfect match."""


class Correspondence(NamedTuple):
    """Both directions of every pair of neighbouring frames; index 0 of the axis of two is i -> i+1, 1 is i+1 -> i."""

    flow: Float[Tensor, "B pairs 2 h w 2"]
    """Pixels of the video, (u, v), from the centre of each token."""
    aligned: Float[Tensor, "B pairs 2 h w 2"]
    """The same before the network corrected it."""
    spread: Float[Tensor, "B pairs 2 h w"]
    """Log of the error (pixels, Laplace) that the network expects."""
    information: Float[Tensor, "B pairs 2 h w 2 2"]
    """How sharply each token's own features fix its flow, by direction: gradients squared over what is left."""
    features: Float[Tensor, "B T C H W"]
    """Per pixel, from the tokens."""


class Correlation(nn.Module):
    """Tokens of a clip -> correspondence of neighbouring frames."""

    def __init__(self, dim: int, patch: int, channels: int = 8, hidden: int = 48) -> None:
        super().__init__()
        self.patch, self.channels = patch, channels
        self.to_pixels = nn.Linear(dim, patch * patch * channels)
        self.log_damping = nn.Parameter(torch.tensor([-2.3, -3.5, -4.5]))
        self.to_context = nn.Linear(dim, hidden // 2)
        self.correct = nn.Sequential(
            nn.Conv2d(11 + hidden, 2 * hidden, 3, padding=1, padding_mode="replicate"),
            nn.GELU(),
            nn.Conv2d(2 * hidden, hidden, 3, padding=1, padding_mode="replicate"),
            nn.GELU(),
            nn.Conv2d(hidden, 3, 3, padding=1, padding_mode="replicate"),
        )
        nn.init.zeros_(self.correct[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.correct[-1].bias)  # type: ignore[arg-type]

    def forward(self, tokens: Float[Tensor, "B T h w dim"]) -> Correspondence:
        """Flow in both directions; `T` = 1 has no pairs."""
        B, T = tokens.shape[:2]
        features = F.pixel_shuffle(self.to_pixels(tokens).movedim(-1, 2).flatten(0, 1), self.patch)
        features = features.unflatten(0, (B, T))
        context = self.to_context(tokens).movedim(-1, 2)
        first, second = _pairs(features), _pairs(context)
        flow, own, left = align(*first, self.patch, self.log_damping.exp())
        aligned, change = flow, torch.zeros_like(own)
        for _ in range(PASSES):
            change = self.correct(self._evidence(first, second, flow, own, left))
            flow = flow + change[:, :2]
        xx, xy, yy = own.unbind(1)
        shape = (B, T - 1, 2)
        return Correspondence(
            flow.movedim(1, -1).unflatten(0, shape),
            aligned.movedim(1, -1).unflatten(0, shape),
            change[:, 2].unflatten(0, shape),
            (torch.stack([xx, xy, xy, yy], dim=-1) / (left[..., None] + NOISE))
            .unflatten(-1, (2, 2))
            .unflatten(0, shape),
            features,
        )

    def _evidence(
        self, pixels: tuple[Tensor, Tensor], context: tuple[Tensor, Tensor], flow: Tensor, own: Tensor, left: Tensor
    ) -> Float[Tensor, "P _ h w"]:
        """What speaks for and against a flow, for each token."""
        here, (there, _) = context[0], warp(context[1], flow / self.patch)
        back = flow.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        loop, _ = warp(back, flow / self.patch)
        xx, xy, yy = own.unbind(1)
        sharp = torch.stack([xx, yy, xx * yy - xy * xy], dim=1).clamp(min=1e-6).log() / 4
        close = _averaged(_equations(*pixels, _gradient(pixels[0]), flow, self.patch, 1.0), 1)
        step = _solved(close, self.log_damping[-1].exp()).clamp(-1.5, 1.5)
        remains = torch.stack([left, close[:, 5]], dim=1).clamp(min=1e-6).log() / 4
        return torch.cat([flow / 4, (flow + loop).clamp(-4, 4) / 2, sharp, remains, step, here, there - here], dim=1)


def align(
    first: Float[Tensor, "P C H W"], second: Float[Tensor, "P C H W"], patch: int, damping: Float[Tensor, " levels"]
) -> tuple[Float[Tensor, "P 2 h w"], Float[Tensor, "P 3 h w"], Float[Tensor, "P h w"]]:
    """For each patch x patch cell, the displacement (pixels) at which `second` looks like `first` does there.

    Also the normal matrix (xx, xy, yy) of each cell alone and the mean squared difference that is left around it, both
    at the finest level: flat or changing features cannot be followed, and say so.
    """
    height, width = first.shape[-2] // patch, first.shape[-1] // patch
    flow = first.new_zeros(len(first), 2, height, width)
    for level, (steps, windows) in enumerate(zip(STEPS, WINDOWS, strict=True)):
        cells = min(2**level, patch)
        a, b = (_shrunk(x, patch, cells) for x in (first, second))
        right, down = _gradient(a)
        for _ in range(steps):
            pooled = _equations(a, b, (right, down), flow, cells, patch / cells)
            own, pooled = pooled[:, :3], _averaged(pooled, windows)
            left = pooled[:, 5]
            flow = flow + _solved(pooled, damping[level]).clamp(-1.5, 1.5) * patch / cells
    return flow, own, left


def _shrunk(x: Float[Tensor, "P C H W"], patch: int, cells: int) -> Float[Tensor, "P C _ _"]:
    """Means, `cells` of them per `patch` pixels along each side."""
    if patch % cells:
        return F.adaptive_avg_pool2d(x, (x.shape[-2] // patch * cells, x.shape[-1] // patch * cells))
    return x if cells == patch else F.avg_pool2d(x, patch // cells)  # what adaptive pooling says, and faster


def _equations(
    first: Tensor, second: Tensor, gradient: tuple[Tensor, Tensor], flow: Tensor, cells: int, pixels: float
) -> Float[Tensor, "P 7 h w"]:
    """Lucas and Kanade's, of each token alone at this flow: xx, xy, yy, xe, ye, mean squared difference, share inside.

    A token is `cells` x `cells` places of the features, each `pixels` wide.
    """
    right, down = gradient
    seen, inside = warp(second, flow / pixels)
    difference = seen - first
    terms = [right * right, right * down, down * down, right * difference, down * difference]
    stacked = torch.stack([x.sum(1) for x in terms] + [difference.square().mean(1)], dim=1)
    return F.avg_pool2d(torch.cat([stacked * inside, inside], dim=1), cells)


def _averaged(equations: Float[Tensor, "P 7 h w"], times: int) -> Float[Tensor, "P 7 h w"]:
    """Over the eight neighbours, so many times, and per share inside the picture."""
    for _ in range(times):
        equations = F.avg_pool2d(equations, 3, stride=1, padding=1, count_include_pad=False)
    return equations / (equations[:, -1:] + 1e-3)


def _solved(equations: Float[Tensor, "P 7 h w"], damping: Tensor) -> Float[Tensor, "P 2 h w"]:
    """The displacement that they ask for, in places of the features."""
    xx, xy, yy, xe, ye, _, _ = equations.unbind(1)
    xx, yy = xx + damping, yy + damping
    return torch.stack([xy * ye - yy * xe, xy * xe - xx * ye], dim=1) / (xx * yy - xy * xy)[:, None]


def warp(x: Float[Tensor, "P C H W"], flow: Float[Tensor, "P 2 h w"]) -> tuple[Tensor, Tensor]:
    """`x` where the flow (in pixels of `x`, resized to its grid) points, and 1 where that is inside, else 0."""
    height, width = x.shape[-2:]
    if flow.shape[-2:] != x.shape[-2:]:
        flow = F.interpolate(flow, size=(height, width), mode="bilinear", align_corners=False)
    at = (pixel_grid(height, width, x) + flow.movedim(1, -1)) * x.new_tensor([2 / width, 2 / height]) - 1
    inside = (at.abs() <= 1).all(-1)[:, None].to(x.dtype)
    return F.grid_sample(x, at, mode="bilinear", padding_mode="border", align_corners=False), inside


def _pairs(x: Float[Tensor, "B T C H W"]) -> tuple[Tensor, Tensor]:
    """Frames (i, i+1) and (i+1, i) next to each other: two tensors `[B * (T-1) * 2, C, H, W]`."""
    ahead = torch.stack([x[:, :-1], x[:, 1:]], dim=2)
    return ahead.flatten(0, 2), ahead.flip(2).flatten(0, 2)


def _gradient(x: Float[Tensor, "P C H W"]) -> tuple[Tensor, Tensor]:
    wide, tall = F.pad(x, (1, 1, 0, 0), mode="replicate"), F.pad(x, (0, 0, 1, 1), mode="replicate")
    return (wide[..., 2:] - wide[..., :-2]) / 2, (tall[..., 2:, :] - tall[..., :-2, :]) / 2
