"""Training the video VAE: from the linear start to a network, on crops first, resumable to the bit.

Every step draws from a generator of its own, seeded by the run's seed and the step, so that nothing but weights, their
average, Adam's moments and the step has to be kept (`training.py`).
"""

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLWan
from jaxtyping import Float, UInt8
from torch import Tensor

from vggrpo.bootstrap.footage import cached_footage, render_footage
from vggrpo.bootstrap.training import Training, load_training, save_training
from vggrpo.bootstrap.vae import build_vae, decode_open, encode
from vggrpo.bootstrap.vae_eval import psnr, reconstruct
from vggrpo.bootstrap.vae_init import linear_start
from vggrpo.bootstrap.vae_recipe import MAY_CHANGE, START_CLIPS, VaeRecipe

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


def start_run(recipe: VaeRecipe, clips: UInt8[Tensor, "N T 3 H W"]) -> Training[AutoencoderKLWan]:
    """A training at step 0, or where the checkpoint in `recipe.out` left it.

    Raises:
        ValueError: the checkpoint is damaged, or was made by another recipe.
    """
    torch.manual_seed(recipe.seed)
    vae, path = build_vae(recipe.width), checkpoint_of(recipe)
    if not path.exists() and recipe.start == "linear":
        linear_start(vae, clips[:START_CLIPS].float().transpose(1, 2) / 127.5 - 1, recipe.latent_noise)
    vae.to(recipe.device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.0)
    run = Training(vae, optimizer)
    load_training(path, run, asdict(recipe), MAY_CHANGE)
    return run


def checkpoint_of(recipe: VaeRecipe) -> Path:
    """Where a run is kept."""
    return Path(recipe.out) / "checkpoint.safetensors"


def train_vae(run: Training[AutoencoderKLWan], recipe: VaeRecipe, clips: UInt8[Tensor, "N T 3 H W"]) -> Iterator[Step]:
    """Train to the recipe's last step, yielding every step's numbers; checkpoints on the way and at the end."""
    validation = torch.cat(list(render_footage(VALIDATION))).to(recipe.device)
    clips = clips.to(recipe.device)
    while run.step < recipe.num_steps:
        if run.step % recipe.checkpoint_every == 0:
            _note_and_save(run, recipe, validation)
        yield train_step(run, recipe, clips)
    _note_and_save(run, recipe, validation)


def train_step(run: Training[AutoencoderKLWan], recipe: VaeRecipe, clips: UInt8[Tensor, "N T 3 H W"]) -> Step:
    """One step of AdamW on one batch of crops, and one of the average."""
    begin = time.perf_counter()
    rng = torch.Generator().manual_seed(recipe.seed * 1_000_003 + run.step)
    share = run.step / recipe.num_steps
    video = draw_batch(clips, draw_crop(share, recipe.full_from, rng), rng)
    with torch.autocast(video.device.type, torch.bfloat16, enabled=recipe.bf16):
        z = encode(run.network, video)
        noise = torch.randn(z.shape, generator=rng).to(z)
        seen = decode_open(run.network, z + recipe.latent_noise * noise)
    error = 2 * (seen.float() - video)
    # The root is nearer to PSNR than the square: easy clips count as much as hard ones.
    loss = (error.square().mean((1, 2, 3, 4)) + 2e-4).sqrt().mean() + 0.3 * error.abs().mean()
    size = z.float().square().mean((0, 2, 3, 4))
    run.optimizer.zero_grad(set_to_none=True)
    (loss + recipe.size_weight * (size - 1).square().mean()).backward()
    norm = torch.nn.utils.clip_grad_norm_(run.network.parameters(), recipe.max_grad_norm)
    lr = recipe.lr * min(1.0, (run.step + 1) / recipe.warmup) * (1 - share**1.5)
    run.optimizer.param_groups[0]["lr"] = lr
    run.optimizer.step()
    run.update_average(recipe.average)
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


def _note_and_save(run: Training[AutoencoderKLWan], recipe: VaeRecipe, validation: Tensor) -> None:
    """A point of the curve and a checkpoint; a run that has just been resumed has both already."""
    if run.curve and run.curve[-1]["step"] == run.step:
        return
    video = validation.float() / 255
    with run.averaged() as vae:
        score = psnr(video, reconstruct(vae, video, recipe.bf16)).mean().item()
    run.curve.append({"step": run.step, "seconds": round(run.seconds, 1), "psnr": round(score, 3)})
    save_training(checkpoint_of(recipe), run, asdict(recipe))
