"""From a recipe to the parts of a run: the only place where policies, geometry and rewards are chosen."""

import difflib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from rewards import DEFAULT, ESTIMATED, ESTIMATED_FLOW, motion_smoothness, reprojection_consistency
from vggrpo.base_motion import floor_of, measure_base_motion
from vggrpo.camera_paths import read_paths
from vggrpo.checkpoint import restore_weights
from vggrpo.config import Recipe, RewardForm, SamplingConfig, VideoConfig
from vggrpo.control import RANDOM, is_control, random_reward
from vggrpo.decoded import Decoder
from vggrpo.further_rewards import further_rewards
from vggrpo.launch import start
from vggrpo.policy.flow_policy import Encoder, FlowPolicy, frozen_copy, lora_off
from vggrpo.policy.mixture import MixtureFlow, encode_modes, nearness
from vggrpo.runtime import Run
from vggrpo.sampler import time_grid
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


def build(
    recipe: Recipe,
    accelerator: Accelerator | None = None,
    weights: Mapping[str, Tensor] | None = None,
    *,
    allow_import: bool = False,
) -> Parts:
    """The parts of a run under this launch.

    Args:
        weights: what a checkpoint says of the trained weights. They come before the launch wraps the network, for an
            engine may keep copies, or parts.
        allow_import: whether what the recipe names (`video.imported`, an any4d geometry model) may be imported, which
            runs whatever is there.

    Raises:
        ValueError: a launch that is not what was asked for, a batch that the ranks cannot share, a reward or prompt
            that is not known, a file that is missing or not what its card says, weights of another network, code that
            nobody allowed.
    """
    accelerator = accelerator or start(recipe.launch, cpu=recipe.video is None)
    if recipe.video is not None:
        return _video(recipe, recipe.video, accelerator, weights, allow_import)
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


def _video(
    recipe: Recipe,
    video: VideoConfig,
    accelerator: Accelerator,
    weights: Mapping[str, Tensor] | None,
    allow_import: bool,
) -> Parts:
    """A Wan with LoRA, judged by a latent geometry model. The text encoder goes before the transformer comes; the VAE
    is loaded for first frames and rewards of pixels alone."""
    from vggrpo.data import read_prompts
    from vggrpo.policy.first_frame import free_shape, put_first, read_first_frames
    from vggrpo.policy.kernels import choose_attention, compile_blocks
    from vggrpo.policy.prompt_cache import prompt_encoder
    from vggrpo.policy.wan import latent_shape
    from vggrpo.policy.wan_folder import adapt, load_velocity, read_layout, tell_first_frames
    from vggrpo.stitch.load import load_lgm

    grpo, folder = recipe.grpo, Path(video.model)
    run = Run(accelerator, grpo.num_prompts, grpo.group_size, grpo.max_skipped)
    prompts, motion = read_prompts(video.prompts), dict[str, float]()
    decode = Decoder(folder, video.judged_at_once)

    def chosen() -> dict[str, RewardFn]:
        further = further_rewards(video, grpo.named, motion, decode, allow_import=allow_import)
        return chosen_rewards(grpo.named, video.reward_form, further)

    rewards = _rewards_of(recipe, run, chosen)
    paths = None if video.cameras is None else read_paths(video.cameras, prompts, video.frames).to(accelerator.device)
    layout, size = read_layout(folder), (video.height, video.width)
    shape = latent_shape(folder, video.frames, *size, layout.patch)
    frames = None if video.first_frames is None else read_first_frames(video.first_frames, prompts, *size)
    way = layout.told(frames is not None)
    device = accelerator.device
    with accelerator.local_main_process_first():  # the others find what it has encoded, and load no encoder
        encode = prompt_encoder(
            folder,
            [*prompts, recipe.sampling.negative_prompt],
            video.max_len,
            cache=video.prompt_cache,
            device=device,
            dtype=getattr(torch, video.text_dtype),
        )
    torch.manual_seed(grpo.seed)
    velocity = load_velocity(folder, getattr(torch, video.dtype))
    adapt(velocity, video.lora, video.lora_on, trainable_times(recipe.sampling), accelerator.num_processes)
    if recipe.sampling.gradient_checkpointing:
        for transformer in velocity.transformers().values():
            transformer.enable_gradient_checkpointing()
    if video.attention is not None:
        choose_attention(velocity, video.attention)
    if video.compile:
        compile_blocks(velocity)
    network: nn.Module = velocity.to(device)
    if weights is not None:
        restore_weights(network, weights)
    lgm = load_lgm(video.lgm, video.geometry, folder / "vae", allow_import).to(device)
    told: Encoder = encode
    if frames is not None:
        told = tell_first_frames(encode, folder, layout, frames, video.frames, str(device))
    network, optimizer = run.prepare(network, _adamw(network, recipe), grpo.max_grad_norm)
    policy = FlowPolicy(
        network,
        told,
        free_shape(shape, way),
        recipe.sampling,
        lora_off(network) if grpo.beta > 0 else None,
        keep_means=grpo.ratio == "norm",
        agree=run.agree,
        complete=put_first if way == "kept" else None,
    )

    geometry = Scenes(lgm, video.judged_at_once, run.agree)
    if video.motion_samples > 0 and not rewards.keys().isdisjoint({"camera_motion_floor", "motion_prior"}):
        off = lora_off(network)  # its weights may be a checkpoint's already
        base = FlowPolicy(off, encode, policy.latent_shape, recipe.sampling, agree=run.agree)
        motion.update(measure_base_motion(base, geometry, prompts, video.motion_samples, grpo.seed, run))
    if motion and "camera_motion_floor" in rewards:
        rewards["camera_motion_floor"] = floor_of(motion, video.motion_kept)
    return Parts(network, policy, geometry, rewards, batches(prompts, run, paths, frames), optimizer, run)


def _rewards_of(recipe: Recipe, run: Run, chosen: Callable[[], dict[str, RewardFn]]) -> dict[str, RewardFn]:
    """The control, if the recipe asks for it; else what is `chosen`."""
    return {RANDOM: random_reward(run)} if is_control(recipe.grpo.weights) else chosen()


def chosen_rewards(
    weights: dict[str, float] | None, form: RewardForm = "robust", further: Mapping[str, RewardFn] = {}
) -> dict[str, RewardFn]:
    """The rewards of these names, for estimated geometry: shipped ones, and `further` ones.

    Raises:
        ValueError: no names, or one that none of them has.
    """
    known: dict[str, RewardFn] = {**ESTIMATED, **further}
    check_names(weights, known)
    assert weights is not None
    if form == "paper":
        again = partial(
            reprojection_consistency, dynamic_threshold=ESTIMATED_FLOW, scale="absolute", exclude_self=False
        )
        known |= {"motion_smoothness": partial(motion_smoothness, floor=0.0), "reprojection_consistency": again}
    return {name: known[name] for name in weights}


def check_names(weights: Collection[str] | None, known: Collection[str]) -> None:
    """Raises ValueError, one line, for no reward, or one that is none of those that are `known`."""
    if not weights:  # equal weights by default would undo the anti-freeze term, which must outweigh the others
        raise ValueError(f"grpo.weights must name the rewards of a video model and their weights, such as {DEFAULT}")
    for name in weights:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"grpo.weights: no reward {name!r}: {hint}")


def batches(
    prompts: Sequence[str], run: Run, cameras: Tensor | None = None, frames: Tensor | None = None
) -> Iterator[Condition]:
    """The prompts, with their paths `[N T 4 4]` and first frames `[N 3 H W]`, over and over, a global batch at a time:
    the same on every rank."""
    endless = itertools.cycle(range(len(prompts)))
    while True:
        chosen = list(itertools.islice(endless, run.num_prompts))
        first_frame, camera = (None if x is None else x[chosen] for x in (frames, cameras))
        yield Condition([prompts[n] for n in chosen], first_frame, camera)


def trainable_times(cfg: SamplingConfig) -> Float[Tensor, " steps"]:
    """Flow times of all the steps that the window can come to."""
    window = cfg.window
    last = cfg.num_steps - 1 if window.stop is None else window.stop
    end = window.start + window.size if window.kind == "fixed" else last
    return time_grid(cfg.num_steps, cfg.shift)[window.start : end]


def _adamw(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    return torch.optim.AdamW(trained, lr=recipe.optimizer.lr, weight_decay=recipe.optimizer.weight_decay)


def _latents(z0: Tensor) -> Tensor:
    """The mixture's scene is its points."""
    return z0
