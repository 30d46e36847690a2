"""The command line: what each command does, in the words of the modules that do it."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vggrpo.bootstrap.commands import STAGES, bootstrap_eval
from vggrpo.build import build
from vggrpo.check import check
from vggrpo.recipe import load_recipe, read_recipe

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


def check_recipe(path: str, overrides: Sequence[str], *, allow_import: bool = False) -> int:
    """One rollout and replay: is the ratio 1, does anything learn, what does it cost?"""
    recipe = load_recipe(path, overrides)
    parts = build(recipe, allow_import=allow_import)
    report = check(
        parts.policy, parts.network, parts.geometry, parts.rewards, next(parts.conditions), parts.run, recipe.grpo
    )
    if parts.run.accelerator.is_main_process:
        print(*report.lines(), sep="\n")
    return 1 if report.problems else 0


def plan_recipe(
    path: str, overrides: Sequence[str], *, step: bool = True, rate: float | None = None, allow_import: bool = False
) -> int:
    """What a recipe will cost, by formulas; then one iteration without its update, measured."""
    from vggrpo.plan import planned, share, stepped

    recipe = load_recipe(path, overrides)
    said = planned(recipe, rate=None if rate is None else rate * 1e12, allow_import=allow_import)
    print(*said, sep="\n", flush=True)
    if not step:
        return 0
    lines, problems = stepped(share(recipe), allow_import=allow_import)
    print(*lines, sep="\n")
    return 1 if problems else 0


def train_recipe(path: str, overrides: Sequence[str], *, resume: bool = False, allow_import: bool = False) -> int:
    """Train, print every iteration's numbers and keep them in the run's folder; a signal stops it with a checkpoint."""
    from vggrpo.training import Training

    return Training(load_recipe(path, overrides), resume=resume, allow_import=allow_import).go()


def launch_recipe(
    verb: str, name: str, flags: Sequence[str], path: str, overrides: Sequence[str], more: Sequence[str]
) -> int:
    """`vggrpo train` or `stitch` by `accelerate launch`, in this process's place; what can be seen to be wrong is said
    before."""
    from vggrpo.launch import command, configuration, num_processes
    from vggrpo.runtime import share_of

    words = command(name, [verb, path, *overrides, *more], flags)
    if verb == "train":
        recipe = load_recipe(path, overrides)
        share_of(0, num_processes(configuration(name)[1], flags), recipe.grpo.num_prompts, recipe.grpo.group_size)
    else:
        from vggrpo.stitch.pair_recipe import PairRecipe, read_stitch_recipe

        if not isinstance(read_stitch_recipe(path, overrides), PairRecipe):
            raise ValueError(f"{path} is stitched by one process: leave --accelerate out")
        read_stitch_recipe(path, [*overrides, words[-1]])  # launch.engine=..., which it may refuse
    sys.stdout.flush()
    os.execv(words[0], words)


def sft_recipe(path: str, overrides: Sequence[str]) -> int:
    """Finetune a video model on clips, or go on where it stopped: flow matching on cached latents."""
    from vggrpo.bootstrap.progress import Progress
    from vggrpo.sft import finetune, save_result
    from vggrpo.sft_config import SftRecipe

    recipe = read_recipe(SftRecipe, path, overrides)
    training = finetune(recipe, Progress())
    print(f"wrote {save_result(training, recipe)}", *training.curve, sep="\n")
    return 0


def stitch_recipe(path: str, overrides: Sequence[str], *, allow_import: bool = False) -> int:
    """Make a latent geometry model: closed form, distillation, report; or go on where it stopped."""
    from pathlib import Path

    from vggrpo.bootstrap.vae import load_vae
    from vggrpo.stitch.pair import stitch_pair
    from vggrpo.stitch.pair_recipe import PairRecipe, read_stitch_recipe
    from vggrpo.stitch.publish import publish
    from vggrpo.stitch.run import make_model, prepare, report

    recipe = read_stitch_recipe(path, overrides)
    if isinstance(recipe, PairRecipe):
        said = stitch_pair(recipe, path, allow_import=allow_import)
        if int(os.environ.get("RANK", 0)) == 0:
            print(*said, sep="\n")
        return 0
    prepare(recipe)
    vae = load_vae(Path(recipe.wan) / "vae")
    ranked, made = make_model(recipe, vae)
    print(*publish(recipe, path, report(recipe, vae, ranked, made), made), sep="\n")
    return 0


def sample(argv: Sequence[str]) -> int:
    """Sample videos, with their latents, geometry and rewards; best-of-n and guidance by reward need no training."""
    import json
    from pathlib import Path

    import tyro
    from diffusers import AutoencoderKLWan

    from vggrpo.animate import save_animation
    from vggrpo.bootstrap.progress import Progress
    from vggrpo.bootstrap.vae import decode, denormalise
    from vggrpo.data import read_prompts
    from vggrpo.sample import SampleConfig, load_models, record, sample_videos, save_sampled

    cfg = tyro.cli(SampleConfig, args=list(argv), prog="vggrpo sample", description=sample.__doc__)
    if cfg.tiny_random:
        from vggrpo.tiny_random import stand_in_samples

        cfg = stand_in_samples(cfg)
    cfg.check()
    prompts, out, progress = read_prompts(cfg.prompts), Path(cfg.out), Progress()
    models, records, shown = load_models(cfg, prompts), [], []
    vae = AutoencoderKLWan.from_pretrained(Path(cfg.model) / "vae", local_files_only=True).to(cfg.device).eval()
    for number, one in enumerate(sample_videos(models, prompts, cfg)):
        with torch.no_grad():
            video = decode(vae, denormalise(vae, one.z0[None]))[0].clamp(0, 1)
        save_sampled(out, number, one, (255 * video).round().byte().cpu())
        records.append(record(cfg, number, one))
        if cfg.animate is not None:
            shown.append({"": video.cpu()})
        (out / "samples.json").write_text(json.dumps(records, indent=2) + "\n")
        told = "  ".join(f"{name} {value:.3g}" for name, value in one.rewards.items())
        progress(f"{number + 1} of {len(prompts)} videos  {told}")
    if cfg.animate is not None:
        save_animation(cfg.animate, shown, columns=4)
    print(f"wrote {out}")
    return 0


def score(argv: Sequence[str]) -> int:
    """Geometry and rewards of any video, as JSON; with pictures and clouds if wanted."""
    import json

    import tyro

    from vggrpo.score import ScoreConfig, found_videos, load_model, write
    from vggrpo.score import score as score_one

    cfg = tyro.cli(ScoreConfig, args=list(argv), prog="vggrpo score", description=score.__doc__)
    model, panel = load_model(cfg), None
    if cfg.judges:
        from vggrpo.evaluate.panel import load_panel

        panel = load_panel(cfg.referee, None)
    for name, video in found_videos(cfg):
        scene, said = score_one(video, model, panel)
        print(json.dumps({"video": name} | said))
        if cfg.out is not None:
            write(cfg, name, video, scene, said)
    return 0


def evaluate(argv: Sequence[str]) -> int:
    """Models against their base by judges that no reward knows: same prompts, same noise; JSON, Markdown and HTML.

    --run FOLDER judges a run's checkpoints instead; --self-test tries the judges themselves on faults that are known
    (status 1 if one is missed). Both have a --help of their own.
    """
    import tyro

    from vggrpo.bootstrap.progress import Progress

    words = list(argv)
    named: dict[str, Any] = {"prog": "vggrpo evaluate", "description": evaluate.__doc__}
    if "--self-test" in words:
        from vggrpo.evaluate.selftest import SelfTestConfig, self_test

        words.remove("--self-test")
        text, wrong = self_test(tyro.cli(SelfTestConfig, args=words, **named), Progress())
        print(text)
        return 1 if wrong else 0
    if any(word == "--run" or word.startswith("--run=") for word in words):
        from vggrpo.curve import CurveConfig, evaluate_run

        print(evaluate_run(tyro.cli(CurveConfig, args=words, **named), Progress()))
        return 0
    from vggrpo.evaluation import EvaluateConfig, evaluate_models

    print(evaluate_models(tyro.cli(EvaluateConfig, args=words, **named), Progress()))
    return 0


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
