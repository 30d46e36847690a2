"""Correspondence of a clip's frames from their tokens alone: where each token of one is seen in another.

A token is spread over its own pixels as learnt features, and the features of neighbouring frames are aligned by
Gauss-Newton (`alignment.py`) for one displacement per token; a small network then corrects it, twice, and says how far
it is to be trusted. The alignment's windows are wide, which blurs its flow where depth jumps; so the network also sees
where a token and its neighbours alone would go. Frames further apart start from the displacements between, one after
the other, and are corrected by the same network: alignment from there loses more than it finds. No pixel is looked at:
whatever produces the tokens, an encoder or a stitched latent, drives it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from geometry.models.alignment import Template, align, averaged, equations, solved, warp

PASSES = 2
"""Times that the network corrects the flow, each time with a look at what its last correction left unexplained."""
SPANS = (2, 4)
"""Frames apart, beside neighbours, that displacements are found between; each is twice the one before."""
NOISE = 0.01
"""Mean squared difference of features that is expected of a perfect match."""


class Spans(NamedTuple):
    """Displacements from earlier to later frames that are no neighbours, along E edges: all of one span, then the next.

    In units and axes those of `Correspondence`.
    """

    source: Int[Tensor, " E"]
    target: Int[Tensor, " E"]
    flow: Float[Tensor, "B E h w 2"]
    spread: Float[Tensor, "B E h w"]
    information: Float[Tensor, "B E h w 2 2"]


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
    spans: Spans
    """Frames further apart."""


class Correlation(nn.Module):
    """Tokens of a clip -> correspondence of its frames."""

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
        """Flow in both directions between neighbours, ahead along `SPANS`; `T` = 1 has neither."""
        B, T = tokens.shape[:2]
        features = F.pixel_shuffle(self.to_pixels(tokens).movedim(-1, 2).flatten(0, 1), self.patch)
        features = features.unflatten(0, (B, T))
        context = self.to_context(tokens).movedim(-1, 2)
        first, second = _pairs(features), _pairs(context)
        flow, own, left, here = align(*first, self.patch, self.log_damping.exp())
        aligned, change = flow, torch.zeros_like(own)
        for _ in range(PASSES):
            close = equations(here, first[1], flow)
            loop = _carried(flow.unflatten(0, (-1, 2)).flip(1).flatten(0, 1), flow, self.patch)
            change = self.correct(self._evidence(second, flow, loop, own, left, close))
            flow = flow + change[:, :2]
        shape = (B, T - 1, 2)
        return Correspondence(
            flow.movedim(1, -1).unflatten(0, shape),
            aligned.movedim(1, -1).unflatten(0, shape),
            change[:, 2].unflatten(0, shape),
            _information(own, left).unflatten(0, shape),
            features,
            self._spans(features, context, flow.unflatten(0, shape), here),
        )

    def _spans(
        self, features: Float[Tensor, "B T C H W"], context: Float[Tensor, "B T c h w"], near: Tensor, here: Template
    ) -> Spans:
        """`near`: flow of neighbours `[B pairs 2 2 h w]`; `here`: the templates that it is of."""
        B, T = features.shape[:2]
        h, w = context.shape[-2:]
        sources, targets, flows, spreads, informations = [], [], [near[:, :0, 0]], [], []
        ahead, back = near[:, :, 0], near[:, :, 1]
        for span in (span for span in SPANS if span < T):
            n, half = T - span, span // 2
            ahead, back = (
                _chained(ahead[:, :n], ahead[:, half:], self.patch),
                _chained(back[:, half:], back[:, :n], self.patch),
            )
            start = ahead.flatten(0, 1)
            first = [x.unflatten(0, (B, T - 1, 2))[:, :n, 0].flatten(0, 1) for x in here[:4]]
            mine = Template(first[0], first[1], first[2], first[3], here.cells)
            close = equations(mine, features[:, span:].flatten(0, 1), start)
            own, left = close[:, :3], averaged(close, 3)[:, 5]
            loop = _carried(back.flatten(0, 1), start, self.patch)
            pair = context[:, :n].flatten(0, 1), context[:, span:].flatten(0, 1)
            change = self.correct(self._evidence(pair, start, loop, own, left, close)).unflatten(0, (B, n))
            ahead = ahead + change[:, :, :2]
            index = torch.arange(n, device=features.device)
            sources.append(index)
            targets.append(index + span)
            flows.append(ahead)
            spreads.append(change[:, :, 2])
            informations.append(_information(own, left).unflatten(0, (B, n)))
        none = torch.zeros(0, dtype=torch.long, device=features.device)
        empty = near.new_zeros(B, 0, h, w)
        return Spans(
            torch.cat([none, *sources]),
            torch.cat([none, *targets]),
            torch.cat(flows, dim=1).movedim(2, -1),
            torch.cat([empty, *spreads], dim=1),
            torch.cat([empty[..., None, None].expand(-1, -1, -1, -1, 2, 2), *informations], dim=1),
        )

    def _evidence(
        self, context: tuple[Tensor, Tensor], flow: Tensor, loop: Tensor, own: Tensor, left: Tensor, close: Tensor
    ) -> Float[Tensor, "P _ h w"]:
        """What speaks for and against a flow, for each token. `loop`: the flow back, where it leads."""
        here, (there, _) = context[0], warp(context[1], flow / self.patch)
        xx, xy, yy = own.unbind(1)
        sharp = torch.stack([xx, yy, xx * yy - xy * xy], dim=1).clamp(min=1e-6).log() / 4
        close = averaged(close, 1)
        step = solved(close, self.log_damping[-1].exp())
        remains = torch.stack([left, close[:, 5]], dim=1).clamp(min=1e-6).log() / 4
        return torch.cat([flow / 4, (flow + loop).clamp(-4, 4) / 2, sharp, remains, step, here, there - here], dim=1)


def _information(own: Float[Tensor, "P 3 h w"], left: Float[Tensor, "P h w"]) -> Float[Tensor, "P h w 2 2"]:
    xx, xy, yy = own.unbind(1)
    return (torch.stack([xx, xy, xy, yy], dim=-1) / (left[..., None] + NOISE)).unflatten(-1, (2, 2))


def _chained(flow: Float[Tensor, "B n 2 h w"], then: Float[Tensor, "B n 2 h w"], patch: int) -> Tensor:
    """One displacement after the other."""
    there = _carried(then.flatten(0, 1), flow.flatten(0, 1), patch)
    return flow + there.view(flow.shape)


def _carried(x: Float[Tensor, "P 2 h w"], flow: Float[Tensor, "P 2 h w"], patch: int) -> Float[Tensor, "P 2 h w"]:
    """`x` where the flow leads."""
    return warp(x, flow / patch)[0]


def _pairs(x: Float[Tensor, "B T C H W"]) -> tuple[Tensor, Tensor]:
    """Frames (i, i+1) and (i+1, i) next to each other: two tensors `[B * (T-1) * 2, C, H, W]`."""
    ahead = torch.stack([x[:, :-1], x[:, 1:]], dim=2)
    return ahead.flatten(0, 2), ahead.flip(2).flatten(0, 2)
