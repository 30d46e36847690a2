"""`vggrpo plan`: what a recipe asks for and what it will cost, before anything long is begun.

The formulas are those of `cost.py`, times those of `speed.py`.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rewards import ESTIMATED
from vggrpo.build import build, check_names, trainable_times
from vggrpo.check import check
from vggrpo.config import LaunchConfig, Recipe, VideoConfig
from vggrpo.control import is_control
from vggrpo.cost import Counts, Shape, evaluations, forward_flops, iteration_flops, peak_bytes
from vggrpo.further_rewards import TOLD
from vggrpo.runtime import Share, share_of
from vggrpo.sampler import time_grid
from vggrpo.speed import iteration_seconds


def planned(recipe: Recipe, *, rate: float | None = None, allow_import: bool = False) -> list[str]:
    """The plan, without a model's weights being read.

    Args:
        rate: operations a second that the machine is taken to make; by default they are measured here.
        allow_import: whether the code that builds the recipe's geometry model may be run (any4d).

    Raises:
        ValueError: a file that is missing, a reward that is not known, a batch that the processes cannot share.
    """
    if rate is not None and not rate > 0:
        raise ValueError(f"--rate must be > 0, in 10^12 operations a second, got {rate / 1e12:g}")
    mine, ranks = _share(recipe), _ranks(recipe)
    b, k = mine.prompts.stop - mine.prompts.start, mine.members.stop - mine.members.start
    grpo, sampling = recipe.grpo, recipe.sampling
    window = sampling.window.steps(0, sampling.num_steps)
    counts = evaluations(sampling, grpo, b, k, window.start)
    place = "random" if sampling.window.kind == "random" else f"from step {window.start}"
    common = [
        f"batch        {grpo.num_prompts} prompts x {grpo.group_size} on {ranks} process(es): {b} x {k} videos on each",
        f"sampling     {sampling.num_steps} steps, {len(window)} of them trained ({sampling.window.kind}, {place}), "
        f"guidance {sampling.guidance_scale:g}",
        f"run          {grpo.num_iterations} iterations, {grpo.num_updates} update(s) each",
        f"evaluations  rollout {counts.rollout}, replay {counts.replay}, reference {counts.reference} of one video, "
        f"geometry {counts.geometry}; an iteration, a process",
    ]
    if recipe.video is None:
        return ["model        the mixture, in two dimensions", *common]
    return _video(recipe, recipe.video, counts, b * k, common, rate, allow_import)


def share(recipe: Recipe) -> Recipe:
    """The recipe of what one of its processes does, for one process; a group is still a group."""
    mine = _share(recipe)
    b, k = mine.prompts.stop - mine.prompts.start, max(mine.members.stop - mine.members.start, 2)
    return replace(recipe, grpo=replace(recipe.grpo, num_prompts=b, group_size=k), launch=LaunchConfig())


def stepped(recipe: Recipe, *, allow_import: bool = False) -> tuple[list[str], list[str]]:
    """One iteration of one process without its update, and what it found wrong (`check.check`)."""
    parts = build(recipe, allow_import=allow_import)
    report = check(
        parts.policy, parts.network, parts.geometry, parts.rewards, next(parts.conditions), parts.run, recipe.grpo
    )
    told = [f"measured     {line}" for line in report.lines()]
    return [*told, f"measured     {sum(report.clock.seconds.values()):.2f} s an iteration, the first"], report.problems


def _video(
    recipe: Recipe,
    video: VideoConfig,
    counts: Counts,
    num_videos: int,
    common: list[str],
    rate: float | None,
    allow_import: bool,
) -> list[str]:
    from vggrpo.data import read_prompts
    from vggrpo.policy.wan_folder import check_lora_on

    sampling, prompts = recipe.sampling, read_prompts(video.prompts)
    if not is_control(recipe.grpo.weights):
        check_names(recipe.grpo.named, [*ESTIMATED, *TOLD, *video.imported, *video.remote])
    made = _model(video, allow_import)
    config, latent, grid = made.config, made.latent, time_grid(sampling.num_steps, sampling.shift)
    if made.boundary is not None:
        check_lora_on(video.lora_on, trainable_times(sampling), made.boundary, _ranks(recipe))
    shape = Shape.of(
        config, latent, video.max_len, video.lora.rank, _sharing(recipe), per_token=made.per_token,
        half=video.dtype == "bfloat16", seen=made.seen, resident=1 if made.boundary is None else 2,
        adapted=2 if made.boundary is not None and video.lora_on == "both" else 1,
    )  # fmt: skip
    at_once = "x".join(map(str, (video.frames, video.height, video.width)))
    peak = peak_bytes(shape, sampling, latent, num_videos, averaged=recipe.optimizer.ema is not None)
    flops = iteration_flops(shape, counts, checkpointing=sampling.gradient_checkpointing)
    device, before = "cuda" if torch.cuda.is_available() else "cpu", video.motion_samples > 0
    if rate is None:
        seconds, how = iteration_seconds(config, shape, recipe, video, latent, counts, num_videos, device)
    else:
        seconds, device, how = flops / rate, "such a machine", f"{rate / 1e12:,.0f} T operations/s, as assumed"
    return [
        f"model        {video.model}: {'2 x ' if shape.resident == 2 else ''}{shape.num_frozen:,} parameters, and "
        f"{'2 x ' if shape.adapted == 2 else ''}{shape.num_trained:,} of a LoRA to train",
        *_sides(made.boundary, grid, video.lora_on),
        *_first_frame(shape),
        f"geometry     {video.lgm}: {made.judge}",
        f"video        {at_once}, latents {'x'.join(map(str, latent))}: {shape.N} tokens; {len(prompts)} prompts of at "
        f"most {shape.M}",
        *([f"before       {video.motion_samples * len(prompts)} videos of the base model, for its motion"] * before),
        *common,
        f"operations   {flops / 1e12:.3g} T an iteration, {forward_flops(shape) / 1e12:.3g} T a forward pass",
        f"memory       {peak / 2**20:,.0f} MiB at an update's peak, without libraries and the geometry model's own",
        f"time         {seconds:.3g} s an iteration on {device}, without the geometry model ({how}); "
        f"{seconds * recipe.grpo.num_iterations / 3600:.3g} h in all",
    ]


class Made(NamedTuple):
    """What will be trained."""

    config: dict[str, Any]
    """The transformer's."""
    latent: tuple[int, int, int, int]
    """(C, L, h, w)"""
    per_token: bool
    """Tokens have times of their own."""
    judge: str
    """What judges it."""
    boundary: float | None = None
    """Between two transformers."""
    seen: int = 0
    """Tokens of CLIP's view of a first frame."""


def _sides(boundary: float | None, grid: Tensor, on: str) -> list[str]:
    """Which of two transformers the steps ask: both are held, also where one is trained."""
    if boundary is None:
        return []
    from vggrpo.policy.wan import above

    high = int(above(grid[:-1], boundary).sum())
    return [
        f"transformers 2, both held: {high} of {len(grid) - 1} steps ask the one from {boundary:g} on, "
        f"{len(grid) - 1 - high} the other; LoRA on {on}"
    ]


def _first_frame(shape: Shape) -> list[str]:
    channels = (shape.patch_in - shape.patch_out) * shape.N  # numbers of a video
    if not channels:
        return []
    read = f", and {shape.I} tokens of what CLIP sees in it" if shape.I else ""
    return [f"first frame  {channels:,} numbers beside a video's latents{read}"]


def _model(video: VideoConfig, allow_import: bool) -> Made:
    """A published model that is not here is planned by the numbers that are published."""
    from vggrpo.policy.first_frame import check_words, num_seen
    from vggrpo.policy.published import IMAGE_TOKENS, find
    from vggrpo.policy.wan import latent_shape, latents_of
    from vggrpo.policy.wan_folder import read_layout
    from vggrpo.stitch.load import load_lgm

    folder, size = Path(video.model), (video.frames, video.height, video.width)
    published = None if folder.exists() else find(folder)
    layout = read_layout(folder) if published is None else published.layout
    layout.told(video.first_frames is not None)
    if layout.sight:
        check_words(video.max_len)
    if published is not None:
        latent, judge = (
            latents_of(published.vae, video.model, *size, layout.patch),
            "not read, for the model is not here",
        )
        seen = IMAGE_TOKENS if layout.sight else 0
        return Made(published.transformer, latent, layout.per_token, f"{judge}, either", layout.boundary, seen)
    latent, path = latent_shape(folder, *size, layout.patch), folder / "transformer" / "config.json"
    if not path.is_file() or not list(path.parent.glob("*.safetensors")):
        raise ValueError(f"{path.parent} has no config.json with weights beside it: it must be in diffusers layout")
    seen = num_seen(folder) if layout.sight else 0
    lgm = load_lgm(video.lgm, video.geometry, folder / "vae", allow_import)
    judge = f"{sum(p.numel() for p in lgm.parameters()):,} parameters"
    return Made(json.loads(path.read_text()), latent, layout.per_token, judge, layout.boundary, seen)


def _sharing(recipe: Recipe) -> int:
    """Videos that have one prompt in a micro-batch, if all prompts in it have equally many."""
    mine = _share(recipe)
    b, k = mine.prompts.stop - mine.prompts.start, mine.members.stop - mine.members.start
    micro = min(recipe.sampling.micro_batch, b * k)
    return math.gcd(micro, k) if micro % k == 0 or k % micro == 0 else 1


def _ranks(recipe: Recipe) -> int:
    return recipe.launch.num_processes or 1


def _share(recipe: Recipe) -> Share:
    return share_of(0, _ranks(recipe), recipe.grpo.num_prompts, recipe.grpo.group_size)
