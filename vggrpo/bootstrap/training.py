"""A training between two steps, in one file: the trained weights, their running average, the moments, the curve."""

import json
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from vggrpo.bootstrap.assets import load_tensors, save_tensors

MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
"""What AdamW and Muon keep of a weight."""

Network = TypeVar("Network", bound=nn.Module)


@dataclass
class Training(Generic[Network]):
    """All that a training is between two steps, with only the weights that require a gradient."""

    network: Network
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor] = field(default_factory=dict)
    """Running average of each trained weight, by name."""
    step: int = 0
    seconds: float = 0.0
    """On the clock, over all resumptions, without evaluations."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    """What was measured at each checkpoint."""
    plans: list[list[int]] = field(default_factory=list)
    """[step, num_steps] of the start and of every resumption that changed `num_steps`, and with it all schedules."""

    def __post_init__(self) -> None:
        self.average = {name: weight.detach().clone() for name, weight in self.trained()}

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and weights that are trained."""
        return ((name, weight) for name, weight in self.network.named_parameters() if weight.requires_grad)

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """Count one more step. The decay rises to `decay`, so that the first steps are soon forgotten."""
        self.step += 1
        decay = min(decay, (self.step + 1) / (self.step + 10))
        for name, weight in self.trained():
            self.average[name].lerp_(weight, 1 - decay)

    @torch.no_grad()
    def swap_average(self) -> None:
        """Exchange weights and average; a second call undoes it."""
        for name, weight in self.trained():
            self.average[name], kept = weight.detach().clone(), self.average[name]
            weight.copy_(kept)

    @contextmanager
    def averaged(self) -> Iterator[Network]:
        """The network with the average in place of its weights, for as long as the context lasts."""
        self.swap_average()
        try:
            yield self.network
        finally:
            self.swap_average()


def train_to(
    training: Training[Network],
    steps: int,
    *,
    step: Callable[[int], dict[str, float]],
    measure: Callable[[Network], dict[str, float]],
    save: Callable[[], None],
    every: int,
    decay: float,
) -> Iterator[dict[str, float]]:
    """Train to the last step, yielding each one's numbers; then the network holds the average of its weights.

    Args:
        step: takes a step by its number, and says what it measured.
        measure: what a point of the curve says of the averaged network.
        save: keeps the training, point and all.
        every: steps between such points; the first and the last step have one, too.
        decay: of the average.
    """

    def note() -> None:
        if training.curve and training.curve[-1]["step"] == training.step:
            return  # it was resumed here
        with training.averaged() as network:
            found = {name: round(x, 5) for name, x in measure(network).items()}
        training.curve.append({"step": training.step, "seconds": round(training.seconds, 1)} | found)
        save()

    while training.step < steps:
        if training.step % every == 0:
            note()
        begin = time.perf_counter()
        numbers = step(training.step)
        training.update_average(decay)
        training.seconds += time.perf_counter() - begin
        yield numbers
    note()
    training.swap_average()


def save_training(path: Path, training: Training[Any], recipe: dict[str, Any]) -> None:
    """Write the checkpoint; it replaces the one before in one stroke."""
    tensors: dict[str, Tensor] = {}
    for name, weight in training.trained():
        tensors[f"weight.{name}"], tensors[f"average.{name}"] = weight.detach(), training.average[name]
        for key, moment in training.optimizer.state.get(weight, {}).items():
            tensors[f"{key}.{name}"] = moment
    notes = {name: getattr(training, name) for name in ("step", "seconds", "curve", "plans")} | {"recipe": recipe}
    save_tensors(path, {name: tensor.contiguous() for name, tensor in tensors.items()}, notes)


def load_training(path: Path, training: Training[Any], recipe: dict[str, Any], may_change: Collection[str]) -> None:
    """Bring a training to where `save_training` left it; without a file it stays where it is. Notes a changed plan.

    Raises:
        ValueError: the checkpoint is damaged, or differs from the recipe in a field that is not in `may_change`.
    """
    if path.exists():
        _restore(path, training, recipe, may_change)
    if not training.plans or training.plans[-1][1] != recipe["num_steps"]:
        training.plans.append([training.step, recipe["num_steps"]])


def check_same_recipe(
    path: Path, made_with: dict[str, Any], recipe: dict[str, Any], may_change: Collection[str]
) -> None:
    """Refuse to go on with a checkpoint of another recipe.

    Args:
        path: the checkpoint, to be named.
        made_with: the recipe that it holds, as JSON gives it back.
        recipe: the recipe of this run.
        may_change: fields that may differ.

    Raises:
        ValueError: another field differs.
    """
    wanted = json.loads(json.dumps(recipe))  # tuples become lists, as in the file
    for name in [*wanted, *(name for name in made_with if name not in wanted)]:
        was, now = made_with.get(name), wanted.get(name)
        if was != now and name not in may_change:
            raise ValueError(
                f"{path} was made with {name} {was!r} and the recipe says {now!r}: "
                "restore it, or set another `out` to start anew"
            )


@torch.no_grad()
def _restore(path: Path, training: Training[Any], recipe: dict[str, Any], may_change: Collection[str]) -> None:
    tensors, notes = load_tensors(path)
    check_same_recipe(path, notes["recipe"], recipe, may_change)
    for name in ("step", "seconds", "curve", "plans"):
        setattr(training, name, notes[name])
    moments: dict[Any, Any] = training.optimizer.state
    for name, weight in training.trained():
        weight.copy_(tensors[f"weight.{name}"])
        training.average[name] = tensors[f"average.{name}"].to(weight)
        found = {key: tensors[f"{key}.{name}"] for key in MOMENTS if f"{key}.{name}" in tensors}
        if found:
            moments[weight] = {key: tensor if key == "step" else tensor.to(weight) for key, tensor in found.items()}
