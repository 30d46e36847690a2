"""What the lens, correspondence and the first camera motion say, as inputs for the blocks that follow."""

import torch
from jaxtyping import Float
from torch import Tensor

from geometry.cameras import inverse, pixel_grid
from geometry.models.correlation import Correspondence
from geometry.models.solver import NEAR, triangulate

MOTION_CUES = 9
SOLVED_CUES = 12


def rays(pair: Correspondence, intrinsics: Tensor, patch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised positions of the tokens `[B pairs N 2]`, of what they correspond to `[B pairs 2 N 2]`, and focal."""
    h, w = pair.flow.shape[3:5]
    centres = patch * pixel_grid(h, w, pair.flow)
    focal = torch.stack([intrinsics[:, :, 0, 0], intrinsics[:, :, 1, 1]], dim=-1)
    middle = intrinsics[:, :, :2, 2]
    here = (centres - middle[:, :-1, None, None]) / focal[:, :-1, None, None]
    # A clip has one lens: the second frame of a pair is taken to have the intrinsics of the first.
    there = (centres + pair.flow - middle[:, :-1, None, None, None]) / focal[:, :-1, None, None, None]
    return here.flatten(2, 3), there.flatten(3, 4), focal[:, :-1, 0]


def motion_cues(pair: Correspondence) -> Float[Tensor, "B T 9 h w"]:
    """Flow to the next and the previous frame and its expected error, zero at the ends; 1; and the place in the image.

    The place is worth a channel of its own: in a world with a floor it says more of depth than all else at first.
    """
    flow = torch.cat([pair.flow.movedim(-1, 3) / 4, pair.spread[:, :, :, None]], dim=3).detach()
    nothing = flow.new_zeros(len(flow), 1, *flow.shape[3:])  # not a slice: a clip of one frame has no pairs
    ahead, back = torch.cat([flow[:, :, 0], nothing], 1), torch.cat([nothing, flow[:, :, 1]], 1)
    h, w = flow.shape[4:]
    place = 2 * pixel_grid(h, w, flow).movedim(-1, 0) / flow.new_tensor([w, h])[:, None, None] - 1
    place = place.expand(*ahead.shape[:2], 2, h, w)
    return torch.cat([ahead, back, torch.ones_like(ahead[:, :, :1]), place], dim=2)


def solved_cues(
    pair: Correspondence, solved: Float[Tensor, "B pairs 2 4 4"], log_depth: Tensor, intrinsics: Tensor, patch: int
) -> Float[Tensor, "B T 12 h w"]:
    """What the first poses say of each token, to the next and the previous frame (zero at the ends).

    Triangulated log-depth less the coarse one (damped where parallax is small), parallax, epipolar residual in pixels,
    whether that can be trusted, and the displacement (pixels / 4) that motion and coarse depth do not explain.
    """
    here, there, focal = rays(pair, intrinsics, patch)
    source = here[:, :, None].expand_as(there)
    nearness, parallax, off = triangulate(solved, source, there)
    pixels = focal[..., None, None]
    depth = torch.stack([log_depth[:, :-1], log_depth[:, 1:]], dim=2).flatten(3)
    prior = torch.exp(-depth)
    trust = parallax.square() / (parallax.square() + (0.3 / pixels).square())
    ratio = torch.log(((nearness * trust + prior * (1 - trust)) / prior).clamp(0.1, 10))
    slip = (pixels[..., None] / 4 * unexplained(solved, source, there, depth.exp())[0]).clamp(-4, 4).movedim(-1, 3)
    maps = torch.stack([ratio, parallax * pixels / 4, (off * pixels / 2).clamp(max=4), trust], dim=3)
    maps = torch.cat([maps, slip], dim=3)
    maps = maps.unflatten(-1, pair.flow.shape[3:5])
    nothing = maps.new_zeros(len(maps), 1, *maps.shape[3:])
    return torch.cat([torch.cat([maps[:, :, 0], nothing], 1), torch.cat([nothing, maps[:, :, 1]], 1)], dim=2)


def unexplained(
    motion: Float[Tensor, "*batch 4 4"],
    source: Float[Tensor, "*batch N 2"],
    target: Float[Tensor, "*batch N 2"],
    depth: Float[Tensor, "*batch N"],
) -> tuple[Float[Tensor, "*batch N 2"], Float[Tensor, "*batch N"]]:
    """How far points of this depth are seen from where the motion brings them, and their depth there."""
    points = torch.cat([source, torch.ones_like(source[..., :1])], dim=-1) * depth[..., None]
    moved = points @ motion[..., :3, :3].mT + motion[..., None, :3, 3]
    z = torch.maximum(moved[..., 2], NEAR * depth)
    return target - moved[..., :2] / z[..., None], z


def sideways(
    pair: Correspondence, relative: Float[Tensor, "B pairs 4 4"], log_depth: Tensor, intrinsics: Tensor, patch: int
) -> Float[Tensor, "B T 3 h w"]:
    """Motion of each token's point to the next frame, in the axes of its own camera, across the line of sight only.

    It is the displacement that the cameras do not explain, times depth; the last frame goes on as it came.
    """
    here, there, _ = rays(pair, intrinsics, patch)
    depth = torch.stack([log_depth[:, :-1], log_depth[:, 1:]], dim=2).flatten(3).exp()
    motion = torch.stack([inverse(relative), relative], dim=2)
    slip, z = unexplained(motion, here[:, :, None].expand_as(there), there, depth)
    moved = torch.cat([slip * z[..., None], torch.zeros_like(z)[..., None]], dim=-1) @ motion[..., :3, :3]
    last = -moved[:, -1:, 1] if len(moved[0]) else moved.new_zeros(len(log_depth), 1, *moved.shape[3:])
    return torch.cat([moved[:, :, 0], last], dim=1).mT.unflatten(-1, log_depth.shape[2:])


def focal_code(intrinsics: Float[Tensor, "B T 3 3"], width: int) -> Float[Tensor, "B T 2"]:
    log_focal = torch.log(intrinsics[..., 0, 0] / width)
    return torch.stack([torch.ones_like(log_focal), log_focal], dim=-1)


def pinhole_of(log_focal: Float[Tensor, " B"], height: int, width: int) -> Float[Tensor, "B 3 3"]:
    focal, one = width * log_focal.exp(), torch.ones_like(log_focal)
    zero = torch.zeros_like(one)
    rows = [focal, zero, one * width / 2, zero, focal, one * height / 2, zero, zero, one]
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))
