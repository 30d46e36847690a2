"""Distillation of a pair's closed form, clip by clip, on any number of processes, resumable to the bit."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from geometry.distance import output_distances
from geometry.distil import distil_backward, distil_update, start
from geometry.latent import LatentGeometryModel
from geometry.stitch import Sample, student, teach
from geometry.types import Geometry
from vggrpo.bootstrap.progress import Progress
from vggrpo.bootstrap.training import Training, load_training, save_training
from vggrpo.stitch.pair_recipe import PairRecipe
from vggrpo.stitch.shelf import load_clip, samples
from vggrpo.stitch.team import Team

Speak = Callable[[Sample], Geometry]
Distances = dict[str, float]


def distil(recipe: PairRecipe, model: LatentGeometryModel, parts: Sequence[list[int]], team: Team) -> Training[Any]:
    """Train to the last step, or on to it; then the model holds the average of its weights."""
    torch.manual_seed(recipe.seed)
    path, progress = Path(recipe.out) / "distil.safetensors", Progress()
    training = Training(model, start(model, recipe.distil))
    notes = asdict(recipe.distil) | {"steps": None, "num_steps": recipe.distil.steps}
    load_training(path, training, notes, ("num_steps",))

    def keep() -> None:
        if training.curve and training.curve[-1]["step"] == training.step:
            return  # it was resumed here
        with training.averaged():
            found = distances(recipe, lambda one: student(model, one), model, parts[1], team)
        found["total"] = float(recipe.distil.weights.total({k: torch.tensor(x) for k, x in found.items()}))
        rounded = {name: round(x, 5) for name, x in found.items()}
        training.curve.append({"step": training.step, "seconds": round(training.seconds, 1)} | rounded)
        if team.main:
            save_training(path, training, notes)
        team.wait()

    while training.step < recipe.distil.steps:
        if training.step % recipe.checkpoint_every == 0:
            keep()
        begin = time.perf_counter()
        numbers = _step(recipe, model, training, parts[0], team)
        training.update_average(recipe.average)
        training.seconds += time.perf_counter() - begin
        left = training.seconds / training.step * (recipe.distil.steps - training.step) / 60
        progress(f"step {training.step} of {recipe.distil.steps}  loss {numbers['loss']:.3f}  {left:.0f} min left")
    keep()
    training.swap_average()
    model.requires_grad_(False)
    return training


def draw_clips(recipe: PairRecipe, rows: list[int], step: int) -> tuple[list[int], int | None]:
    """The clips of a step and how many frames of them: the same on every process."""
    rng = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    chosen = [rows[i] for i in torch.randint(len(rows), (recipe.batch,), generator=rng).tolist()]
    if not recipe.lengths:
        return chosen, None
    return chosen, recipe.lengths[int(torch.randint(len(recipe.lengths), (), generator=rng))]


@torch.no_grad()
def distances(recipe: PairRecipe, speak: Speak, model: LatentGeometryModel, rows: list[int], team: Team) -> Distances:
    """Mean distance of each output from the teacher's."""
    sums: dict[str, torch.Tensor] = {}
    with autocast(recipe, team):
        for sample in samples(recipe, rows, team):
            for name, x in output_distances(speak(sample), teach(model, sample)).items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + x.double().sum().cpu()
    return {name: float(team.total(x)) / len(rows) for name, x in sums.items()}


def autocast(recipe: PairRecipe, team: Team) -> AbstractContextManager[Any]:
    """What both models compute in."""
    return torch.autocast(team.device.type, torch.bfloat16, enabled=recipe.bf16)


def _step(
    recipe: PairRecipe, model: LatentGeometryModel, training: Training[Any], rows: list[int], team: Team
) -> dict[str, float]:
    chosen, frames = draw_clips(recipe, rows, training.step)
    training.optimizer.zero_grad()
    loss = torch.zeros((), dtype=torch.float64)
    for number in team.mine(chosen):
        with autocast(recipe, team):
            clip = load_clip(recipe, number, team.device, frames)
            loss += distil_backward(model, clip, recipe.distil, share=1 / recipe.batch)["loss"] / recipe.batch
    team.join([weight for _, weight in training.trained()])
    numbers = distil_update(training.optimizer, training.step, recipe.distil)
    return numbers | {"loss": float(team.total(loss))}
