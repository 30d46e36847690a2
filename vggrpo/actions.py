"""What each command does, with a recipe or with its own words; the exit status comes back."""

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from vggrpo.build import build
from vggrpo.check import check
from vggrpo.recipe import load_recipe, read_recipe


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
    from vggrpo.sample import load_models, record, sample_videos, save_sampled
    from vggrpo.sample_config import SampleConfig

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
