"""Cameras and depth of a clip from its features themselves: direct bundle adjustment, starting where displacements led.

A displacement that was found for a token alone is a guess wherever its features leave it open: damping draws it to no
motion at all, neighbours across an edge draw it to theirs, and cameras that are solved from such guesses move too
slowly. Here nothing is guessed. The cameras and the depth say where each token is seen; Lucas and Kanade's equations
*there* say how well features agree and in which direction they would agree more; and the next cameras and depths are
those that agree best. What features do not tell has no say. (Engel, Koltun & Cremers, Direct Sparse Odometry, 2016, is
this on pixels.)

    cameras    Gauss-Newton of `path.py`, with the token's own normal equations as information
    depth      of each token alone, given the cameras; the network's is the prior
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from geometry.cameras import inverse, pixel_grid
from geometry.models.alignment import Template, averaged, equations, shrunk, solved, template
from geometry.models.correlation import NOISE
from geometry.models.sightings import Edges, clip_cameras, lens
from geometry.models.solver import NEAR

ROUNDS = (2, 2, 4)
"""Places per side of a token that features are looked at on, round by round: what is wrong by more than a pixel needs
more than one, and the first need not be sharp."""
BLUR = 3
"""Times that a token's mean squared difference is averaged with that of its neighbours, as where flow is found."""
LONGEST = 6.0
"""Pixels that the cameras are asked to move a token by, at most, in one round."""
SHARE = 0.5
"""Power of a token's say here. It was learnt for displacements, of which few are to be trusted; here it is known what
features do not tell, and cameras that listen to more tokens are less too slow (launch/LOG.md)."""
SPREAD = 0.3
"""Standard deviation of the network's log-depth, before anything is seen of parallax."""
DEEPEST = 0.3
"""Change of log-depth in one round, at most."""


def adjust(
    features: Float[Tensor, "B T C H W"],
    seen: Edges,
    log_depth: Float[Tensor, "B T h w"],
    intrinsics: Float[Tensor, "B T 3 3"],
    start: Float[Tensor, "B T 4 4"],
    trust: Float[Tensor, ""],
) -> tuple[Float[Tensor, "B T 4 4"], Float[Tensor, "B T h w"]]:
    """Cameras `c2w` and log-depth of the tokens; only the last round carries gradients, as in `path.py`.

    Args:
        seen: pairs of frames and each token's say; displacements are not looked at.
        log_depth: the network's, which is the prior.
        start: cameras to start from, within a pixel or two; they carry no gradient.
        trust: log of how much features are worth beside that prior.
    """
    if not len(seen.source):
        return start, log_depth
    patch = features.shape[-1] // log_depth.shape[-1]
    seen = seen._replace(say=seen.say**SHARE)
    frames = {cells: pictures(features, patch, min(cells, patch)) for cells in set(ROUNDS)}
    c2w, depth = start, log_depth
    for turn, cells in enumerate(ROUNDS, start=1):
        with torch.set_grad_enabled(torch.is_grad_enabled() and turn == len(ROUNDS)):
            depth = log_depth + (depth - log_depth).detach()
            at = placed(c2w.detach(), depth.detach(), intrinsics, seen, patch)[0]
            asked, push = matched(frames[cells], seen, at, patch)
            c2w = clip_cameras(asked, depth, intrinsics, patch, c2w.detach())
            moved, slope = placed(c2w.detach(), depth.detach(), intrinsics, seen, patch)
            push = push + (asked.information @ (moved - at)[..., None])[..., 0]
            depth = depth + _deeper(depth - log_depth, asked, push, slope, trust)
    return c2w, depth


def _deeper(
    change: Float[Tensor, "B T h w"],
    asked: Edges,
    push: Float[Tensor, "B E h w 2"],
    slope: Float[Tensor, "B E h w 2"],
    trust: Float[Tensor, ""],
) -> Float[Tensor, "B T h w"]:
    """A step of Gauss-Newton on every token's log-depth, which is `change` away from the prior by now."""
    bend = (slope * (asked.information @ slope[..., None])[..., 0]).sum(-1)
    worth = trust.exp() * asked.say / asked.say.flatten(1).mean(1)[:, None, None, None]
    both = worth * torch.stack([(slope * push).sum(-1), bend])
    pull, curvature = _averaged(both.new_zeros(2, *change.shape).index_add(2, asked.source, both))
    step = -(pull + change / SPREAD**2) / (curvature + 1 / SPREAD**2)
    return step.clamp(-DEEPEST, DEEPEST)


def placed(
    c2w: Float[Tensor, "B T 4 4"],
    log_depth: Float[Tensor, "B T h w"],
    intrinsics: Float[Tensor, "B T 3 3"],
    seen: Edges,
    patch: int,
) -> tuple[Float[Tensor, "B E h w 2"], Float[Tensor, "B E h w 2"]]:
    """Displacement of each token that stands still, in pixels, and how it changes with the token's log-depth."""
    centres = patch * pixel_grid(log_depth.shape[2], log_depth.shape[3], log_depth)
    focal, middle = lens(intrinsics)
    rays = (centres - middle) / focal
    points = torch.cat([rays, torch.ones_like(rays[..., :1])], dim=-1) * log_depth.exp()[..., None]
    motion = inverse(c2w)[:, seen.target] @ c2w[:, seen.source]
    turned = points[:, seen.source] @ motion[:, :, None, :3, :3].mT
    there = turned + motion[:, :, None, None, :3, 3]
    z = torch.maximum(there[..., 2:], NEAR * points[:, seen.source][..., 2:])
    on, out = there[..., :2] / z, focal[:, seen.target]
    flow = out * on + middle[:, seen.target] - centres
    return flow, out * (turned[..., :2] - on * turned[..., 2:]) / z


def pictures(features: Float[Tensor, "B T C H W"], patch: int, cells: int) -> Template:
    """Every frame, ready to be compared, on `cells` places per side of a token; tensors are `[T, B, ...]`."""
    T = features.shape[1]
    here = template(shrunk(features.transpose(0, 1).flatten(0, 1), patch, cells), cells)
    first = [x.unflatten(0, (T, -1)) for x in here[:4]]
    return Template(first[0], first[1], first[2], first[3], cells)


def matched(
    frames: Template, seen: Edges, at: Float[Tensor, "B E h w 2"], patch: int
) -> tuple[Edges, Float[Tensor, "B E h w 2"]]:
    """Where features ask the tokens to be, if they were looked for at `at`; and half the slope of their difference."""
    place = frames.cells / patch  # of a pixel
    flow = place * at.movedim(-1, 2).transpose(0, 1)
    parts = []
    for edge, i, j, n in _runs(seen):
        first = [x[i : i + n].flatten(0, 1) for x in frames[:4]]  # no copies: a run is a piece of each tensor
        here = Template(first[0], first[1], first[2], first[3], frames.cells)
        parts.append(equations(here, frames.features[j : j + n].flatten(0, 1), flow[edge : edge + n].flatten(0, 1)))
    close = torch.cat(parts)
    damping = 1e-3 * (close[:, 0] + close[:, 2]) + 1e-6
    step = solved(close, damping, LONGEST * place) / place
    noise = averaged(close, BLUR)[:, 5:6] + NOISE
    units = close.new_tensor([place**2, place**2, place**2, place, place])[:, None, None]
    found = torch.cat([units * close[:, :5] / noise, step], dim=1)
    xx, xy, yy, right, down, *shift = found.unflatten(0, (len(seen.source), -1)).transpose(0, 1).unbind(2)
    information = torch.stack([xx, xy, xy, yy], dim=-1).unflatten(-1, (2, 2))
    asked = seen._replace(flow=at + torch.stack(shift, dim=-1), information=information)
    return asked, torch.stack([right, down], dim=-1)


def _runs(seen: Edges) -> list[tuple[int, int, int, int]]:
    """Edges whose frames follow each other, as (first edge, its source, its target, how many)."""
    found: list[tuple[int, int, int, int]] = []
    for edge, (i, j) in enumerate(zip(seen.source.tolist(), seen.target.tolist(), strict=True)):
        if found and (i, j) == (found[-1][1] + found[-1][3], found[-1][2] + found[-1][3]):
            found[-1] = (*found[-1][:3], found[-1][3] + 1)
        else:
            found.append((edge, i, j, 1))
    return found


def _averaged(x: Float[Tensor, "two B T h w"]) -> Float[Tensor, "two B T h w"]:
    """Over the eight neighbours: one token's parallax is its neighbours'."""
    pooled = F.avg_pool2d(x.flatten(0, 1), 3, stride=1, padding=1, count_include_pad=False)
    return pooled.view(x.shape)
