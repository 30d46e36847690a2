"""From a recipe to the parts of a run: the only place where policies, geometry and rewards are chosen."""

import difflib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rewards import DEFAULT, REWARDS, motion_smoothness, reprojection_consistency
from vggrpo.checkpoint import restore_weights
from vggrpo.config import Recipe, RewardForm, VideoConfig
from vggrpo.control import RANDOM, is_control, random_reward
from vggrpo.launch import start
from vggrpo.policy.flow_policy import FlowPolicy, frozen_copy, lora_off
from vggrpo.policy.mixture import MixtureFlow, encode_modes, nearness
from vggrpo.runtime import Run
from vggrpo.scenes import Scenes
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


def build(recipe: Recipe, accelerator: Accelerator | None = None, weights: Mapping[str, Tensor] | None = None) -> Parts:
    """The parts of a run under this launch.

    Args:
        weights: what a checkpoint says of the trained weights. They come before the launch wraps the network, for an
            engine may keep copies, or parts.

    Raises:
        ValueError: a launch that is not what was asked for, a batch that the ranks cannot share, a reward or prompt
            that is not known, a file that is missing or not what its card says, weights of another network.
    """
    accelerator = accelerator or start(recipe.launch, cpu=recipe.video is None)
    if recipe.video is not None:
        return _video(recipe, recipe.video, accelerator, weights)
    return _mixture(recipe, accelerator, weights)


def _mixture(recipe: Recipe, accelerator: Accelerator, weights: Mapping[str, Tensor] | None) -> Parts:
    """The embedded mixture; on the CPU, for it is two-dimensional."""
    grpo, mixture = recipe.grpo, recipe.mixture
    run = Run(accelerator, grpo.num_prompts, grpo.group_size, grpo.max_skipped)
    torch.manual_seed(grpo.seed)
    network = MixtureFlow(mixture.width)
    reference = frozen_copy(network).to(accelerator.device) if grpo.beta > 0 else None
    if weights is not None:
        restore_weights(network, weights)
    network, optimizer = run.prepare(network, _adamw(network, recipe), grpo.max_grad_norm)
    encode_modes(Condition([*mixture.prompts, recipe.sampling.negative_prompt]))
    reward = partial(nearness, mixture.wanted)
    reward(torch.zeros(2))

    def encode(cond: Condition) -> Tensor:
        return encode_modes(cond).to(accelerator.device)

    rewards = _rewards_of(recipe, run, lambda: {"nearness": reward})
    policy = FlowPolicy(
        network, encode, (2,), recipe.sampling, reference, keep_means=grpo.ratio == "norm", agree=run.agree
    )
    return Parts(network, policy, _latents, rewards, batches(mixture.prompts, run), optimizer, run)


def _video(recipe: Recipe, video: VideoConfig, accelerator: Accelerator, weights: Mapping[str, Tensor] | None) -> Parts:
    """A Wan with LoRA, judged by a latent geometry model. Neither VAE nor text encoder stays."""
    from vggrpo.data import read_prompts
    from vggrpo.policy.lora import add_lora
    from vggrpo.policy.wan import WanVelocity, cached_prompts, latent_shape, load_encoders
    from vggrpo.sft import load_transformer
    from vggrpo.stitch.load import load_lgm

    grpo, folder = recipe.grpo, Path(video.model)
    run = Run(accelerator, grpo.num_prompts, grpo.group_size, grpo.max_skipped)
    rewards = _rewards_of(recipe, run, lambda: chosen_rewards(grpo.weights, video.dynamic_threshold, video.reward_form))
    prompts = read_prompts(video.prompts)
    device = accelerator.device
    torch.manual_seed(grpo.seed)
    transformer = load_transformer(folder)
    add_lora(transformer, video.lora)
    network: nn.Module = WanVelocity(transformer).to(device)
    if weights is not None:
        restore_weights(network, weights)
    lgm = load_lgm(video.lgm, video.geometry, folder / "vae").to(device)
    encode = cached_prompts(
        load_encoders(folder, video.max_len, str(device)), [*prompts, recipe.sampling.negative_prompt], device
    )
    network, optimizer = run.prepare(network, _adamw(network, recipe), grpo.max_grad_norm)
    policy = FlowPolicy(
        network,
        encode,
        latent_shape(folder, video.frames, video.height, video.width),
        recipe.sampling,
        lora_off(network) if grpo.beta > 0 else None,
        keep_means=grpo.ratio == "norm",
        agree=run.agree,
    )

    geometry = Scenes(lgm, video.judged_at_once, run.agree)
    return Parts(network, policy, geometry, rewards, batches(prompts, run), optimizer, run)


def _rewards_of(recipe: Recipe, run: Run, chosen: Callable[[], dict[str, RewardFn]]) -> dict[str, RewardFn]:
    """The control, if the recipe asks for it; else what is `chosen`."""
    return {RANDOM: random_reward(run)} if is_control(recipe.grpo.weights) else chosen()


def chosen_rewards(
    weights: dict[str, float] | None, dynamic_threshold: float, form: RewardForm = "robust"
) -> dict[str, RewardFn]:
    """The shipped rewards of these names.

    Raises:
        ValueError: no names, or one that none of them has.
    """
    if not weights:  # equal weights by default would undo the anti-freeze term, which must outweigh the others
        raise ValueError(f"grpo.weights must name the rewards of a video model and their weights, such as {DEFAULT}")
    for name in weights:
        if name not in REWARDS:
            near = difflib.get_close_matches(name, REWARDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(REWARDS)}"
            raise ValueError(f"grpo.weights: no reward {name!r}: {hint}")
    estimated = partial(reprojection_consistency, dynamic_threshold=dynamic_threshold)
    special: dict[str, RewardFn] = {"reprojection_consistency": estimated}
    if form == "paper":
        special = {
            "motion_smoothness": partial(motion_smoothness, floor=0.0),
            "reprojection_consistency": partial(estimated, scale="absolute", exclude_self=False),
        }
    return {name: special.get(name, REWARDS[name]) for name in weights}


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
