"""The command line: its words, and which action they ask for. What is wrong is one line."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vggrpo.actions import (
    check_recipe,
    evaluate,
    launch_recipe,
    plan_recipe,
    sample,
    score,
    sft_recipe,
    stitch_recipe,
    train_recipe,
)
from vggrpo.bootstrap.commands import STAGES, bootstrap_eval
from vggrpo.recipe import load_recipe

Action = Callable[..., int]
"""What a command does with the path of a recipe, what is said on top of it, and flags; the exit status comes back."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Bad input is one line on stderr and status 2; a failed check is status 1."""
    parser = argparse.ArgumentParser("vggrpo", description="Reinforcement learning for flow models.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, action in COMMANDS.items():
        _add(commands, name, action, "launch/recipes/mixture.yaml")
    plan = commands.choices["plan"]
    plan.add_argument("--no-step", action="store_true", help="formulas only: the video model is not loaded")
    plan.add_argument("--rate", type=float, metavar="T", help="so many T operations/s; by default they are measured")
    plan.set_defaults(
        run=lambda args: plan_recipe(
            args.recipe, args.overrides, step=not args.no_step, rate=args.rate, allow_import=args.allow_import
        )
    )
    train = commands.choices["train"]
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    stitched = commands.choices["stitch"]
    for command, engines in ((train, "ddp, zero2, zero3, fsdp2, multi_node"), (stitched, "ddp, multi_node")):
        command.add_argument("--accelerate", metavar="NAME", help=f"start it by `accelerate launch`: {engines}")
        for flag in LAUNCH_FLAGS:
            command.add_argument(flag, metavar="X", help="with --accelerate: as `accelerate launch` has it")
    train.set_defaults(run=_train)
    stitched.set_defaults(run=_stitch)
    for command in (train, plan, commands.choices["check"]):
        command.add_argument("--tiny-random", action="store_true", help="with narrow stand-ins for its models")
    for command in (train, plan, commands.choices["check"], stitched):
        command.add_argument("--allow-import", action="store_true", help="run the code that the recipe names")
    commands.choices["check"].set_defaults(
        run=lambda args: check_recipe(args.recipe, args.overrides, allow_import=args.allow_import)
    )
    for name, flagged in FLAGGED.items():
        commands.add_parser(name, help=flagged.__doc__, add_help=False)
    bootstrap = commands.add_parser("bootstrap", help="Make a part of the embedded stack.")
    stages = bootstrap.add_subparsers(dest="stage", required=True)
    for name, stage in STAGES.items():
        _add(stages, name, stage, f"launch/recipes/bootstrap/{name}.yaml")
    measure = stages.add_parser("eval", help=bootstrap_eval.__doc__, description=bootstrap_eval.__doc__)
    measure.add_argument("stages", nargs="*", metavar="stage", help="all, if none is named")
    measure.add_argument("--seed", type=int, help="first seed of the clips; drawn and printed if it is not given")
    measure.add_argument("--strict", action="store_true", help="a missed bar is status 1")
    measure.set_defaults(run=lambda args: bootstrap_eval(args.stages, args.seed, args.strict))
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in FLAGGED:
        return _told(lambda: FLAGGED[words[0]](words[1:]))
    args, rest = parser.parse_known_args(words)  # argparse takes no more overrides once it has seen a flag
    unknown = [word for word in rest if "=" not in word or "overrides" not in args]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        args.overrides += [word.removeprefix("--") for word in rest]
    return _told(lambda: args.run(_stood_in(args)))


def _stood_in(args: argparse.Namespace) -> argparse.Namespace:
    """With stand-ins for the models of the recipe, if they are asked for; what else is said on top comes last."""
    if getattr(args, "tiny_random", False):
        from vggrpo.tiny_random import MODELS, stand_in

        made = stand_in(load_recipe(args.recipe, args.overrides), args.recipe)
        args.overrides = [*made, *(word for word in args.overrides if word.partition("=")[0] not in MODELS)]
    return args


def _told(action: Callable[[], int]) -> int:
    """The status of an action; what it raises is one line."""
    try:
        return action()
    except torch.OutOfMemoryError as error:
        print(
            f"vggrpo: out of memory ({str(error).splitlines()[0]}): lower sampling.micro_batch, or turn on "
            "sampling.gradient_checkpointing",
            file=sys.stderr,
        )
        return 2
    except (ValueError, OSError, FloatingPointError) as error:
        rank = int(os.environ.get("RANK", 0))
        if rank == 0 or not isinstance(error, ValueError):  # bad input is the same on every rank, and is said once
            print(f"vggrpo{f' (rank {rank})' if rank else ''}: {error}", file=sys.stderr)
        return 2


def _train(args: argparse.Namespace) -> int:
    if (flags := _launch_flags(args)) is not None:
        more = [*["--resume"] * args.resume, *["--allow-import"] * args.allow_import]
        return launch_recipe("train", args.accelerate, flags, args.recipe, args.overrides, more)
    return train_recipe(args.recipe, args.overrides, resume=args.resume, allow_import=args.allow_import)


def _stitch(args: argparse.Namespace) -> int:
    if (flags := _launch_flags(args)) is not None:
        more = ["--allow-import"] * args.allow_import
        return launch_recipe("stitch", args.accelerate, flags, args.recipe, args.overrides, more)
    return stitch_recipe(args.recipe, args.overrides, allow_import=args.allow_import)


def _launch_flags(args: argparse.Namespace) -> list[str] | None:
    """What is for `accelerate launch`, if it is asked for."""
    flags = [word for flag in LAUNCH_FLAGS if (value := getattr(args, flag[2:])) is not None for word in (flag, value)]
    if args.accelerate is None and flags:
        raise ValueError(f"{flags[0]} is for accelerate: give --accelerate NAME with it")
    return None if args.accelerate is None else flags


def _add(commands: Any, name: str, action: Action, example: str) -> None:
    command = commands.add_parser(name, help=action.__doc__, description=action.__doc__)
    command.add_argument("recipe", help=f"YAML, such as {example}")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="on top of the recipe")
    command.set_defaults(run=lambda args: action(args.recipe, args.overrides))


COMMANDS: dict[str, Action] = {
    "check": check_recipe, "plan": plan_recipe, "sft": sft_recipe, "stitch": stitch_recipe, "train": train_recipe,
}  # fmt: skip
LAUNCH_FLAGS = ("--num_processes", "--num_machines", "--machine_rank", "--main_process_ip", "--main_process_port")
FLAGGED: dict[str, Callable[[Sequence[str]], int]] = {"sample": sample, "score": score, "evaluate": evaluate}
"""Commands whose flags are the fields of a dataclass."""
