"""What a video VAE keeps of a clip, on seeds that nothing was trained on, beside controls that keep less."""

from typing import Any

import torch
from diffusers import AutoencoderKLWan
from jaxtyping import Float, UInt8
from torch import Tensor

from geometry.world import MOTIONS
from vggrpo.bootstrap.footage import kind_of, render_footage
from vggrpo.bootstrap.linear import block_components, through_components
from vggrpo.bootstrap.vae import decode, encode

FIRST_SEED = 10_000_000
"""Held-out clips: 1,000 seeds from here on belong to the first camera family, the next 1,000 to the second, ..."""


def psnr(video: Float[Tensor, "*batch T 3 H W"], seen: Float[Tensor, "*batch T 3 H W"]) -> Float[Tensor, "*batch"]:
    """Decibels of each clip, for values in [0, 1]: -10 log10 of the mean squared error over the whole clip."""
    return -10 * (seen.clamp(0, 1) - video).square().mean((-4, -3, -2, -1)).log10()


@torch.no_grad()
def reconstruct(
    vae: AutoencoderKLWan, video: Float[Tensor, "B T 3 H W"], bf16: bool = False
) -> Float[Tensor, "B T 3 H W"]:
    """Encoded (the mode) and decoded, four clips at a time."""
    with torch.autocast(video.device.type, torch.bfloat16, enabled=bf16):
        return torch.cat([decode(vae, encode(vae, some)).float() for some in video.split(4)])


@torch.no_grad()
def evaluate_vae(
    vae: AutoencoderKLWan,
    footage: UInt8[Tensor, "N T 3 H W"],
    per_family: int,
    first_seed: int = FIRST_SEED,
    latent_noise: float = 0.05,
) -> dict[str, Any]:
    """PSNR (dB, mean over clips) on `per_family` fresh clips of each camera family, and of the controls.

    Args:
        vae: in eval mode.
        footage: training clips, which the linear control is fitted to.
        per_family: a multiple of 8: moving bodies and shake in the training's proportions.
        first_seed: family k takes the seeds from here plus 1,000 k.
        latent_noise: standard deviation for the row "noisy latents", in the latents' own unit.

    Raises:
        ValueError: `per_family` is not a multiple of 8.
    """
    if per_family < 8 or per_family % 8:
        raise ValueError(f"per_family must be a multiple of 8, so that every kind of clip is in it, got {per_family}")
    names, kinds, rows = [], [], []
    mean, axes = block_components(footage)
    colour = footage.float().mean((0, 1, 3, 4))[:, None, None] / 255
    rng = torch.Generator().manual_seed(first_seed)
    for family, motion in enumerate(MOTIONS):
        seeds = range(first_seed + 1000 * family, first_seed + 1000 * family + per_family)
        for video in render_footage(seeds, motion):
            video = video.to(footage.device).float() / 255
            z = torch.cat([encode(vae, some) for some in video.split(4)])
            noisy = z + latent_noise * torch.randn(z.shape, generator=rng).to(z)
            seen, blurred, other = (
                torch.cat([decode(vae, some) for some in latents.split(4)]) for latents in (z, noisy, z.roll(1, 0))
            )
            linear = through_components(video, mean, axes)
            later = video[:, 1:]
            columns = [psnr(video, seen), psnr(later, seen[:, 1:]), psnr(later, linear), psnr(video, blurred)]
            columns += [psnr(video, other), psnr(video, colour.expand_as(video))]
            rows.append(torch.stack(columns, dim=1))
        names += [motion] * per_family
        kinds += [kind_of(seed) for seed in seeds]
    score = torch.cat(rows).cpu()

    def mean_of(column: int, chosen: list[bool] | None = None) -> float:
        values = score[:, column] if chosen is None else score[torch.tensor(chosen), column]
        return round(values.mean().item(), 2)

    return {
        "clips": len(score),
        "first_seed": first_seed,
        "psnr": mean_of(0),
        "lowest_clip": round(score[:, 0].min().item(), 2),
        "highest_clip": round(score[:, 0].max().item(), 2),
        "static": mean_of(0, [not dynamic for dynamic, _ in kinds]),
        "dynamic": mean_of(0, [dynamic for dynamic, _ in kinds]),
        "steady": mean_of(0, [jitter == 0 for _, jitter in kinds]),
        "hand_held": mean_of(0, [jitter > 0 for _, jitter in kinds]),
        "family": {motion: mean_of(0, [name == motion for name in names]) for motion in MOTIONS},
        "after_first_frame": mean_of(1),
        "noisy_latents": mean_of(3),
        "controls": {"linear_after_first_frame": mean_of(2), "shuffled_latents": mean_of(4), "constant": mean_of(5)},
    }
