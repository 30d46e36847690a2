"""The ways a video can be wrong, each with a magnitude that is known. Rewards and judges are measured on them.

A perturbed clip is rendered again from its shot wherever the fault is one of the world or the camera, so that its
pixels are as sharp as the original's. Its geometry is what a perfect model that is blind to the fault would report: the
depth that each pixel really has, at the camera's real pose, with the scene flow of the world as it was meant to be.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from kornia.filters import gaussian_blur2d
from torch import Tensor

from geometry.cameras import anchored, inverse, rigid, so3_exp, unproject
from geometry.world.clips import Clip, film
from geometry.world.shot import NUM_WALLS, Shot
from geometry.world.trajectory import shake


@dataclass(frozen=True)
class Perturbation:
    """A fault, and how much of it is little and much."""

    apply: Callable[[Clip, float, int], Clip]
    """(clip, magnitude, seed) -> clip; magnitude 0 changes nothing."""
    unit: str
    magnitudes: tuple[float, float, float, float, float]
    """From barely to plainly wrong."""


def frozen(clip: Clip, magnitude: float, seed: int = 0) -> Clip:
    """The last `magnitude` (0 to 1) of the clip stands still."""
    last = clip.video.shape[-4] - 1
    held = round((1 - magnitude) * last)
    return _reordered(clip, np.minimum(np.arange(last + 1), held)[None].repeat(len(clip), 0))


def shuffled_frames(clip: Clip, magnitude: float, seed: int = 0) -> Clip:
    """A share `magnitude` (0 to 1) of the frames, drawn at random, changes places."""
    frames, rng = clip.video.shape[-4], np.random.default_rng(seed)
    order = np.tile(np.arange(frames), (len(clip), 1))
    for row in order:
        moved = rng.permutation(frames)[: round(magnitude * frames)]
        row[moved] = np.roll(moved, 1)
    return _reordered(clip, order)


def time_reversal(clip: Clip, magnitude: float, seed: int = 0) -> Clip:
    """The last `magnitude` (0 to 1) of the clip plays backwards."""
    frames = clip.video.shape[-4]
    order, start = np.arange(frames), frames - round(magnitude * frames)
    order[start:] = order[start:][::-1]
    return _reordered(clip, order[None].repeat(len(clip), 0))


def pose_jitter(clip: Clip, magnitude: float, seed: int = 0) -> Clip:
    """The camera shakes by `magnitude` degrees and 0.02 times as many scene units per axis; the world stays solid."""
    rng, shot = np.random.default_rng(seed), clip.shot
    drawn = [shake(rng, shot.camera.shape[1], magnitude) for _ in range(len(clip))]
    position, rotation = (torch.from_numpy(np.stack(x)).to(shot.camera) for x in zip(*drawn, strict=True))
    wobble = rigid(so3_exp(rotation), position)
    return _filmed(clip, replace(shot, camera=shot.camera @ wobble, c2w=shot.c2w @ wobble))


def depth_flicker(clip: Clip, magnitude: float, seed: int = 0) -> Clip:
    """Depth after frame 0 is off by a factor exp(`magnitude` n) a frame, n normal; no pixel can show it."""
    scene, rng = clip.geometry, torch.Generator().manual_seed(seed)
    exponent = magnitude * torch.randn(scene.depth.shape[:-2], generator=rng).to(scene.depth)
    exponent[..., 0] = 0
    depth = scene.depth * exponent.exp()[..., None, None]
    points = unproject(depth, scene.intrinsics, scene.c2w)
    return replace(clip, geometry=replace(scene, depth=depth, points=points))


def local_warp(clip: Clip, magnitude: float, seed: int = 0) -> Clip:
    """Every frame is bent by its own smooth field of `magnitude` pixels (root mean square): wobbling glass."""
    return _filmed(clip, clip.shot, magnitude * _fields(clip, clip.video.shape[-4], seed))


def slow_drift(clip: Clip, magnitude: float, seed: int = 0) -> Clip:
    """One smooth field grows from nothing to `magnitude` pixels (root mean square) in the last frame."""
    grow = torch.linspace(0, 1, clip.video.shape[-4], device=clip.video.device)
    return _filmed(clip, clip.shot, magnitude * _fields(clip, 1, seed) * grow[:, None, None, None])


def sliding_object(clip: Clip, magnitude: float, seed: int = 0) -> Clip:
    """The resting body with the most pixels slides `magnitude` scene units sideways by the last frame, unannounced."""
    shot = clip.shot
    grow = torch.linspace(0, 1, shot.pose.shape[1], device=shot.pose.device)
    side = torch.from_numpy(np.random.default_rng(seed).choice([-1.0, 1.0], size=len(clip))).to(shot.pose)
    pose = shot.pose.clone()
    mine = torch.arange(len(clip), device=pose.device)
    resting = (shot.motion == 0).flatten(3).all(-1).all(1)
    pose[mine, :, _largest(clip, resting), 0, 3] += magnitude * side[:, None] * grow
    return _filmed(clip, replace(shot, pose=pose))


def identity_change(clip: Clip, magnitude: float, seed: int = 0) -> Clip:
    """Half way, the body with the most pixels turns into the colours' opposites by `magnitude` (0 to 1)."""
    material = clip.shot.material.clone()
    mine, body = torch.arange(len(clip), device=material.device), NUM_WALLS + _largest(clip)
    half = material.shape[1] // 2
    colors = material[mine, half:, body, 2:8]
    material[mine, half:, body, 2:8] = colors + magnitude * (1 - 2 * colors)
    return _filmed(clip, replace(clip.shot, material=material))


def blur(clip: Clip, magnitude: float, seed: int = 0) -> Clip:
    """Gaussian blur of the video with a standard deviation of `magnitude` pixels; its geometry is untouched."""
    if magnitude == 0:
        return clip
    size = 2 * int(3 * magnitude + 0.5) + 1
    flat = gaussian_blur2d(clip.video.reshape(-1, *clip.video.shape[-3:]), size, (magnitude, magnitude))
    return replace(clip, video=flat.view(clip.video.shape))


PERTURBATIONS: dict[str, Perturbation] = {
    "frozen": Perturbation(frozen, "share of the clip", (0.2, 0.4, 0.6, 0.8, 1.0)),
    "pose_jitter": Perturbation(pose_jitter, "degrees", (0.1, 0.2, 0.4, 0.8, 1.6)),
    "depth_flicker": Perturbation(depth_flicker, "log depth", (0.01, 0.02, 0.04, 0.08, 0.16)),
    "local_warp": Perturbation(local_warp, "pixels", (0.25, 0.5, 1.0, 2.0, 4.0)),
    "slow_drift": Perturbation(slow_drift, "pixels", (0.5, 1.0, 2.0, 4.0, 8.0)),
    "sliding_object": Perturbation(sliding_object, "scene units", (0.05, 0.1, 0.2, 0.4, 0.8)),
    "identity_change": Perturbation(identity_change, "share of the colour", (0.2, 0.4, 0.6, 0.8, 1.0)),
    "blur": Perturbation(blur, "pixels", (0.5, 1.0, 2.0, 3.0, 4.0)),
    "time_reversal": Perturbation(time_reversal, "share of the clip", (0.2, 0.4, 0.6, 0.8, 1.0)),
    "shuffled_frames": Perturbation(shuffled_frames, "share of the frames", (0.2, 0.4, 0.6, 0.8, 1.0)),
}


def _filmed(clip: Clip, shot: Shot, shift: Tensor | None = None) -> Clip:
    size = (clip.video.shape[-2], clip.video.shape[-1])
    video, scene, instances = film(shot, size, clip.supersample, shift)
    if not clip.batched:
        video, scene, instances = video[0], scene.map(lambda x: x[0]), instances[0]
    return replace(clip, video=video, geometry=scene, instances=instances, shot=shot)


def _reordered(clip: Clip, order: np.ndarray) -> Clip:
    """The frames `order [B T]` of a clip, seen from the new first frame; the last one's flow repeats the one before."""
    index = torch.from_numpy(order).to(clip.video.device)
    mine = torch.arange(len(clip), device=index.device)[:, None]
    shot = clip.shot
    over_time = {name: getattr(shot, name)[mine, index] for name in ("camera", "pose", "material")}
    shot = replace(shot, **over_time)
    camera, pose = shot.camera.double(), shot.pose.double()
    world = inverse(camera[:, 0])
    step = world[:, None, None] @ pose[:, 1:] @ inverse(world[:, None, None] @ pose[:, :-1])
    motion = step - torch.eye(4, dtype=step.dtype, device=step.device)
    motion[(pose[:, 1:] == pose[:, :-1]).flatten(-2).all(-1)] = 0  # exactly
    motion = torch.cat([motion, motion[:, -1:]], dim=1) if motion.shape[1] else torch.zeros_like(pose)
    return _filmed(clip, replace(shot, c2w=anchored(camera).float(), world=world.float(), motion=motion.float()))


def _fields(clip: Clip, frames: int, seed: int) -> Float[Tensor, "B frames H W 2"]:
    """Smooth random displacement fields with a root mean square of one pixel."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randn(len(clip) * frames, 2, 5, 5, generator=rng)
    fields = F.interpolate(coarse, size=clip.video.shape[-2:], mode="bicubic", align_corners=True)
    fields = fields / fields.square().sum(1, keepdim=True).mean((2, 3), keepdim=True).sqrt()
    return fields.movedim(1, -1).unflatten(0, (len(clip), frames)).to(clip.video)


def _largest(clip: Clip, among: Bool[Tensor, "B N"] | None = None) -> Tensor:
    """The body `[B]` with the most pixels in the clip, if it may be chosen."""
    seen = clip.instances.reshape(len(clip), -1)
    pixels = torch.stack([(seen == n + 1).sum(-1) for n in range(clip.shot.shape.shape[1])], dim=-1)
    return (pixels if among is None else pixels * among).argmax(-1)
