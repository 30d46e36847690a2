"""Training of a closed form's refiner on the clips, resumable to the bit, and what it is worth on held-out ones."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from geometry.latent import LatentGeometryModel
from geometry.refine import refine_step, start_refine
from geometry.stitch import tokens
from vggrpo.bootstrap.training import Training, load_training, save_training, train_to
from vggrpo.stitch.clips import Clips
from vggrpo.stitch.closed import Ranked, load_closed
from vggrpo.stitch.recipe import StitchRecipe

MAY_CHANGE = ("num_steps",)


def refining(recipe: StitchRecipe, model: LatentGeometryModel, path: Path) -> Training[LatentGeometryModel]:
    """A training of a closed form's refiner at its first step, or where the checkpoint at `path` left it.

    Raises:
        ValueError: the checkpoint is damaged, or was made by another recipe.
    """
    torch.manual_seed(recipe.seed)
    optimizer = start_refine(model, recipe.refine)
    training = Training(model, optimizer)
    load_training(path, training, _notes(recipe), MAY_CHANGE)
    return training


def train_refine(
    training: Training[LatentGeometryModel], recipe: StitchRecipe, path: Path, sources: list[Clips], held_out: Clips
) -> Iterator[dict[str, float]]:
    """Train to the last step, yielding each one's numbers; checkpoints and curve on the way and at the end.

    When it is through, the model holds the average of its weights.
    """
    model, config = training.network, recipe.refine

    def step(number: int) -> dict[str, float]:
        rng = torch.Generator().manual_seed(recipe.seed * 1_000_003 + number)
        sizes = torch.tensor([float(len(clips)) for clips in sources])
        clips = sources[int(torch.multinomial(sizes, 1, generator=rng))]
        rows = torch.randint(len(clips), (recipe.refine_clips,), generator=rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            return refine_step(model, clips.sample(rows), training.optimizer, number, config)

    yield from train_to(
        training,
        config.steps,
        step=step,
        measure=lambda model: explained(model, held_out),
        save=lambda: save_training(path, training, _notes(recipe)),
        every=recipe.checkpoint_every,
        decay=recipe.average,
    )
    model.requires_grad_(False)


def load_refined(recipe: StitchRecipe, layer: Ranked) -> LatentGeometryModel:
    """A closed-form model with its refiner as it was trained, around a backbone of its own.

    Raises:
        ValueError: it has not been trained to its last step.
    """
    model, path = load_closed(recipe, layer), Path(recipe.out) / f"refine-{layer.mode}.safetensors"
    training = refining(recipe, model, path)
    if training.step < recipe.refine.steps:
        raise ValueError(f"{path} is at step {training.step} of {recipe.refine.steps}: run vggrpo stitch again")
    training.swap_average()
    model.requires_grad_(False)
    return model


@torch.no_grad()
def explained(model: LatentGeometryModel, clips: Clips) -> dict[str, float]:
    """R^2 of the teacher's tokens by the connector's, and of their change from one token map to the next."""
    left, whole, moved, change = (torch.zeros((), dtype=torch.float64) for _ in range(4))
    mean, rows = torch.zeros(model.connector.dim, dtype=torch.float64), 0
    for sample in clips.batches():
        wanted = tokens(model.backbone, model.connector, (model.point,), sample)[0].double()
        mean, rows = mean + wanted.flatten(0, 3).sum(0), rows + wanted[..., 0].numel()
    for sample in clips.batches():
        wanted = tokens(model.backbone, model.connector, (model.point,), sample)[0].double()
        error = model.connector(sample.z).double() - wanted
        left, whole = left + error.square().sum(), whole + (wanted - mean / rows).square().sum()
        moved, change = moved + error.diff(dim=1).square().sum(), change + wanted.diff(dim=1).square().sum()
    return {"r2": float(1 - left / whole), "change r2": float(1 - moved / change)}


def _notes(recipe: StitchRecipe) -> dict[str, Any]:
    """What a checkpoint is bound to; the number of steps may change on the way."""
    wanted = asdict(recipe.refine) | {"steps": None, "clips": recipe.refine_clips, "bf16": recipe.bf16}
    return wanted | {"num_steps": recipe.refine.steps}
