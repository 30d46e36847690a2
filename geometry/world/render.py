"""A batch of shots to video, depth and instance ids, antialiased where surfaces meet."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from geometry.world.cast import Hit, Ray, cast, rays
from geometry.world.shade import shade
from geometry.world.shot import Shot

RAYS_PER_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 25}
"""Rays cast at a time: what fits the caches of a CPU, or fills a GPU."""


def render(
    shot: Shot, size: tuple[int, int], supersample: int = 1, shift: Float[Tensor, "B T H W 2"] | None = None
) -> tuple[Float[Tensor, "B T 3 H W"], Hit]:
    """Video in [0, 1], and what each pixel centre sees.

    Args:
        shot: what to render.
        size: (H, W).
        supersample: rays per pixel side where a pixel sees more than one surface; textures are far coarser than pixels.
        shift: look, at each pixel, that many pixels further right and down: a world seen through warped glass.
    """
    num_rays = math.prod(size) * shot.camera.shape[1] * supersample**2
    chunk = max(1, RAYS_PER_CHUNK.get(shot.camera.device.type, 1 << 25) // num_rays)
    pieces = []
    for start in range(0, len(shot.camera), chunk):
        part = shot.map(lambda x, start=start: x[start : start + chunk])  # type: ignore[misc]
        pieces.append(_render_chunk(part, size, supersample, None if shift is None else shift[start : start + chunk]))
    video, depth, instance = (torch.cat(x) for x in zip(*pieces, strict=True))
    return video, Hit(depth, instance)


def _render_chunk(
    shot: Shot, size: tuple[int, int], supersample: int, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    B, T = shot.camera.shape[:2]
    camera = shot.camera[:, :, None, None]
    frame = torch.arange(B * T, device=camera.device).view(B, T, 1, 1)
    x, y = rays(shot, size, shift)
    hit = cast(shot, x, y)
    color, surface = shade(shot, frame, Ray(camera, x, y), hit.depth, hit.instance)
    video = torch.stack(color, dim=2)
    if supersample > 1:
        if shift is not None:
            shift = shift.repeat_interleave(supersample, 2).repeat_interleave(supersample, 3)
        x, y = rays(shot, (size[0] * supersample, size[1] * supersample), shift, supersample)
        fine = cast(shot, x, y)
        edge = _meets_another(surface)
        for i in range(supersample):
            for j in range(supersample):
                edge |= fine.instance[..., i::supersample, j::supersample] != hit.instance
        b, t, row, column = (k[:, None] for k in edge.nonzero(as_tuple=True))
        inside = torch.arange(supersample**2, device=edge.device)
        line, place = row * supersample + inside // supersample, column * supersample + inside % supersample
        ray = Ray(shot.camera[b, t], *(z.expand_as(fine.depth)[b, t, line, place] for z in (x, y)))
        depth, instance = (z[b, t, line, place] for z in fine)
        color, _ = shade(shot, (b * T + t).expand_as(depth), ray, depth, instance)
        video.movedim(2, -1)[edge] = torch.stack([c.mean(-1) for c in color], dim=-1)
    return video, hit.depth, hit.instance


def _meets_another(surface: Int[Tensor, "B T H W"]) -> Bool[Tensor, "B T H W"]:
    """Pixels with another surface right beside, above or below them."""
    edge = torch.zeros_like(surface, dtype=torch.bool)
    across, down = surface[..., 1:] != surface[..., :-1], surface[..., 1:, :] != surface[..., :-1, :]
    edge[..., 1:] |= across
    edge[..., :-1] |= across
    edge[..., 1:, :] |= down
    edge[..., :-1, :] |= down
    return edge
