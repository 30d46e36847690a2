"""`vggrpo bootstrap STAGE`: what makes each part of the embedded stack, from a recipe to an asset and its card."""

import secrets
from collections.abc import Callable, Sequence

from vggrpo.recipe import read_recipe


def bootstrap_vae(path: str, overrides: Sequence[str]) -> int:
    """Train the tiny video VAE, or go on where it stopped; measure it on fresh clips; write it with its card."""
    from vggrpo.bootstrap.progress import Progress
    from vggrpo.bootstrap.vae_publish import publish
    from vggrpo.bootstrap.vae_recipe import VaeRecipe
    from vggrpo.bootstrap.vae_train import load_footage, start_run, train_vae

    recipe = read_recipe(VaeRecipe, path, overrides)
    clips, progress = load_footage(recipe), Progress()
    run = start_run(recipe, clips)
    for step in train_vae(run, recipe, clips):
        left = run.seconds / run.step * (recipe.num_steps - run.step) / 60
        progress(
            f"step {run.step} of {recipe.num_steps}  loss {step.loss:.4f}  lr {step.lr:.1e}  "
            f"PSNR {run.curve[-1]['psnr']:.2f}  {left:.0f} min left"
        )
    print(*publish(run, recipe, path, clips), sep="\n")
    return 0


def bootstrap_generator(path: str, overrides: Sequence[str]) -> int:
    """Train the tiny text-to-video transformer, or go on where it stopped; write the whole pipeline with its card."""
    from pathlib import Path

    from vggrpo.bootstrap.generator import GeneratorRecipe, publish_generator
    from vggrpo.bootstrap.generator_eval import load_reader
    from vggrpo.bootstrap.progress import Progress
    from vggrpo.sft import finetune

    recipe = read_recipe(GeneratorRecipe, path, overrides)
    reader = load_reader(Path(recipe.referee))  # its absence is known before the training, not after
    training = finetune(recipe.training, Progress())
    print(*publish_generator(training, recipe, path, reader), sep="\n")
    return 0


def bootstrap_text(path: str, overrides: Sequence[str]) -> int:
    """Build the tokenizer, train the text encoder, or go on where it stopped; write both with their card."""
    from vggrpo.bootstrap.captions import draw_captions
    from vggrpo.bootstrap.progress import Progress
    from vggrpo.bootstrap.text_publish import publish_text
    from vggrpo.bootstrap.text_train import TextRecipe, start_text, train_text

    recipe = read_recipe(TextRecipe, path, overrides)
    captions, progress = draw_captions(range(recipe.num_captions)), Progress()
    stage, training = start_text(recipe, captions)
    for loss in train_text(stage, training, recipe, captions):
        progress(f"step {training.step} of {recipe.num_steps}  loss {loss:.3f}")
    print(*publish_text(stage, training, recipe, path, captions), sep="\n")
    return 0


def bootstrap_geometry(path: str, overrides: Sequence[str]) -> int:
    """Train the tiny geometry model, or go on where it stopped; measure it on fresh clips; write it with its card."""
    from vggrpo.bootstrap.geometry_publish import publish
    from vggrpo.bootstrap.geometry_recipe import GeometryRecipe
    from vggrpo.bootstrap.geometry_train import load_lessons, start_run, train_geometry
    from vggrpo.bootstrap.progress import Progress

    recipe, progress = read_recipe(GeometryRecipe, path, overrides), Progress()
    lessons, run = load_lessons(recipe), start_run(recipe)
    for numbers in train_geometry(run, recipe, lessons):
        left = run.seconds / run.step * (recipe.num_steps - run.step) / 60
        progress(
            f"step {run.step} of {recipe.num_steps}  pose {numbers['pose']:.3f}  depth {numbers['depth']:.3f}  "
            f"rotation {run.curve[-1]['rotation']:.2f}  {left:.0f} min left"
        )
    print(*publish(run, recipe, path), sep="\n")
    return 0


def bootstrap_referee(path: str, overrides: Sequence[str]) -> int:
    """Train the referee, or go on where it stopped; measure it on fresh clips; write it with its card."""
    from pathlib import Path

    from vggrpo.bootstrap.progress import Progress
    from vggrpo.bootstrap.referee_data import load_exams
    from vggrpo.bootstrap.referee_publish import publish
    from vggrpo.bootstrap.referee_train import RefereeRecipe, start_run, train_referee

    recipe, progress = read_recipe(RefereeRecipe, path, overrides), Progress()
    seeds = range(recipe.first_clip, recipe.first_clip + recipe.num_clips)
    clips, run = load_exams(Path(recipe.out), seeds, Path(recipe.vae)), start_run(recipe)
    for terms in train_referee(run, recipe, clips):
        left = run.seconds / run.step * (recipe.num_steps - run.step) / 60
        progress(
            f"step {run.step} of {recipe.num_steps}  depth {terms['depth']:.3f}  "
            f"witness {terms['witness']:.3f}  {left:.0f} min left"
        )
    print(*publish(run, recipe, path), sep="\n")
    return 0


def bootstrap_eval(stages: Sequence[str], seed: int | None, strict: bool) -> int:
    """Measure the shipped assets again, on fresh seeds, and print the numbers beside their bars."""
    from vggrpo.bootstrap.evaluation import evaluate, lines
    from vggrpo.bootstrap.progress import Progress

    first_seed = 10**8 + 10**5 * secrets.randbelow(10**4) if seed is None else seed
    print(f"seeds from {first_seed}")
    found = evaluate(stages, first_seed, Progress())
    print(*lines(found), sep="\n")
    return 1 if strict and any(row.missed() for rows in found.values() for row in rows) else 0


STAGES: dict[str, Callable[[str, Sequence[str]], int]] = {
    "generator": bootstrap_generator,
    "geometry": bootstrap_geometry,
    "referee": bootstrap_referee,
    "text": bootstrap_text,
    "vae": bootstrap_vae,
}
