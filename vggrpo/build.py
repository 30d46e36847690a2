"""From a recipe to the parts of a run: the only place where policies, geometry and rewards are chosen."""

import difflib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from geometry.types import Geometry
from rewards import DEFAULT, ESTIMATED
from vggrpo.config import Recipe, VideoConfig
from vggrpo.policy.flow_policy import FlowPolicy, frozen_copy, lora_off
from vggrpo.policy.mixture import MixtureFlow, encode_modes, nearness
from vggrpo.runtime import Run
from vggrpo.trainer import GeometryFn, RewardFn
from vggrpo.types import Condition


class Parts(NamedTuple):
    """All that a recipe names, built."""

    network: nn.Module
    """As the launch wrapped it."""
    policy: FlowPolicy
    geometry: GeometryFn
    rewards: dict[str, RewardFn]
    conditions: Iterator[Condition]
    """Global batches, without end."""
    optimizer: torch.optim.Optimizer
    run: Run


def build(recipe: Recipe, accelerator: Accelerator | None = None) -> Parts:
    """The parts of a run under this launch.

    Raises:
        ValueError: a batch that the ranks cannot share, a reward or prompt that is not known, a file that is missing or
            not what its card says.
    """
    if recipe.video is not None:
        return _video(recipe, recipe.video, accelerator or Accelerator())
    return _mixture(recipe, accelerator or Accelerator(cpu=True))


def _mixture(recipe: Recipe, accelerator: Accelerator) -> Parts:
    """The embedded mixture; on the CPU, for it is two-dimensional."""
    grpo, mixture = recipe.grpo, recipe.mixture
    run = Run(accelerator, grpo.num_prompts, grpo.group_size, grpo.max_skipped)
    torch.manual_seed(grpo.seed)
    network = MixtureFlow(mixture.width)
    reference = frozen_copy(network) if grpo.beta > 0 else None
    network, optimizer = run.prepare(network, _adamw(network, recipe))
    encode_modes(Condition([*mixture.prompts, recipe.sampling.negative_prompt]))
    reward = partial(nearness, mixture.wanted)
    reward(torch.zeros(2))
    policy = FlowPolicy(network, encode_modes, (2,), recipe.sampling, reference, keep_means=grpo.ratio == "norm")
    return Parts(network, policy, _latents, {"nearness": reward}, batches(mixture.prompts, run), optimizer, run)


def _video(recipe: Recipe, video: VideoConfig, accelerator: Accelerator) -> Parts:
    """A Wan with LoRA, judged by a latent geometry model. Neither VAE nor text encoder stays."""
    from vggrpo.data import read_prompts
    from vggrpo.policy.lora import add_lora
    from vggrpo.policy.wan import WanVelocity, cached_prompts, latent_shape, load_encoders
    from vggrpo.sft import load_transformer
    from vggrpo.stitch.load import load_lgm

    grpo, folder = recipe.grpo, Path(video.model)
    run = Run(accelerator, grpo.num_prompts, grpo.group_size, grpo.max_skipped)
    rewards = chosen_rewards(grpo.weights)
    prompts = read_prompts(video.prompts)
    device = accelerator.device
    torch.manual_seed(grpo.seed)
    transformer = load_transformer(folder)
    add_lora(transformer, video.lora)
    network: nn.Module = WanVelocity(transformer).to(device)
    lgm = load_lgm(video.lgm, video.geometry, folder / "vae").to(device)
    encode = cached_prompts(
        load_encoders(folder, video.max_len, str(device)), [*prompts, recipe.sampling.negative_prompt]
    )
    network, optimizer = run.prepare(network, _adamw(network, recipe))
    policy = FlowPolicy(
        network,
        encode,
        latent_shape(folder, video.frames, video.height, video.width),
        recipe.sampling,
        lora_off(network) if grpo.beta > 0 else None,
        keep_means=grpo.ratio == "norm",
    )

    def geometry(z0: Tensor) -> Geometry:
        """[B K *latent] -> scene, some videos at a time."""
        parts = [lgm(some) for some in z0.flatten(0, 1).split(video.judged_at_once)]
        return concatenated(parts).map(lambda x: x.unflatten(0, z0.shape[:2]))

    return Parts(network, policy, geometry, rewards, batches(prompts, run), optimizer, run)


def chosen_rewards(weights: dict[str, float] | None) -> dict[str, RewardFn]:
    """The shipped rewards of these names, for estimated geometry.

    Raises:
        ValueError: no names, or one that none of them has.
    """
    if not weights:  # equal weights by default would undo the anti-freeze term, which must outweigh the others
        raise ValueError(f"grpo.weights must name the rewards of a video model and their weights, such as {DEFAULT}")
    for name in weights:
        if name not in ESTIMATED:
            near = difflib.get_close_matches(name, ESTIMATED, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(ESTIMATED)}"
            raise ValueError(f"grpo.weights: no reward {name!r}: {hint}")
    return {name: ESTIMATED[name] for name in weights}


def concatenated(scenes: Sequence[Geometry]) -> Geometry:
    """Geometries of clips, one after the other along their first axis."""
    first = scenes[0]
    names = [name for name, value in vars(first).items() if isinstance(value, Tensor)]
    joined: dict[str, Any] = {name: torch.cat([getattr(scene, name) for scene in scenes]) for name in names}
    return replace(first, **joined)


def batches(prompts: Sequence[str], run: Run) -> Iterator[Condition]:
    """The prompts over and over, a global batch at a time: the same on every rank."""
    endless = itertools.cycle(prompts)
    while True:
        yield Condition(list(itertools.islice(endless, run.num_prompts)))


def _adamw(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    return torch.optim.AdamW(trained, lr=recipe.optimizer.lr, weight_decay=recipe.optimizer.weight_decay)


def _latents(z0: Tensor) -> Tensor:
    """The mixture's scene is its points."""
    return z0
