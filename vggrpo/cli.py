"""The command line: what each command does, in the words of the modules that do it."""

import argparse
import itertools
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
    train = commands.choices["train"]
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    for command in (train, commands.choices["check"]):
        command.add_argument("--allow-import", action="store_true", help="run the code of the recipe's own rewards")
    train.set_defaults(
        run=lambda args: train_recipe(args.recipe, args.overrides, resume=args.resume, allow_import=args.allow_import)
    )
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
    return _told(lambda: args.run(args))


def _told(action: Callable[[], int]) -> int:
    """The status of an action; what it raises is one line."""
    try:
        return action()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"vggrpo: {error}", file=sys.stderr)
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


def train_recipe(path: str, overrides: Sequence[str], *, resume: bool = False, allow_import: bool = False) -> int:
    """Train, print every iteration's numbers and keep them in the run's folder; a signal stops it with a checkpoint."""
    from vggrpo.session import Session
    from vggrpo.signals import STATUS, Interrupted, Signals
    from vggrpo.trainer import train

    recipe = load_recipe(path, overrides)
    network, policy, geometry, rewards, conditions, optimizer, run = build(recipe, allow_import=allow_import)
    bare, main = run.accelerator.unwrap_model(network), run.accelerator.is_main_process
    session = Session(recipe, writes=main)
    first = done = session.begin(bare, optimizer, resume=resume, num_processes=run.accelerator.num_processes)
    todo = itertools.islice(conditions, first, recipe.grpo.num_iterations)
    boundary = 0  # updates made when iteration `done` was to begin: only there can a run be left and taken up

    def keep() -> None:
        session.save(done, bare, optimizer)
        if recipe.video is not None and main:
            from vggrpo.policy.lora import save_lora

            save_lora(bare.transformer, session.folder)

    def poll(*_: Any) -> None:
        if run.accelerator.num_processes == 1 and run.updates == boundary:
            signals.poll()

    with Signals() as signals:
        watched = bare.register_forward_pre_hook(poll)
        try:
            for numbers in train(policy, geometry, rewards, todo, optimizer, run, recipe.grpo, first):
                if "grad_norm" in numbers:
                    done, boundary = int(numbers["step"]) + 1, run.updates
                session.note(numbers)
                if main:
                    print("  ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
                if done and done == numbers["step"] + 1 and done % recipe.checkpoint_every == 0:
                    keep()
                if run.any(signals.received is not None):
                    raise Interrupted
        except Interrupted:
            keep()
            return STATUS
        finally:
            watched.remove()
            session.close()
    keep()
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


def sample(argv: Sequence[str]) -> int:
    """Sample videos, with their latents, geometry and rewards; best-of-n and guidance by reward need no training."""
    import json
    from pathlib import Path

    import tyro
    from diffusers import AutoencoderKLWan

    from vggrpo.bootstrap.progress import Progress
    from vggrpo.bootstrap.vae import decode, denormalise
    from vggrpo.data import read_prompts
    from vggrpo.sample import SampleConfig, load_models, record, sample_videos, save_sampled

    cfg = tyro.cli(SampleConfig, args=list(argv), prog="vggrpo sample", description=sample.__doc__)
    cfg.check()
    prompts, out, progress = read_prompts(cfg.prompts), Path(cfg.out), Progress()
    models, records = load_models(cfg, prompts), []
    vae = AutoencoderKLWan.from_pretrained(Path(cfg.model) / "vae", local_files_only=True).to(cfg.device).eval()
    for number, one in enumerate(sample_videos(models, prompts, cfg)):
        with torch.no_grad():
            video = decode(vae, denormalise(vae, one.z0[None]))[0].clamp(0, 1)
        save_sampled(out, number, one, (255 * video).round().byte().cpu())
        records.append(record(cfg, number, one))
        (out / "samples.json").write_text(json.dumps(records, indent=2) + "\n")
        told = "  ".join(f"{name} {value:.3g}" for name, value in one.rewards.items())
        progress(f"{number + 1} of {len(prompts)} videos  {told}")
    print(f"wrote {out}")
    return 0


def score(argv: Sequence[str]) -> int:
    """Geometry and rewards of any video, as JSON; with pictures and clouds if wanted."""
    import json

    import tyro

    from vggrpo.score import ScoreConfig, found_videos, load_model, write
    from vggrpo.score import score as score_one

    cfg = tyro.cli(ScoreConfig, args=list(argv), prog="vggrpo score", description=score.__doc__)
    model = load_model(cfg)
    for name, video in found_videos(cfg):
        scene, said = score_one(video, model, judges=cfg.judges)
        print(json.dumps({"video": name} | said))
        if cfg.out is not None:
            write(cfg, name, video, scene, said)
    return 0


def evaluate(argv: Sequence[str]) -> int:
    """Base against tuned by judges that no reward knows: same prompts, same noise; JSON lines, Markdown and HTML."""
    import tyro

    from vggrpo.bootstrap.progress import Progress
    from vggrpo.evaluation import EvaluateConfig, evaluate_lora

    cfg = tyro.cli(EvaluateConfig, args=list(argv), prog="vggrpo evaluate", description=evaluate.__doc__)
    print(evaluate_lora(cfg, Progress()))
    return 0


def _add(commands: Any, name: str, action: Action, example: str) -> None:
    command = commands.add_parser(name, help=action.__doc__, description=action.__doc__)
    command.add_argument("recipe", help=f"YAML, such as {example}")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="on top of the recipe")
    command.set_defaults(run=lambda args: action(args.recipe, args.overrides))


COMMANDS: dict[str, Action] = {"check": check_recipe, "sft": sft_recipe, "stitch": stitch_recipe, "train": train_recipe}
FLAGGED: dict[str, Callable[[Sequence[str]], int]] = {"sample": sample, "score": score, "evaluate": evaluate}
"""Commands whose flags are the fields of a dataclass."""
