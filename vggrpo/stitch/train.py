"""Distillation of a closed-form model, resumable to the bit: every step draws from a generator of its own."""

import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch

from geometry.distance import OutputWeights, output_distances
from geometry.distil import distil_step, start
from geometry.latent import LatentGeometryModel
from geometry.stitch import Sample, student, teach
from vggrpo.bootstrap.training import Training, load_training, save_training
from vggrpo.stitch.clips import Clips
from vggrpo.stitch.recipe import StitchRecipe


def start_distil(recipe: StitchRecipe, model: LatentGeometryModel, steps: int, path: Path) -> Training:
    """A distillation of `steps` steps at its first, or where the checkpoint at `path` left it.

    Raises:
        ValueError: the checkpoint is damaged, or was made by another recipe.
    """
    torch.manual_seed(recipe.seed)
    training = Training(model, start(model, recipe.distil))
    load_training(path, training, _notes(recipe, steps), ("num_steps",))
    return training


def train_distil(
    training: Training, recipe: StitchRecipe, steps: int, path: Path, sources: list[Clips], held_out: Clips
) -> Iterator[dict[str, float]]:
    """Distil for `steps` steps, yielding each one's numbers; checkpoints and curve on the way and at the end.

    When it is through, the model holds the average of its weights.
    """
    model, config = training.network, replace(recipe.distil, steps=steps)
    assert isinstance(model, LatentGeometryModel)
    while training.step < steps:
        if training.step % recipe.checkpoint_every == 0:
            _note_and_save(training, recipe, steps, path, held_out)
        begin = time.perf_counter()
        sample = draw_batch(recipe, sources, training.step, steps)
        numbers = distil_step(model, sample, training.optimizer, training.step, config)
        training.update_average(recipe.average)
        training.seconds += time.perf_counter() - begin
        yield numbers
    _note_and_save(training, recipe, steps, path, held_out)
    training.swap_average()
    model.requires_grad_(False)


def draw_batch(recipe: StitchRecipe, sources: list[Clips], step: int, steps: int) -> Sample:
    """The batch of a step: clips of one source, drawn in proportion to its size, up to one length."""
    rng = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    batch = next(batch for batch in recipe.batches if step / steps < batch.until)
    sizes = torch.tensor([float(len(clips)) for clips in sources])
    clips = sources[int(torch.multinomial(sizes, 1, generator=rng))]
    rows = torch.randint(len(clips), (batch.clips,), generator=rng)
    focal = float(torch.rand((), generator=rng)) >= recipe.without_focal
    return clips.sample(rows, (batch.frames - 1) // 4 + 1, focal=focal)


@torch.no_grad()
def distances(model: LatentGeometryModel, clips: Clips, weights: OutputWeights) -> dict[str, float]:
    """Mean distance of each output from the teacher's, and their weighted sum as "total"."""
    parts = [output_distances(student(model, sample), teach(model, sample)) for sample in clips.batches()]
    each = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {name: float(x.mean()) for name, x in each.items()} | {"total": float(weights.total(each).mean())}


def _note_and_save(training: Training, recipe: StitchRecipe, steps: int, path: Path, held_out: Clips) -> None:
    """A point of the curve and a checkpoint; a run that has just been resumed has both already."""
    if training.curve and training.curve[-1]["step"] == training.step:
        return
    with training.averaged() as model:
        found = distances(cast(LatentGeometryModel, model), held_out, recipe.distil.weights)
    rounded = {name: round(x, 5) for name, x in found.items()}
    training.curve.append({"step": training.step, "seconds": round(training.seconds, 1)} | rounded)
    save_training(path, training, _notes(recipe, steps))


def _notes(recipe: StitchRecipe, steps: int) -> dict[str, Any]:
    """What a checkpoint is bound to; the number of steps may change on the way."""
    return asdict(replace(recipe.distil, steps=steps)) | {"steps": None, "num_steps": steps}
