"""Refining and distillation of a pair's closed form, clip by clip, on any number of processes, resumable to the bit."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from geometry.distance import output_distances
from geometry.distil import DistilConfig, distil_backward, distil_update, start
from geometry.latent import LatentGeometryModel
from geometry.refine import RefineConfig, refine_backward, start_refine
from geometry.stitch import Sample, student, teach
from geometry.types import Geometry
from vggrpo.bootstrap.progress import Progress
from vggrpo.bootstrap.training import Training, load_training, save_training, train_to
from vggrpo.stitch.pair_recipe import PairRecipe
from vggrpo.stitch.shelf import load_clip, samples
from vggrpo.stitch.team import Team

Speak = Callable[[Sample], Geometry]
Distances = dict[str, float]


class Stage(NamedTuple):
    """What is trained, towards what, and how."""

    name: str
    config: DistilConfig | RefineConfig
    start: Callable[..., torch.optim.Optimizer]
    """(model, config): what it trains, and nothing else, requires a gradient afterwards."""
    backward: Callable[..., dict[str, float]]
    """(model, sample, config, share): adds the gradient; "loss" is in what comes back."""


def distilling(recipe: PairRecipe) -> Stage:
    """The connector and LoRA on the tail, towards the teacher's outputs."""
    return Stage("distil", recipe.distil, start, distil_backward)


def refining(recipe: PairRecipe) -> Stage:
    """The connector's refiner, towards the teacher's tokens."""
    return Stage("refine", recipe.refine, start_refine, refine_backward)


def train(
    recipe: PairRecipe, stage: Stage, model: LatentGeometryModel, parts: Sequence[list[int]], team: Team
) -> Training[Any]:
    """Train to the last step, or on to it; then the model holds the average of its weights."""
    torch.manual_seed(recipe.seed)
    path, progress, steps = Path(recipe.out) / f"{stage.name}.safetensors", Progress(), stage.config.steps
    training = Training(model, stage.start(model, stage.config))
    notes = asdict(stage.config) | {"steps": None, "num_steps": steps}
    load_training(path, training, notes, ("num_steps",))

    def measure(model: LatentGeometryModel) -> Distances:
        found = distances(recipe, lambda one: student(model, one), model, parts[1], team)
        return found | {"total": float(recipe.distil.weights.total({k: torch.tensor(x) for k, x in found.items()}))}

    def save() -> None:
        if team.main:
            save_training(path, training, notes)
        team.wait()

    for numbers in train_to(
        training,
        steps,
        step=lambda _: _step(recipe, stage, training, parts[0], team),
        measure=measure,
        save=save,
        every=recipe.checkpoint_every,
        decay=recipe.average,
    ):
        left = training.seconds / training.step * (steps - training.step) / 60
        progress(f"{stage.name}: step {training.step} of {steps}  loss {numbers['loss']:.4f}  {left:.0f} min left")
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


def _step(recipe: PairRecipe, stage: Stage, training: Training[Any], rows: list[int], team: Team) -> dict[str, float]:
    chosen, frames = draw_clips(recipe, rows, training.step)
    training.optimizer.zero_grad()
    loss = torch.zeros((), dtype=torch.float64)
    for number in team.mine(chosen):
        with autocast(recipe, team):
            clip = load_clip(recipe, number, team.device, frames)
            told = stage.backward(training.network, clip, stage.config, share=1 / recipe.batch)
            loss += told["loss"] / recipe.batch
    team.join([weight for _, weight in training.trained()])
    numbers = distil_update(training.optimizer, training.step, stage.config)
    return numbers | {"loss": float(team.total(loss))}
