"""What the geometry model is taught from: clips of the world with their exact truth, in the units of its outputs."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from geometry.cameras import anchored, inverse, pixel_grid, project, transform
from geometry.world import Clip


@dataclass(frozen=True)
class Lesson:
    """A batch of clips and their truth, small enough that thousands fit into memory; lengths in scene units."""

    video: UInt8[Tensor, "B T 3 H W"]
    c2w: Float[Tensor, "B T 4 4"]
    intrinsics: Float[Tensor, "B T 3 3"]
    depth: Float[Tensor, "B T H W"]
    valid: Bool[Tensor, "B T H W"]
    dynamic: Bool[Tensor, "B T H W"]
    motion: Float[Tensor, "B T H W 3"]
    """Scene flow in the axes of the frame's own camera."""
    flow: Float[Tensor, "B T 2 h w 2"]
    """Optical flow (pixels) averaged over each token: [:, i, 0] is i -> i+1, [:, i, 1] is i+1 -> i; the last unused."""

    def __len__(self) -> int:
        return len(self.video)

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Lesson":
        """The same lesson with `fn` applied to every tensor."""
        return Lesson(**{f.name: fn(getattr(self, f.name)) for f in fields(self)})

    def window(self, start: int, frames: int) -> "Lesson":
        """`frames` frames from `start` on, seen from the first of them."""
        cut = self.map(lambda x: x[:, start : start + frames])
        return replace(cut, c2w=anchored(cut.c2w))


def lesson(clip: Clip, patch: int) -> Lesson:
    """The truth of a batch of clips for a network with one token per `patch` x `patch` pixels."""
    scene, shot = clip.geometry, clip.shot
    assert scene.scene_flow is not None, "clips of the world have it"
    assert scene.valid is not None, "and this"
    moving = scene.scene_flow.norm(dim=-1) > 0
    between = torch.stack([_ahead(clip), _back(clip)], dim=2).flatten(0, 2)
    tokens = F.avg_pool2d(between.movedim(-1, 1), patch).movedim(1, -1)
    tokens = tokens.unflatten(0, (len(shot.c2w), -1, 2))
    last = torch.zeros_like(tokens[:, :1])
    return Lesson(
        (255 * clip.video).round().to(torch.uint8),
        scene.c2w,
        scene.intrinsics,
        scene.depth.half(),
        scene.valid,
        moving,
        torch.einsum("btji,bthwj->bthwi", scene.c2w[..., :3, :3], scene.scene_flow).half(),
        torch.cat([tokens, last], dim=1).half(),
    )


def _ahead(clip: Clip) -> Float[Tensor, "B _ H W 2"]:
    """Optical flow from each frame to the next, of what is seen in the first; hidden or not in the second."""
    scene = clip.geometry
    assert scene.scene_flow is not None
    moved = (scene.points + scene.scene_flow)[:, :-1]
    return _seen(moved, scene.intrinsics[:, 1:], scene.c2w[:, 1:])


def _back(clip: Clip) -> Float[Tensor, "B _ H W 2"]:
    """And from each frame to the one before: every body's motion undone, which is exact also where it accelerates."""
    scene, motion = clip.geometry, clip.shot.motion[:, :-1]
    eye = torch.eye(4, dtype=motion.dtype, device=motion.device)
    undo = torch.cat([eye.expand(*motion.shape[:2], 1, 4, 4), inverse(motion + eye)], dim=2)
    body = clip.instances[:, 1:].clamp(min=0).flatten(2)[..., None, None].expand(-1, -1, -1, 4, 4)
    points = scene.points[:, 1:]
    before = transform(undo.gather(2, body), points.flatten(2, 3)[..., None, :])[..., 0, :].view(points.shape)
    return _seen(before, scene.intrinsics[:, :-1], scene.c2w[:, :-1])


def _seen(points: Tensor, intrinsics: Tensor, c2w: Tensor) -> Tensor:
    at, _ = project(points, intrinsics, c2w)
    return at - pixel_grid(points.shape[-3], points.shape[-2], at)
