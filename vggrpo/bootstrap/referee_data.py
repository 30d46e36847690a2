"""What the referee is taught from: clips of the world as a video model would show them, with their truth.

Degraded once, when they are rendered, so that displacements are followed in what the network will see.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from geometry.models.referee_flow import follow
from geometry.world import make_clips
from vggrpo.bootstrap.assets import load_tensors, save_tensors
from vggrpo.bootstrap.footage import kind_of
from vggrpo.bootstrap.progress import Progress
from vggrpo.bootstrap.vae import load_vae
from vggrpo.bootstrap.vae_eval import reconstruct

SHARD = 800
"""Clips that are rendered, and kept, in one file."""
RENDERED_AT_ONCE = 8
FOLLOWED_AT_ONCE = 4
THROUGH_VAE, BLURRED, SHRUNK, NOISY = 0.35, 0.4, 0.25, 0.5
"""Shares of the clips that go through the video VAE, a blur, a smaller size and back, and noise, each drawn apart."""


@dataclass(frozen=True)
class Exam:
    """A batch of clips, their displacements and their truth; lengths in scene units."""

    video: UInt8[Tensor, "B T 3 H W"]
    c2w: Float[Tensor, "B T 4 4"]
    intrinsics: Float[Tensor, "B T 3 3"]
    depth: Float[Tensor, "B T H W"]
    valid: Bool[Tensor, "B T H W"]
    dynamic: Bool[Tensor, "B T H W"]
    flow: Float[Tensor, "B E h w 2"]
    information: Float[Tensor, "B E h w 2 2"]
    loop: Float[Tensor, "B E h w"]
    """`geometry.models.referee_flow.Tracks`."""

    def __len__(self) -> int:
        return len(self.video)

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Exam":
        """The same exam with `fn` applied to every tensor."""
        return Exam(**{f.name: fn(getattr(self, f.name)) for f in fields(self)})


def load_exams(folder: Path, seeds: range, vae: Path) -> Exam:
    """The clips of `seeds`, rendered the first time and kept in `folder`, `SHARD` clips to a file.

    Raises:
        ValueError: a file is damaged or holds other seeds; the VAE is missing or was changed.
    """
    parts = []
    for start in range(seeds.start, seeds.stop, SHARD):
        some = range(start, min(start + SHARD, seeds.stop))
        path = folder / f"clips-{start}.safetensors"
        wanted = {"seeds": [some.start, some.stop]}
        if not path.exists():
            save_tensors(path, vars(render_exams(some, load_vae(vae))), wanted)
        tensors, notes = load_tensors(path)
        if notes != wanted:
            raise ValueError(f"{path} holds clips {notes}, not {wanted}: delete it or give the run another folder")
        parts.append(tensors)
    return Exam(**{name: torch.cat([part.pop(name) for part in parts]) for name in list(parts[0])})


def render_exams(seeds: range, vae: AutoencoderKLWan) -> Exam:
    """Clips of the world, degraded: groups of `RENDERED_AT_ONCE` seeds share whether bodies move and how it shakes."""
    parts: list[dict[str, Tensor]] = []
    progress = Progress()
    for k, start in enumerate(range(seeds.start, seeds.stop, RENDERED_AT_ONCE)):
        some = range(start, min(start + RENDERED_AT_ONCE, seeds.stop))
        dynamic, jitter = kind_of(k)
        clip = make_clips(some, dynamic=dynamic, jitter=jitter / 2)
        scene = clip.geometry
        assert scene.valid is not None
        assert scene.scene_flow is not None
        seen = degrade(clip.video, torch.Generator().manual_seed(start), vae)
        pieces = [follow(piece) for piece in seen.split(FOLLOWED_AT_ONCE)]
        parts.append(
            {
                "video": (255 * seen).round().to(torch.uint8),
                "c2w": scene.c2w,
                "intrinsics": scene.intrinsics,
                "depth": scene.depth.half(),
                "valid": scene.valid,
                "dynamic": scene.scene_flow.norm(dim=-1) > 0,
                "flow": torch.cat([piece.flow for piece in pieces]).half(),
                "information": torch.cat([piece.information for piece in pieces]).half(),
                "loop": torch.cat([piece.loop for piece in pieces]).half(),
            }
        )
        progress(f"rendering: {some.stop - seeds.start} of {len(seeds)} clips")
    return Exam(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def degrade(
    video: Float[Tensor, "B T 3 H W"], rng: torch.Generator, vae: AutoencoderKLWan
) -> Float[Tensor, "B T 3 H W"]:
    """Each clip in its own way, some in none: through the VAE, blurred, shrunk and enlarged again, noisy."""
    clips = []
    for clip in video:
        vaed, blurred, shrunk, noisy = (
            torch.rand(4, generator=rng) < torch.tensor([THROUGH_VAE, BLURRED, SHRUNK, NOISY])
        ).tolist()
        amount = torch.rand(3, generator=rng).tolist()
        noise = torch.randn(clip.shape, generator=rng)
        if vaed:
            clip = reconstruct(vae, clip[None], bf16=True)[0].clamp(0, 1)
        if shrunk:
            small = F.interpolate(clip, scale_factor=0.5 + 0.4 * amount[0], mode="bilinear", antialias=True)
            clip = F.interpolate(small, size=clip.shape[-2:], mode="bicubic").clamp(0, 1)
        if blurred:
            clip = blur(clip, 0.3 + 0.9 * amount[1])
        if noisy:
            clip = (clip + 0.03 * amount[2] * noise).clamp(0, 1)
        clips.append(clip)
    return torch.stack(clips)


def blur(video: Float[Tensor, "*batch 3 H W"], sigma: float) -> Float[Tensor, "*batch 3 H W"]:
    """Gaussian, `sigma` in pixels; the border is repeated."""
    at = torch.arange(-4, 5, dtype=video.dtype)
    weight = torch.exp(-0.5 * (at / sigma).square())
    weight = (weight / weight.sum()).to(video)
    flat = F.pad(video.reshape(-1, 1, *video.shape[-2:]), (4, 4, 4, 4), mode="replicate")
    return F.conv2d(F.conv2d(flat, weight[None, None, None]), weight[None, None, :, None]).view(video.shape)
