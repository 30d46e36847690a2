"""`vggrpo plan`: what a recipe asks for and what it will cost, before anything long is begun.

The formulas are those of `cost.py`. Time is the cost of one and of two blocks with the recipe's own widths, tokens and
micro-batch, measured here and scaled; where even that would take long, operations over the rate of one product.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewards import ESTIMATED
from vggrpo.build import build, check_names
from vggrpo.check import check
from vggrpo.config import LaunchConfig, Recipe, VideoConfig
from vggrpo.control import is_control
from vggrpo.cost import Counts, Shape, evaluations, forward_flops, iteration_flops, peak_bytes
from vggrpo.further_rewards import TOLD
from vggrpo.runtime import Share, share_of

LONG = 3e11
"""Operations of one block and micro-batch from which on it is not measured."""


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
    check_formulas(recipe.video)
    return _video(recipe, recipe.video, counts, b * k, common, rate, allow_import)


def check_formulas(video: VideoConfig) -> None:
    """Refuse a model whose cost the formulas do not say.

    Raises:
        ValueError: two transformers, or one that reads channels of a first frame.
    """
    from vggrpo.policy.wan_folder import read_layout

    folder = Path(video.model)
    if not folder.is_dir():
        return
    layout = read_layout(folder)
    what = "has two transformers" if layout.boundary is not None else "reads a first frame as further channels"
    if layout.boundary is not None or layout.told(video.first_frames is not None) == "channels":
        raise ValueError(
            f"{folder} {what}, for which there are no formulas: plan the model of the same widths that has one "
            "transformer and takes prompts alone, and measure this one (vggrpo check)"
        )


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

    sampling, prompts = recipe.sampling, read_prompts(video.prompts)
    if not is_control(recipe.grpo.weights):
        check_names(recipe.grpo.named, [*ESTIMATED, *TOLD, *video.imported, *video.remote])
    config, latent, per_token, judge = _model(video, allow_import)
    shape = Shape.of(
        config, latent, video.max_len, video.lora.rank, _sharing(recipe),
        per_token=per_token, half=video.dtype == "bfloat16",
    )  # fmt: skip
    at_once = "x".join(map(str, (video.frames, video.height, video.width)))
    peak = peak_bytes(shape, sampling, latent, num_videos, averaged=recipe.optimizer.ema is not None)
    flops = iteration_flops(shape, counts, checkpointing=sampling.gradient_checkpointing)
    device, before = "cuda" if torch.cuda.is_available() else "cpu", video.motion_samples > 0
    if rate is None:
        seconds, how = _seconds(config, shape, recipe, video, latent, counts, num_videos, device)
    else:
        seconds, device, how = flops / rate, "such a machine", f"{rate / 1e12:,.0f} T operations/s, as assumed"
    return [
        f"model        {video.model}: {shape.num_frozen:,} parameters, and {shape.num_trained:,} of a LoRA to train",
        f"geometry     {video.lgm}: {judge}",
        f"video        {at_once}, latents {'x'.join(map(str, latent))}: {shape.N} tokens; {len(prompts)} prompts of at "
        f"most {shape.M}",
        *([f"before       {video.motion_samples * len(prompts)} videos of the base model, for its motion"] * before),
        *common,
        f"operations   {flops / 1e12:.3g} T an iteration, {forward_flops(shape) / 1e12:.3g} T a forward pass",
        f"memory       {peak / 2**20:,.0f} MiB at an update's peak, without libraries and the geometry model's own",
        f"time         {seconds:.3g} s an iteration on {device}, without the geometry model ({how}); "
        f"{seconds * recipe.grpo.num_iterations / 3600:.3g} h in all",
    ]


def _model(video: VideoConfig, allow_import: bool) -> tuple[dict[str, Any], tuple[int, int, int, int], bool, str]:
    """Of what will be trained: the transformer's configuration, (C, L, h, w), whether tokens have times of their own,
    and what judges it. A published model that is not here is planned by the numbers that are published."""
    from vggrpo.policy.published import find
    from vggrpo.policy.wan import latent_shape, latents_of
    from vggrpo.policy.wan_folder import read_layout
    from vggrpo.stitch.load import load_lgm

    folder, size = Path(video.model), (video.frames, video.height, video.width)
    published = find(folder)
    if published is not None and not folder.exists():
        latent = latents_of(published.vae, video.model, *size, published.transformer["patch_size"])
        return published.transformer, latent, published.per_token, "not read, for the model is not here, either"
    layout, path = read_layout(folder), folder / "transformer" / "config.json"
    latent = latent_shape(folder, *size, layout.patch)
    if not path.is_file() or not list(path.parent.glob("*.safetensors")):
        raise ValueError(f"{path.parent} has no config.json with weights beside it: it must be in diffusers layout")
    lgm = load_lgm(video.lgm, video.geometry, folder / "vae", allow_import)
    judge = f"{sum(p.numel() for p in lgm.parameters()):,} parameters"
    return json.loads(path.read_text()), latent, layout.per_token, judge


def _seconds(
    config: dict[str, Any],
    shape: Shape,
    recipe: Recipe,
    video: VideoConfig,
    latent: tuple[int, int, int, int],
    counts: Counts,
    num_videos: int,
    device: str,
) -> tuple[float, str]:
    """Seconds of an iteration's evaluations, and how that is known."""
    sampling = recipe.sampling
    micro = min(sampling.micro_batch, num_videos)
    if forward_flops(shape) / shape.layers * micro > LONG:
        rate = _rate(shape, device)
        total = iteration_flops(shape, counts, checkpointing=sampling.gradient_checkpointing)
        return total / rate, f"{rate / 1e9:,.0f} G operations/s, as measured in one product"
    one, two = (_measured(config, n, video, latent, micro, shape, device) for n in (1, 2))
    forward, backward = (a + (shape.layers - 1) * max(b - a, 0.0) for a, b in zip(one, two, strict=True))
    again = counts.replay * forward if sampling.gradient_checkpointing else 0.0
    plain = counts.rollout + counts.reference
    return plain * forward + counts.replay * backward + again, "one and two of its blocks were measured"


def _measured(
    config: dict[str, Any],
    layers: int,
    video: VideoConfig,
    latent: tuple[int, ...],
    micro: int,
    shape: Shape,
    device: str,
) -> tuple[float, float]:
    """Seconds per video: a forward pass without a graph, and one with its backward pass."""
    from diffusers import WanTransformer3DModel

    from vggrpo.policy.lora import add_lora
    from vggrpo.policy.wan import WanVelocity, in_dtype

    transformer = WanTransformer3DModel.from_config(config | {"num_layers": layers})
    add_lora(in_dtype(transformer, _dtype(shape)), video.lora)
    network: nn.Module = WanVelocity(transformer, shape.per_token).to(device)
    z = torch.randn(micro, *latent, device=device)
    text = torch.randn(micro // shape.sharing, video.max_len, config["text_dim"], device=device)
    t = torch.full((micro,), 0.5, device=device)
    rows = text.repeat_interleave(shape.sharing, 0)

    def forward() -> None:
        with torch.no_grad():
            network(z, t, rows)

    def both() -> None:
        network(z, t, rows).square().mean().backward()

    return _fastest(forward) / micro, _fastest(both) / micro


def _rate(shape: Shape, device: str) -> float:
    """Operations a second in a product of the feed-forward layer's size, on at most 4096 tokens."""
    a = torch.randn(min(shape.N, 4096), shape.d, device=device, dtype=_dtype(shape))
    b = torch.randn(shape.d, shape.f, device=device, dtype=_dtype(shape))
    return 2 * a.shape[0] * math.prod(b.shape) / _fastest(lambda: a @ b)


def _dtype(shape: Shape) -> torch.dtype:
    return torch.bfloat16 if shape.half else torch.float32


def _fastest(call: Callable[[], object], times: int = 4) -> float:
    """The shortest of a few calls, after one that warms up: a neighbour only makes them longer."""
    found = []
    for _ in range(times + 1):
        begin = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begin)
    return min(found[1:])


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
