"""What one frame's points look like from another: motion masks, the fused cloud of a clip, depth compared across views.

The cloud is never held against all views at once: each view is z-buffered in turn without a graph, which keeps memory
at a few copies of the cloud, and only the points that win a pixel (at most one a pixel) are projected again with one.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from geometry.cameras import inverse, project
from geometry.types import Geometry

EDGE = 1.1
"""Four neighbouring pixels whose depths differ by more than this factor lie across an edge, not on one surface."""
MINIMUM_SHARE = 1e-3
"""A pixel centre with a smaller bilinear share in a place is not asked for its depth there."""
NEAR = 1e-6
"""z-depth (scene units) at or below which a point is behind the camera."""


def dynamic_mask(scene: Geometry, threshold: float | Float[Tensor, "*batch"]) -> Bool[Tensor, "*batch T H W"]:
    """Pixels whose point moves by itself: scene flow longer than `threshold` (scene units; one for all, or one a clip).

    `flow_grid` "frame": the flow of the pixel itself, to the next frame. "first": a point of frame 0 is dynamic if it
    is ever displaced by more than the threshold; in frame i it marks the pixel where it has come to, and its neighbours
    (frame 0's grid is coarser than what an approaching body covers), unless something stands well before it.
    Without scene flow nothing is dynamic.
    """
    if scene.scene_flow is None:
        return torch.zeros_like(scene.depth, dtype=torch.bool)
    limit = torch.as_tensor(threshold, dtype=scene.depth.dtype, device=scene.depth.device)
    moved = scene.scene_flow.norm(dim=-1) > limit[..., None, None, None]
    if scene.flow_grid == "frame":
        return moved
    ever = moved.any(dim=-3, keepdim=True)
    at, depth = project(scene.points[..., :1, :, :, :] + scene.scene_flow, scene.intrinsics, scene.c2w)
    pixel, inside = _pixel(at, scene.depth.shape[-2], scene.depth.shape[-1])
    flat = scene.depth.flatten(-2)
    seen = depth.flatten(-2) < EDGE * flat.gather(-1, pixel.flatten(-2))
    marks = (inside & ever & (depth > NEAR)).flatten(-2) & seen
    splat = torch.zeros_like(flat).scatter_reduce(-1, pixel.flatten(-2), marks.to(flat.dtype), "amax")
    grown = F.max_pool2d(splat.view(-1, 1, *scene.depth.shape[-2:]), 3, stride=1, padding=1).view(scene.depth.shape) > 0
    return torch.cat([ever, grown[..., 1:, :, :]], dim=-3)


class View(NamedTuple):
    """The fused cloud of a clip rendered into each of its frames, beside the frame's own depth; NaN-free."""

    rendered: Float[Tensor, "*batch T H W"]
    """z-depth of the nearest point of the cloud that falls into the pixel."""
    observed: Float[Tensor, "*batch T H W"]
    """The frame's own depth at that very place."""
    both: Bool[Tensor, "*batch T H W"]
    """Both are known: Omega of the paper. Elsewhere the two are placeholders."""


def render_cloud(scene: Geometry, usable: Bool[Tensor, "*batch T H W"], *, exclude_self: bool, subpixel: bool) -> View:
    """Render the points of all frames (or of all *other* frames) into each frame with a z-buffer.

    Args:
        scene: finite values only.
        usable: which pixels give points to the cloud and may be compared with it.
        exclude_self: a frame's own points always agree with its own depth; leave them out.
        subpixel: compare where the point falls, not at the pixel's centre: the frame's depth is interpolated there
            (bilinear in 1/depth, which is exact on planes), and places across an edge are left out. Otherwise the
            centre's depth is used as it is, and a slanted surface differs from itself by up to half a pixel.
    """
    *batch, T, H, W = scene.depth.shape
    cloud, mask = scene.points.reshape(-1, T * H * W, 3), usable.reshape(-1, T * H * W)
    c2w, intrinsics = scene.c2w.reshape(-1, T, 4, 4), scene.intrinsics.reshape(-1, T, 3, 3)
    depth, allowed = scene.depth.reshape(-1, T, H * W), usable.reshape(-1, T, H * W)
    winner = _nearest(cloud.detach(), mask, c2w.detach(), intrinsics.detach(), (H, W), exclude_self)
    hit = winner >= 0
    chosen = cloud.gather(1, winner.clamp(min=0).flatten(1)[..., None].expand(-1, -1, 3)).unflatten(1, (T, H * W))
    at, rendered = project(chosen, intrinsics, c2w)
    if subpixel:
        observed, known = _interpolate(depth, allowed, at, (H, W))
    else:
        observed, known = depth, allowed
    both = hit & known
    one = torch.ones_like(observed)  # a placeholder without NaN or gradient
    return View(*(x.reshape(*batch, T, H, W) for x in (rendered.where(both, one), observed.where(both, one), both)))


class Succession(NamedTuple):
    """The points of each frame but the last, and what the next frame sees where they come to be; NaN-free."""

    expected: Float[Tensor, "*batch pairs H W"]
    """z-depth of the point, displaced by its own scene flow, in the next camera."""
    observed: Float[Tensor, "*batch pairs H W"]
    """What the next frame sees at that very place."""
    flow: Float[Tensor, "*batch pairs H W 3"]
    """Scene flow of the next frame there; zero without a flow of every frame."""
    both: Bool[Tensor, "*batch pairs H W"]
    """Both are known, on one surface, and in front of the camera. Elsewhere the others are placeholders."""


def succeed(scene: Geometry, usable: Bool[Tensor, "*batch T H W"]) -> Succession:
    """Follow the points of every frame into the next one: by their scene flow if `flow_grid` is "frame", else at rest.

    Args:
        scene: finite values only; T >= 2.
        usable: pixels that are followed, and that may be compared with.
    """
    *batch, T, H, W = scene.depth.shape
    scene = scene.map(lambda x: x.reshape(-1, *x.shape[len(batch) :]))
    usable = usable.reshape(-1, T, H, W)
    flow = scene.scene_flow if scene.scene_flow is not None and scene.flow_grid == "frame" else None
    there = scene.points[:, :-1] if flow is None else (scene.points + flow)[:, :-1]
    at, expected = project(there, scene.intrinsics[:, 1:], scene.c2w[:, 1:])
    ahead = expected > NEAR
    at = at.where(ahead[..., None], torch.full_like(at, -1.0))
    depth, allowed = scene.depth[:, 1:].flatten(2), usable[:, 1:].flatten(2)
    observed, known = _interpolate(depth, allowed, at.flatten(2, 3), (H, W))
    both = (known.view(-1, T - 1, H, W) & usable[:, :-1] & ahead).reshape(*batch, T - 1, H, W)
    next_flow = torch.zeros_like(there)
    if flow is not None:
        place = 2 * at.flatten(0, 1) / at.new_tensor([W, H]) - 1  # pixel centres at +0.5, as without align_corners
        sampled = F.grid_sample(flow[:, 1:].flatten(0, 1).movedim(-1, 1), place, align_corners=False)
        next_flow = sampled.movedim(1, -1).view(there.shape)
    one, zero = torch.ones_like(expected), torch.zeros_like(there)
    flat = both.view(-1, T - 1, H, W)
    return Succession(
        expected.where(flat, one).view(both.shape),
        observed.view(expected.shape).where(flat, one).view(both.shape),
        next_flow.where(flat[..., None], zero).view(*both.shape, 3),
        both,
    )


@torch.no_grad()
def _nearest(
    cloud: Float[Tensor, "B N 3"],
    usable: Bool[Tensor, "B N"],
    c2w: Float[Tensor, "B T 4 4"],
    intrinsics: Float[Tensor, "B T 3 3"],
    size: tuple[int, int],
    exclude_self: bool,
) -> Int[Tensor, "B T pixels"]:
    """Which point of the cloud is nearest in each pixel of each frame; -1 where none falls."""
    height, width = size
    pixels = height * width
    # depth and index in one integer: positive floats sort like their bits, so amin finds the nearest point *and* which.
    number = torch.arange(cloud.shape[1], device=cloud.device)
    nobody = torch.iinfo(torch.int64).max
    x, y, z = cloud.float().unbind(-1)
    views = (intrinsics @ inverse(c2w)[..., :3, :]).float()
    winners = []
    for t in range(c2w.shape[1]):
        row = views[:, t, :, :, None]
        u, v, w = (row[:, k, 0] * x + row[:, k, 1] * y + (row[:, k, 2] * z + row[:, k, 3]) for k in range(3))
        inside = usable & (w > NEAR)
        if exclude_self:
            inside[:, t * pixels : (t + 1) * pixels] = False
        w = torch.where(inside, w, torch.inf)
        # A border of one pixel takes what falls outside; points behind the camera (w infinite) fall on pixel 0, last.
        column, line = (u / w).floor_().clamp_(-1, width), (v / w).floor_().clamp_(-1, height)
        pixel = ((line + 1) * (width + 2) + (column + 1)).to(torch.int64)
        key = (w.view(torch.int32).to(torch.int64) << 32) | number
        best = torch.full((len(cloud), (height + 2) * (width + 2)), nobody, device=cloud.device)
        best.scatter_reduce_(1, pixel, key, "amin")
        best = best.view(-1, height + 2, width + 2)[:, 1:-1, 1:-1].flatten(1)
        empty = (best >> 32) >= _INFINITY_BITS
        winners.append(torch.where(empty, -1, best & 0xFFFFFFFF))
    return torch.stack(winners, dim=1)


_INFINITY_BITS = int(torch.tensor(torch.inf).view(torch.int32))


def _interpolate(
    depth: Float[Tensor, "B T P"], allowed: Bool[Tensor, "B T P"], at: Float[Tensor, "B T Q 2"], size: tuple[int, int]
) -> tuple[Float[Tensor, "B T Q"], Bool[Tensor, "B T Q"]]:
    """Depth between the four pixel centres around each place, and whether those are allowed and on one surface.

    A centre with next to no share in the place is not asked: a camera that moves along a row puts every point exactly
    on a line of centres, and rounding must not decide which of the two rows beside it has a say.
    """
    height, width = size
    corner = (at.detach() - 0.5).floor()
    u, v = (at - 0.5 - corner).unbind(-1)
    shares = torch.stack([(1 - u) * (1 - v), u * (1 - v), (1 - u) * v, u * v])
    asked = shares.detach() > MINIMUM_SHARE
    column = corner[..., 0] + corner.new_tensor([0, 1, 0, 1]).view(4, 1, 1, 1)
    line = corner[..., 1] + corner.new_tensor([0, 0, 1, 1]).view(4, 1, 1, 1)
    inside = (column >= 0) & (column < width) & (line >= 0) & (line < height)
    index = (line.clamp(0, height - 1) * width + column.clamp(0, width - 1)).to(torch.int64)
    near = depth.expand(4, *depth.shape).gather(-1, index)
    known = ((inside & allowed.expand(4, *allowed.shape).gather(-1, index)) | ~asked).all(0)
    low, high = (near.detach().where(asked, pad) for pad in (near.new_tensor(torch.inf), near.new_tensor(0.0)))
    known &= high.amax(0) < EDGE * low.amin(0)
    safe = near.where(known & asked, torch.ones_like(near))
    shares = shares.where(asked, torch.zeros_like(shares))
    return shares.sum(0) / (shares / safe).sum(0), known


def _pixel(at: Float[Tensor, "... 2"], height: int, width: int) -> tuple[Int[Tensor, "..."], Bool[Tensor, "..."]]:
    """Index of the pixel that holds each place (0 if none does), and whether it is inside the image."""
    column, line = at.floor().unbind(-1)
    inside = (column >= 0) & (column < width) & (line >= 0) & (line < height)
    return torch.where(inside, line * width + column, 0).to(torch.int64), inside
