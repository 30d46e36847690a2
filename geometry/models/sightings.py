"""Which displacements the cameras are solved from, and how much each of them counts."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geometry.cameras import pixel_grid
from geometry.models.correlation import SPANS, Correspondence
from geometry.models.cues import rays
from geometry.models.path import Sightings, solve_path
from geometry.models.solver import solve_relative

DEPTH_GRADIENT = 0.2
"""Share of the cameras' gradient that reaches depth: cameras can always be improved by bending depth, at first."""
TRUST = 4.0
"""A token's say is exp of so many times what the network gives, times the probability of no motion."""


def pair_cameras(
    pair: Correspondence,
    log_depth: Float[Tensor, "B T h w"],
    weight: Float[Tensor, "B pairs 2 h w"],
    intrinsics: Float[Tensor, "B T 3 3"],
    patch: int,
) -> tuple[Float[Tensor, "B pairs 4 4"], Float[Tensor, "B pairs 2 4 4"]]:
    """Camera i+1 in camera i from neighbours alone, and the motions of points that each direction found."""
    depth = _depth(log_depth)
    both = torch.stack([depth[:, :-1], depth[:, 1:]], dim=2).flatten(3)
    source, there, _ = rays(pair, intrinsics, patch)
    return solve_relative(both, source, there, (pair.information * _say(weight)[..., None, None]).flatten(3, 4))


class Edges(NamedTuple):
    """What is known of the displacement of every token along E pairs of frames."""

    source: Int[Tensor, " E"]
    target: Int[Tensor, " E"]
    flow: Float[Tensor, "B E h w 2"]
    """Pixels, from the centre of each token."""
    information: Float[Tensor, "B E h w 2 2"]
    """How sharply features fix it, by direction."""
    say: Float[Tensor, "B E h w"]
    """How much the token counts as a witness of the cameras, >= 0."""


def edges(pair: Correspondence, weight: Float[Tensor, "B pairs 2 h w"], apart: Float[Tensor, " spans"]) -> Edges:
    """Neighbours, both ways, and frames further apart.

    Args:
        weight: what the network thinks of a token as a witness, to the next and to the previous frame. Further ahead
            it counts as to the next frame, less what correspondence doubts more there, plus `apart` of the span.
    """
    spans, near = pair.spans, torch.arange(pair.flow.shape[1], device=pair.flow.device)
    doubt = 2 * (spans.spread - pair.spread[:, spans.source, 0]) / TRUST
    span = (spans.target - spans.source)[:, None] == spans.source.new_tensor(SPANS)
    further = weight[:, spans.source, 0] - doubt + (span * apart).sum(1)[:, None, None]
    return Edges(
        torch.cat([near, near + 1, spans.source]),
        torch.cat([near + 1, near, spans.target]),
        torch.cat([pair.flow[:, :, 0], pair.flow[:, :, 1], spans.flow], dim=1),
        torch.cat([pair.information[:, :, 0], pair.information[:, :, 1], spans.information], dim=1),
        _say(torch.cat([weight[:, :, 0], weight[:, :, 1], further], dim=1)),
    )


def clip_cameras(
    seen: Edges,
    log_depth: Float[Tensor, "B T h w"],
    intrinsics: Float[Tensor, "B T 3 3"],
    patch: int,
    start: Float[Tensor, "B T 4 4"],
) -> Float[Tensor, "B T 4 4"]:
    """Cameras `c2w` of the clip that these displacements ask for, from `start` on."""
    centres = patch * pixel_grid(log_depth.shape[2], log_depth.shape[3], log_depth)
    focal, middle = lens(intrinsics)
    scale = focal[:, seen.target]
    sightings = Sightings(
        seen.source,
        seen.target,
        ((centres - middle) / focal).flatten(2, 3),
        ((centres + seen.flow - middle[:, seen.target]) / scale).flatten(2, 3),
        (seen.information * seen.say[..., None, None] * scale[..., None] * scale[..., None, :]).flatten(2, 3),
    )
    return solve_path(_depth(log_depth).flatten(2), sightings, start)


def lens(intrinsics: Float[Tensor, "B T 3 3"]) -> tuple[Float[Tensor, "B T 1 1 2"], Float[Tensor, "B T 1 1 2"]]:
    """Focal lengths and principal points, in pixels, to be broadcast over tokens."""
    focal = torch.stack([intrinsics[..., 0, 0], intrinsics[..., 1, 1]], dim=-1)
    return focal[:, :, None, None], intrinsics[..., :2, 2][:, :, None, None]


def _depth(log_depth: Tensor) -> Tensor:
    depth = log_depth.exp()
    return DEPTH_GRADIENT * depth + (1 - DEPTH_GRADIENT) * depth.detach()


def _say(weight: Tensor) -> Tensor:
    return (TRUST * weight).clamp(-8, 8).exp()
