"""A video VAE's training between two steps: what it consists of, and how it is kept in one file."""

import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from jaxtyping import UInt8
from torch import Tensor

from vggrpo.bootstrap.assets import load_tensors, save_tensors
from vggrpo.bootstrap.training import check_same_recipe
from vggrpo.bootstrap.vae import build_vae
from vggrpo.bootstrap.vae_init import linear_start
from vggrpo.bootstrap.vae_recipe import MAY_CHANGE, START_CLIPS, VaeRecipe


@dataclass
class VaeRun:
    """All that a run is between two steps."""

    vae: AutoencoderKLWan
    average: AutoencoderKLWan
    optimizer: torch.optim.AdamW
    step: int = 0
    seconds: float = 0.0
    """Of training on the clock, over all resumptions, without the evaluations."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """Step, seconds and held-out PSNR (dB) of the average at each checkpoint."""
    plans: list[list[int]] = field(default_factory=list)
    """[first step, num_steps] of every plan that was followed: more than one if the run was made longer or shorter."""


def start_run(recipe: VaeRecipe, clips: UInt8[Tensor, "N T 3 H W"]) -> VaeRun:
    """A run at step 0, or where the checkpoint in `recipe.out` left it.

    Raises:
        ValueError: the checkpoint is damaged, or was made by another recipe.
    """
    torch.manual_seed(recipe.seed)
    vae = build_vae(recipe.width)
    path = checkpoint_of(recipe)
    if not path.exists() and recipe.start == "linear":
        linear_start(vae, clips[:START_CLIPS].float().transpose(1, 2) / 127.5 - 1, recipe.latent_noise)
    vae.to(recipe.device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.0)
    run = VaeRun(vae, copy.deepcopy(vae).requires_grad_(False), optimizer)
    if path.exists():
        _load(run, recipe, path)
    if not run.plans or run.plans[-1][1] != recipe.num_steps:
        run.plans.append([run.step, recipe.num_steps])
    return run


def save_run(run: VaeRun, recipe: VaeRecipe) -> None:
    """Write the checkpoint; it replaces the one before in one stroke."""
    tensors: dict[str, Tensor] = {}
    moments = run.optimizer.state
    for (name, weight), mean in zip(run.vae.named_parameters(), run.average.parameters(), strict=True):
        tensors[f"vae.{name}"], tensors[f"average.{name}"] = weight.detach(), mean
        if weight in moments:
            tensors[f"first.{name}"] = moments[weight]["exp_avg"]
            tensors[f"second.{name}"] = moments[weight]["exp_avg_sq"]
    progress = {"step": run.step, "seconds": run.seconds, "curve": run.curve, "plans": run.plans}
    notes = progress | {"recipe": asdict(recipe)}
    save_tensors(checkpoint_of(recipe), tensors, notes)


def checkpoint_of(recipe: VaeRecipe) -> Path:
    """Where a run is kept."""
    return Path(recipe.out) / "checkpoint.safetensors"


def _load(run: VaeRun, recipe: VaeRecipe, path: Path) -> None:
    tensors, notes = load_tensors(path)
    check_same_recipe(path, notes["recipe"], asdict(recipe), MAY_CHANGE)
    run.step, run.seconds, run.curve, run.plans = (notes[name] for name in ("step", "seconds", "curve", "plans"))
    moments: dict[Any, Any] = run.optimizer.state
    with torch.no_grad():
        for (name, weight), mean in zip(run.vae.named_parameters(), run.average.parameters(), strict=True):
            weight.copy_(tensors[f"vae.{name}"])
            mean.copy_(tensors[f"average.{name}"])
            if f"first.{name}" in tensors:
                moments[weight] = {
                    "step": torch.tensor(float(run.step)),
                    "exp_avg": tensors[f"first.{name}"].to(weight),
                    "exp_avg_sq": tensors[f"second.{name}"].to(weight),
                }
