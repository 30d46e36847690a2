"""The command line, and the only place where things are built from a recipe."""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vggrpo.check import check
from vggrpo.config import Recipe, load_recipe, read_recipe
from vggrpo.policy.flow_policy import FlowPolicy, frozen_copy
from vggrpo.policy.mixture import MixtureFlow, encode_modes, nearness
from vggrpo.runtime import Run
from vggrpo.trainer import GeometryFn, RewardFn, train
from vggrpo.types import Condition

Action = Callable[[str, Sequence[str]], int]
"""What a command does with the path of a recipe and what is said on top of it; the exit status comes back."""


class Parts(NamedTuple):
    """All that a recipe names, built."""

    network: nn.Module
    policy: FlowPolicy
    geometry: GeometryFn
    rewards: dict[str, RewardFn]
    conditions: Iterator[Condition]
    """Global batches, without end."""
    optimizer: torch.optim.Optimizer
    run: Run


def build(recipe: Recipe, accelerator: Accelerator | None = None) -> Parts:
    """The embedded mixture under this launch; on the CPU, for it is two-dimensional.

    Raises:
        ValueError: a batch that the ranks cannot share, a prompt or reward that names no mode.
    """
    grpo, mixture = recipe.grpo, recipe.mixture
    run = Run(accelerator or Accelerator(cpu=True), grpo.num_prompts, grpo.group_size)
    torch.manual_seed(grpo.seed)
    network = MixtureFlow(mixture.width)
    reference = frozen_copy(network) if grpo.beta > 0 else None
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=recipe.optimizer.lr, weight_decay=recipe.optimizer.weight_decay
    )
    network, optimizer = run.prepare(network, optimizer)
    encode_modes(Condition([*mixture.prompts, recipe.sampling.negative_prompt]))
    reward = partial(nearness, mixture.wanted)
    reward(torch.zeros(2))
    policy = FlowPolicy(network, encode_modes, (2,), recipe.sampling, reference, keep_means=grpo.ratio == "norm")
    return Parts(network, policy, _latents, {"nearness": reward}, batches(mixture.prompts, run), optimizer, run)


def batches(prompts: Sequence[str], run: Run) -> Iterator[Condition]:
    """The prompts over and over, a global batch at a time: the same on every rank."""
    endless = itertools.cycle(prompts)
    while True:
        yield Condition(list(itertools.islice(endless, run.num_prompts)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Bad input is one line on stderr and status 2; a failed check is status 1."""
    parser = argparse.ArgumentParser("vggrpo", description="Reinforcement learning for flow models.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, action in COMMANDS.items():
        _add(commands, name, action, "launch/recipes/mixture.yaml")
    bootstrap = commands.add_parser("bootstrap", help="Make a part of the embedded stack.")
    stages = bootstrap.add_subparsers(dest="stage", required=True)
    for name, stage in STAGES.items():
        _add(stages, name, stage, f"launch/recipes/bootstrap/{name}.yaml")
    measure = stages.add_parser("eval", help=bootstrap_eval.__doc__, description=bootstrap_eval.__doc__)
    measure.add_argument("stages", nargs="*", metavar="stage", help="all, if none is named")
    measure.add_argument("--seed", type=int, help="first seed of the clips; drawn and printed if it is not given")
    measure.add_argument("--strict", action="store_true", help="a missed bar is status 1")
    measure.set_defaults(run=lambda args: bootstrap_eval(args.stages, args.seed, args.strict))
    args = parser.parse_args(argv)
    try:
        status: int = args.run(args)
    except ValueError as error:
        print(f"vggrpo: {error}", file=sys.stderr)
        return 2
    return status


def check_recipe(path: str, overrides: Sequence[str]) -> int:
    """One rollout and replay: is the ratio 1, does anything learn, what does it cost?"""
    recipe = load_recipe(path, overrides)
    parts = build(recipe)
    report = check(
        parts.policy, parts.network, parts.geometry, parts.rewards, next(parts.conditions), parts.run, recipe.grpo
    )
    if parts.run.accelerator.is_main_process:
        print(*report.lines(), sep="\n")
    return 1 if report.problems else 0


def train_recipe(path: str, overrides: Sequence[str]) -> int:
    """Train, and print every iteration's numbers."""
    recipe = load_recipe(path, overrides)
    _, policy, geometry, rewards, conditions, optimizer, run = build(recipe)
    todo = itertools.islice(conditions, recipe.grpo.num_iterations)
    for numbers in train(policy, geometry, rewards, todo, optimizer, run, recipe.grpo):
        if run.accelerator.is_main_process:
            print("  ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
    return 0


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


def sft_recipe(path: str, overrides: Sequence[str]) -> int:
    """Finetune a video model on clips, or go on where it stopped: flow matching on cached latents."""
    from vggrpo.bootstrap.progress import Progress
    from vggrpo.sft import finetune, save_result
    from vggrpo.sft_config import SftRecipe

    recipe = read_recipe(SftRecipe, path, overrides)
    training = finetune(recipe, Progress())
    print(f"wrote {save_result(training, recipe)}", *training.curve, sep="\n")
    return 0


def stitch_recipe(path: str, overrides: Sequence[str]) -> int:
    """Make a latent geometry model: closed form, distillation, report; or go on where it stopped."""
    from pathlib import Path

    from vggrpo.bootstrap.vae import load_vae
    from vggrpo.stitch.publish import publish
    from vggrpo.stitch.recipe import StitchRecipe
    from vggrpo.stitch.run import make_model, prepare, report

    recipe = read_recipe(StitchRecipe, path, overrides)
    prepare(recipe)
    vae = load_vae(Path(recipe.wan) / "vae")
    ranked, made = make_model(recipe, vae)
    print(*publish(recipe, path, report(recipe, vae, ranked, made), made), sep="\n")
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

    first_seed = 10**8 + 10**5 * int(torch.randint(10**4, ()).item()) if seed is None else seed
    print(f"seeds from {first_seed}")
    found = evaluate(stages, first_seed)
    print(*lines(found), sep="\n")
    return 1 if strict and any(row.missed() for rows in found.values() for row in rows) else 0


def _add(commands: Any, name: str, action: Action, example: str) -> None:
    command = commands.add_parser(name, help=action.__doc__, description=action.__doc__)
    command.add_argument("recipe", help=f"YAML, such as {example}")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="on top of the recipe")
    command.set_defaults(run=lambda args: action(args.recipe, args.overrides))


def _latents(z0: Tensor) -> Tensor:
    """The mixture's scene is its points."""
    return z0


COMMANDS: dict[str, Action] = {"check": check_recipe, "sft": sft_recipe, "stitch": stitch_recipe, "train": train_recipe}
STAGES: dict[str, Action] = {
    "generator": bootstrap_generator,
    "geometry": bootstrap_geometry,
    "referee": bootstrap_referee,
    "text": bootstrap_text,
    "vae": bootstrap_vae,
}
