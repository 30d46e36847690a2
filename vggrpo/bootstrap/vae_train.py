"""Training the video VAE: from the linear start to a network, on crops first, resumable to the bit.

Every step draws from a generator of its own, seeded by the run's seed and the step, so that nothing but weights, their
average, Adam's moments and the step has to be kept (`vae_run.py`).
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vggrpo.bootstrap.footage import cached_footage, render_footage
from vggrpo.bootstrap.vae import decode_open, encode
from vggrpo.bootstrap.vae_eval import psnr, reconstruct
from vggrpo.bootstrap.vae_recipe import VaeRecipe
from vggrpo.bootstrap.vae_run import VaeRun, save_run

VALIDATION = range(9_000_000, 9_000_016)
"""Clips that the curve is measured on; the card's numbers come from others."""


class Crop(NamedTuple):
    """A batch's size: `clips` of `frames` frames of `side` x `side` pixels."""

    clips: int
    frames: int
    side: int


class Step(NamedTuple):
    """What one step was like."""

    step: int
    loss: float
    grad_norm: float
    lr: float


def load_footage(recipe: VaeRecipe) -> UInt8[Tensor, "N 17 3 64 64"]:
    """The recipe's training clips, rendered the first time."""
    return cached_footage(Path(recipe.out) / "footage.safetensors", range(recipe.num_clips))


def train_vae(run: VaeRun, recipe: VaeRecipe, clips: UInt8[Tensor, "N T 3 H W"]) -> Iterator[Step]:
    """Train to the recipe's last step, yielding every step's numbers; checkpoints on the way and at the end."""
    validation = torch.cat(list(render_footage(VALIDATION))).to(recipe.device)
    clips = clips.to(recipe.device)
    while run.step < recipe.num_steps:
        if run.step % recipe.checkpoint_every == 0:
            _note_and_save(run, recipe, validation)
        yield train_step(run, recipe, clips)
    _note_and_save(run, recipe, validation)


def train_step(run: VaeRun, recipe: VaeRecipe, clips: UInt8[Tensor, "N T 3 H W"]) -> Step:
    """One step of AdamW on one batch of crops, and one of the average."""
    begin = time.perf_counter()
    rng = torch.Generator().manual_seed(recipe.seed * 1_000_003 + run.step)
    share = run.step / recipe.num_steps
    video = draw_batch(clips, draw_crop(share, recipe.full_from, rng), rng)
    with torch.autocast(video.device.type, torch.bfloat16, enabled=recipe.bf16):
        z = encode(run.vae, video)
        noise = torch.randn(z.shape, generator=rng).to(z)
        seen = decode_open(run.vae, z + recipe.latent_noise * noise)
    error = 2 * (seen.float() - video)
    # The root is nearer to PSNR than the square: easy clips count as much as hard ones.
    loss = (error.square().mean((1, 2, 3, 4)) + 2e-4).sqrt().mean() + 0.3 * error.abs().mean()
    size = z.float().square().mean((0, 2, 3, 4))
    run.optimizer.zero_grad(set_to_none=True)
    (loss + recipe.size_weight * (size - 1).square().mean()).backward()
    norm = torch.nn.utils.clip_grad_norm_(run.vae.parameters(), recipe.max_grad_norm)
    lr = recipe.lr * min(1.0, (run.step + 1) / recipe.warmup) * (1 - share**1.5)
    run.optimizer.param_groups[0]["lr"] = lr
    run.optimizer.step()
    run.step += 1
    decay = min(recipe.average, (run.step + 1) / (run.step + 10))
    with torch.no_grad():
        for mean, weight in zip(run.average.parameters(), run.vae.parameters(), strict=True):
            mean.lerp_(weight, 1 - decay)
    run.seconds += time.perf_counter() - begin
    return Step(run.step, loss.item(), norm.item(), lr)


def draw_crop(share: float, full_from: float, rng: torch.Generator) -> Crop:
    """Cheap crops for the first `full_from` of the steps: most of the picture's statistics can be learnt on them."""
    if share >= full_from:
        return Crop(2, 17, 64)
    kind = torch.rand((), generator=rng).item()
    return Crop(8, 9, 32) if kind < 0.5 else Crop(2, 9, 64) if kind < 0.75 else Crop(4, 17, 32)


def draw_batch(clips: UInt8[Tensor, "N T 3 H W"], crop: Crop, rng: torch.Generator) -> Float[Tensor, "b t 3 h w"]:
    """Random crops in [0, 1], mirrored and reversed by halves, with the colour channels in a random order."""
    N, T, _, H, W = clips.shape
    parts = []
    for _ in range(crop.clips):
        n, i, y, x = (
            int(torch.randint(high, (), generator=rng))
            for high in (N, T - crop.frames + 1, H - crop.side + 1, W - crop.side + 1)
        )
        part = clips[n, i : i + crop.frames, :, y : y + crop.side, x : x + crop.side]
        mirrored, reversed_ = torch.randint(2, (2,), generator=rng).tolist()
        parts.append(part.flip([-1] * mirrored + [0] * reversed_)[:, torch.randperm(3, generator=rng)])
    return torch.stack(parts).float() / 255


def _note_and_save(run: VaeRun, recipe: VaeRecipe, validation: Tensor) -> None:
    """A point of the curve and a checkpoint; a run that has just been resumed has both already."""
    if run.curve and run.curve[-1]["step"] == run.step:
        return
    video = validation.float() / 255
    score = psnr(video, reconstruct(run.average, video, recipe.bf16)).mean().item()
    run.curve.append({"step": run.step, "seconds": round(run.seconds, 1), "psnr": round(score, 3)})
    save_run(run, recipe)
