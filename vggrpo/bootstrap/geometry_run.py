"""A geometry model's training between two steps: what it consists of, and how it is kept in one file."""

import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geometry.models.tiny import TinyGeometry
from vggrpo.bootstrap.assets import load_tensors, save_tensors
from vggrpo.bootstrap.geometry_recipe import MAY_CHANGE, GeometryRecipe
from vggrpo.bootstrap.training import check_same_recipe


@dataclass
class GeometryRun:
    """All that a run is between two steps."""

    network: TinyGeometry
    average: TinyGeometry
    optimizer: torch.optim.AdamW
    step: int = 0
    seconds: float = 0.0
    """Of training on the clock, over all resumptions, without rendering and evaluations."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """Held-out numbers of the average at each checkpoint."""
    plans: list[list[int]] = field(default_factory=list)
    """[step, num_steps] of the start and of every resumption that changed `num_steps`, and with it all schedules."""


def start_run(recipe: GeometryRecipe) -> GeometryRun:
    """A run at step 0, or where the checkpoint in `recipe.out` left it.

    Raises:
        ValueError: the checkpoint is damaged, or was made by another recipe.
    """
    torch.manual_seed(recipe.seed)
    network = TinyGeometry(recipe.model).to(recipe.device)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=recipe.weight_decay
    )
    run = GeometryRun(network, copy.deepcopy(network).requires_grad_(False), optimizer)
    path = checkpoint_of(recipe)
    if path.exists():
        _load(run, recipe, path)
    if not run.plans or run.plans[-1][1] != recipe.num_steps:
        run.plans.append([run.step, recipe.num_steps])
    return run


def save_run(run: GeometryRun, recipe: GeometryRecipe) -> None:
    """Write the checkpoint; it replaces the one before in one stroke."""
    tensors: dict[str, Tensor] = {}
    moments = run.optimizer.state
    for (name, weight), mean in zip(run.network.named_parameters(), run.average.parameters(), strict=True):
        tensors[f"network.{name}"], tensors[f"average.{name}"] = weight.detach(), mean
        if weight in moments:
            tensors[f"first.{name}"] = moments[weight]["exp_avg"]
            tensors[f"second.{name}"] = moments[weight]["exp_avg_sq"]
            tensors[f"count.{name}"] = moments[weight]["step"]
    notes = {"step": run.step, "seconds": run.seconds, "curve": run.curve, "plans": run.plans, "recipe": asdict(recipe)}
    save_tensors(checkpoint_of(recipe), {name: x.contiguous() for name, x in tensors.items()}, notes)


def checkpoint_of(recipe: GeometryRecipe) -> Path:
    """Where a run is kept."""
    return Path(recipe.out) / "checkpoint.safetensors"


def _load(run: GeometryRun, recipe: GeometryRecipe, path: Path) -> None:
    tensors, notes = load_tensors(path)
    check_same_recipe(path, notes["recipe"], asdict(recipe), MAY_CHANGE)
    run.step, run.seconds, run.curve = notes["step"], notes["seconds"], notes["curve"]
    run.plans = notes["plans"]
    moments: dict[Any, Any] = run.optimizer.state
    with torch.no_grad():
        for (name, weight), mean in zip(run.network.named_parameters(), run.average.parameters(), strict=True):
            weight.copy_(tensors[f"network.{name}"])
            mean.copy_(tensors[f"average.{name}"])
            if f"first.{name}" in tensors:
                moments[weight] = {
                    "step": tensors[f"count.{name}"].cpu(),
                    "exp_avg": tensors[f"first.{name}"].to(weight),
                    "exp_avg_sq": tensors[f"second.{name}"].to(weight),
                }
