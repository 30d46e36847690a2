"""From what the referee's network says of a clip to its cameras, and what these leave unexplained."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from geometry.cameras import pixel_grid
from geometry.models.bundle import Witnesses, bundle, unexplained
from geometry.models.referee_flow import CELL, Tracks

PRIOR = 10.0
"""Weight of the network's depth in the adjustment, over what its doubt says: errors of neighbouring displacements are
not independent, which the sum over them takes them to be."""


class Impression(NamedTuple):
    """What the network says of a clip, before or after it knows the cameras."""

    log_depth: Float[Tensor, "B T H W"]
    log_doubt: Float[Tensor, "B T H W"]
    """Log of the error of `log_depth` that it expects (Laplace)."""
    dynamic: Float[Tensor, "B T H W"]
    """Logit that the point moves by itself."""
    witness: Float[Tensor, "B E h w"]
    """Log of the error of each displacement as a witness of the camera, in units of its own sharpness."""


class Cameras(NamedTuple):
    """What an adjustment finds."""

    c2w: Float[Tensor, "B T 4 4"]
    log_depth: Float[Tensor, "B T h w"]
    slip: Float[Tensor, "B E h w 2"]
    """Displacement (pixels) that cameras and depth do not explain."""


def adjust(
    seen: Impression, tracks: Tracks, intrinsics: Float[Tensor, "B T 3 3"], start: Float[Tensor, "B T 4 4"] | None
) -> Cameras:
    """Cameras and depths of cells that explain the displacements, from the network's depth on."""
    with torch.no_grad():
        log_depth = F.avg_pool2d(seen.log_depth, CELL)
        prior = PRIOR * torch.exp(-2 * F.avg_pool2d(seen.log_doubt, CELL)).flatten(2)
        still = F.avg_pool2d(seen.dynamic, CELL).neg().sigmoid()[:, tracks.source]
        trusted = tracks.information * (still * torch.exp(-2 * seen.witness))[..., None, None]
        witnesses, scale = normalised(tracks._replace(information=trusted), intrinsics)
        c2w, adjusted = bundle(log_depth.flatten(2), prior, witnesses, start)
        grid = log_depth.shape[-2:]
        return Cameras(
            c2w, adjusted.unflatten(2, grid), unexplained(c2w, adjusted, witnesses).unflatten(2, grid) * scale
        )


def normalised(tracks: Tracks, intrinsics: Float[Tensor, "B T 3 3"]) -> tuple[Witnesses, Float[Tensor, "B E 1 1 2"]]:
    """Displacements in normalised image positions, and the target's focal lengths (pixels) that lead back."""
    h, w = tracks.flow.shape[2:4]
    centres = CELL * pixel_grid(h, w, tracks.flow)
    focal = torch.stack([intrinsics[..., 0, 0], intrinsics[..., 1, 1]], dim=-1)[:, :, None, None]
    middle = intrinsics[..., :2, 2][:, :, None, None]
    rays = ((centres - middle) / focal).flatten(2, 3)
    scale = focal[:, tracks.target]
    there = ((centres + tracks.flow - middle[:, tracks.target]) / scale).flatten(2, 3)
    information = (tracks.information * scale[..., None] * scale[..., None, :]).flatten(2, 3)
    return Witnesses(tracks.source, tracks.target, rays, there, information), scale


def sideways(cameras: Cameras, tracks: Tracks, intrinsics: Float[Tensor, "B T 3 3"]) -> Float[Tensor, "B T h w 3"]:
    """Slip to the next frame times depth, in world axes; the last frame goes on as it came."""
    T = intrinsics.shape[1]
    if T == 1:
        return cameras.log_depth.new_zeros(*cameras.log_depth.shape, 3)
    slip = torch.cat([cameras.slip[:, : T - 1], -cameras.slip[:, 2 * T - 3 : 2 * T - 2]], dim=1)
    focal = torch.stack([intrinsics[..., 0, 0], intrinsics[..., 1, 1]], dim=-1)[:, :, None, None]
    across = slip / focal * cameras.log_depth.exp()[..., None]
    return torch.einsum("btij,bthwj->bthwi", cameras.c2w[..., :3, :2], across)
