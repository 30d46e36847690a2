"""Matches for the reward `epipolar`: where the cells of a decoded frame are seen in a later one.

They come from pixels, for the latent geometry model always agrees with itself: Lucas and Kanade's alignment
(`geometry/models/alignment.py`) of the colours, there and back. Nothing is learnt. Neighbouring latents, which need no
decoder, tell where things go to a third of a cell at best, and that ranks no fault (launch/LOG.md).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from geometry.cameras import pixel_grid
from geometry.models.alignment import align, warp
from geometry.reproject import dynamic_mask
from geometry.types import Geometry
from rewards import ESTIMATED_FLOW, Matches, epipolar
from rewards.base import median_depth, seen
from vggrpo.reward_config import EpipolarConfig
from vggrpo.trainer import OfBoth
from vggrpo.types import Rollout

CELL = 8
"""Pixels per side of a cell, once frames are scaled so that there are as many cells as asked for. Displacements of more
than one or two cells are not found."""
DAMPING = (1e-3, 1e-3, 1e-3)
"""Of the alignment's equations, level by level: what has no texture stays where its neighbours put it."""
LOOP = 1.0
"""Pixels, of those, between a cell and where the way there and back leads; further, and it was not found."""
STILL = 0.25
"""Pixels, of those, that a cell must go to have moved. Where less than half of a picture has, nothing is found: cameras
that are said to go straight on explain a frozen video without error, and a frozen video must not win."""


def epipolar_of(cfg: EpipolarConfig, decode: Callable[[Tensor], Tensor]) -> OfBoth:
    """`rewards.epipolar` of a scene [B K ...], with matches in its own video.

    Args:
        decode: z0 [B K *latent] -> video [B K T 3 H W] in [0, 1].
    """

    def reward(scene: Geometry, rollout: Rollout) -> Tensor:
        return epipolar(scene, match_video(decode(rollout.z0), scene, cfg))

    return OfBoth(reward)


@torch.no_grad()
def match_video(video: Float[Tensor, "*batch T 3 H W"], scene: Geometry, cfg: EpipolarConfig) -> Matches:
    """The cells of every `cfg.stride`-th frame, found so many frames later.

    Usable is what leads back to where it came from, in a picture that moves, where the scene sees something and its
    flow does not say that it moves by itself.

    Args:
        video: RGB in [0, 1].
        scene: of the same video: of all of its frames, or evenly of fewer.

    Raises:
        ValueError: a stride that the scene is too short for.
    """
    frames, (H, W) = scene.c2w.shape[-3], scene.depth.shape[-2:]
    if cfg.stride >= frames:
        raise ValueError(f"epipolar: stride must be less than the scene's {frames} frames, got {cfg.stride}")
    video = video[..., :: (video.shape[-4] - 1) // (frames - 1), :, :, :]
    first = torch.arange(0, frames - cfg.stride, cfg.stride, device=video.device)
    flow, found = displacements(video, first, first + cfg.stride, cfg.cells)
    h, w = found.shape[-2:]
    moves = found & (flow.norm(dim=-1) > STILL)
    found = found & (2 * moves.sum((-2, -1)) >= found.sum((-2, -1)))[..., None, None]
    here = CELL * pixel_grid(h, w, flow)
    at, there = (x * flow.new_tensor([W / w, H / h]) / CELL for x in (here, here + flow))
    rests = seen(scene) & ~dynamic_mask(scene, ESTIMATED_FLOW * median_depth(scene))
    column, row = at.long().unbind(-1)
    found = found & rests[..., first, :, :][..., row, column]
    at = at.expand(there.shape)
    return Matches(first, first + cfg.stride, at.flatten(-3, -2), there.flatten(-3, -2), found.flatten(-2))


def displacements(
    video: Float[Tensor, "*batch T 3 H W"], first: Tensor, second: Tensor, cells: int
) -> tuple[Float[Tensor, "*batch P h w 2"], Bool[Tensor, "*batch P h w"]]:
    """Where the cells of frames `first [P]` go in frames `second [P]`, and whether they were found: inside the picture,
    and led back. There are `cells` along the shorter side, of `CELL` pixels each, which the displacements are in."""
    *batch, T, _, H, W = video.shape
    h, w = (round(cells * side / min(H, W)) for side in (H, W))
    small = F.interpolate(video.flatten(0, -4).float(), (CELL * h, CELL * w), mode="bilinear", antialias=True)
    small = small.unflatten(0, (-1, T))
    here, there = (small[:, frames].flatten(0, 1) for frames in (first, second))
    both = align(torch.cat([here, there]), torch.cat([there, here]), CELL, small.new_tensor(DAMPING))[0]
    flow, back = both.chunk(2)
    returned, inside = warp(back, flow / CELL)
    found = ((flow + returned).norm(dim=1) <= LOOP) & (inside[:, 0] > 0)
    shape = (*batch, len(first))
    return flow.movedim(1, -1).reshape(*shape, h, w, 2), found.reshape(*shape, h, w)
