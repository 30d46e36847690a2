"""Distillation of a closed-form model, resumable to the bit: every step draws from a generator of its own."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from geometry.distance import OutputWeights, output_distances
from geometry.distil import distil_step, start
from geometry.latent import LatentGeometryModel
from geometry.stitch import Sample, student, teach
from vggrpo.bootstrap.training import Training, load_training, save_training, train_to
from vggrpo.stitch.clips import Clips
from vggrpo.stitch.recipe import StitchRecipe


def start_distil(
    recipe: StitchRecipe, model: LatentGeometryModel, steps: int, path: Path
) -> Training[LatentGeometryModel]:
    """A distillation of `steps` steps at its first, or where the checkpoint at `path` left it.

    Raises:
        ValueError: the checkpoint is damaged, or was made by another recipe.
    """
    torch.manual_seed(recipe.seed)
    training = Training(model, start(model, recipe.distil))
    load_training(path, training, _notes(recipe, steps), ("num_steps",))
    return training


def train_distil(
    training: Training[LatentGeometryModel],
    recipe: StitchRecipe,
    steps: int,
    path: Path,
    sources: list[Clips],
    held_out: Clips,
) -> Iterator[dict[str, float]]:
    """Distil for `steps` steps, yielding each one's numbers; checkpoints and curve on the way and at the end.

    When it is through, the model holds the average of its weights.
    """
    model, config = training.network, replace(recipe.distil, steps=steps)

    def step(number: int) -> dict[str, float]:
        sample = draw_batch(recipe, sources, number, steps)
        return distil_step(model, sample, training.optimizer, number, config)

    yield from train_to(
        training,
        steps,
        step=step,
        measure=lambda model: distances(model, held_out, recipe.distil.weights),
        save=lambda: save_training(path, training, _notes(recipe, steps)),
        every=recipe.checkpoint_every,
        decay=recipe.average,
    )
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


def _notes(recipe: StitchRecipe, steps: int) -> dict[str, Any]:
    """What a checkpoint is bound to; the number of steps may change on the way."""
    return asdict(replace(recipe.distil, steps=steps)) | {"steps": None, "num_steps": steps}
