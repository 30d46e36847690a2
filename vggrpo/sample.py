"""Videos from a model, tuned or not: each with its latents, its geometry and its rewards.

    out/000.mp4           the video                      out/000.ply    its points, coloured
    out/000.safetensors   z0, normalised latents         out/000.npz    c2w, intrinsics, depth, points, confidence, flow
    out/samples.json      prompt, seed and rewards of every video, and of every candidate that it was chosen from

Two ways to spend compute in place of training: best-of-n by reward, and guidance by the reward's gradient
(`guidance.guided`). The VAE is loaded for the mp4 alone.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from geometry.latent import LatentGeometryModel
from geometry.types import Geometry
from rewards import DEFAULT, ESTIMATED, PAPER
from vggrpo.grpo import group_advantage
from vggrpo.guidance import guided
from vggrpo.policy.flow_policy import Complete, Encoder, Network, Told
from vggrpo.sample_config import SampleConfig
from vggrpo.sampler import draw, normal, time_grid
from vggrpo.types import Condition, Streams

SETS: dict[str, dict[str, float]] = {"default": DEFAULT, "paper": PAPER}


class Models(NamedTuple):
    """What sampling needs."""

    network: nn.Module
    """A `flow_policy.Network`."""
    encode: Encoder
    lgm: LatentGeometryModel
    latent_shape: tuple[int, ...]
    """Of what is sampled: all of a video but a first frame that is kept."""
    grid: Float[Tensor, " times"]
    """From noise to data."""
    frames: Float[Tensor, "N 3 H W"] | None = None
    """The first frame of each prompt's video, if the model is told of one."""
    complete: Complete | None = None
    """Puts a first frame that is kept before what was sampled."""


class Sampled(NamedTuple):
    """One video, and what it was chosen from."""

    prompt: str
    chosen: int
    """Which candidate."""
    z0: Float[Tensor, "C L h w"]
    scene: Geometry
    rewards: dict[str, float]
    """Of the video."""
    candidates: dict[str, list[float]]
    """Of all of them."""


def load_models(cfg: SampleConfig, prompts: list[str]) -> Models:
    """The parts of a Wan folder that sampling needs, with the LoRA if there is one; prompts are encoded here.

    Raises:
        ValueError: a file that is missing or damaged, a size that the model does not make.
    """
    from vggrpo.data import read_prompts
    from vggrpo.policy.first_frame import free_shape, put_first, read_first_frames
    from vggrpo.policy.prompt_cache import prompt_encoder
    from vggrpo.policy.wan import latent_shape, own_shift
    from vggrpo.policy.wan_folder import load_loras, load_velocity, read_layout, tell_first_frames
    from vggrpo.stitch.load import load_lgm

    cfg.check()
    folder = Path(cfg.model)
    layout, size = read_layout(folder), (cfg.height, cfg.width)
    shape = latent_shape(folder, cfg.frames, *size, layout.patch)
    way = layout.told(cfg.first_frames is not None, "--first-frames")
    lgm = load_lgm(cfg.lgm, cfg.geometry, folder / "vae", cfg.allow_import).to(cfg.device)
    frames = None
    if cfg.first_frames is not None:  # of all prompts of the file, of which some may be wanted
        frames = read_first_frames(cfg.first_frames, read_prompts(cfg.prompts), *size)[: len(prompts)]
    network = load_velocity(folder)
    if cfg.lora is not None:
        load_loras(network, Path(cfg.lora))
    texts = prompt_encoder(
        folder,
        [*prompts, cfg.negative_prompt],
        cfg.max_len,
        cache=cfg.prompt_cache,
        device=cfg.device,
        dtype=getattr(torch, cfg.text_dtype),
    )
    encode: Encoder = texts
    if frames is not None:
        encode = tell_first_frames(texts, folder, layout, frames, cfg.frames, cfg.device)
    network = network.requires_grad_(False).eval().to(cfg.device)
    grid = time_grid(cfg.num_steps, own_shift(folder) if cfg.shift is None else cfg.shift)
    complete = put_first if way == "kept" else None
    return Models(network, encode, lgm, free_shape(shape, way), grid, frames, complete)


def sample_videos(models: Models, prompts: list[str], cfg: SampleConfig) -> Iterator[Sampled]:
    """The best of `best_of` candidates for each prompt."""
    weights, grid = SETS[cfg.rewards], models.grid
    for b, prompt in enumerate(prompts):
        streams = [Streams(cfg.seed, 0).member(b, k) for k in range(cfg.best_of)]
        z = normal((cfg.best_of, *models.latent_shape), streams).to(cfg.device)
        frame = None if models.frames is None else models.frames[b : b + 1]
        told, against = (models.encode(Condition([text], frame)) for text in (prompt, cfg.negative_prompt))
        (under, *given), negative = (x.to(cfg.device) for x in _parts(told)), _parts(against)[0].to(cfg.device)

        def whole(z0: Tensor, told: tuple[Tensor, ...] = (under, *given)) -> Tensor:
            several = tuple(x.expand(len(z0), *x.shape[1:]) for x in told)
            return z0 if models.complete is None else models.complete(several, z0)

        by_reward = None
        if cfg.guidance_geometry > 0:
            reward = _total(lambda z0: models.lgm(whole(z0)), weights)
            by_reward = partial(guided, reward=reward, scale=cfg.guidance_geometry, grid=grid, every=cfg.guide_every)
        z0 = whole(draw(_told(models.network, given), z, under, negative, grid, cfg.guidance_scale, by_reward))
        with torch.no_grad():
            scene = models.lgm(z0)
            scores = {name: ESTIMATED[name](scene) for name in weights}
        chosen = best(scores, weights)
        yield Sampled(
            prompt,
            chosen,
            z0[chosen],
            scene.map(lambda x, k=chosen: x[k]),
            {name: float(r[chosen]) for name, r in scores.items()},
            {name: r.tolist() for name, r in scores.items()},
        )


def best(scores: dict[str, Float[Tensor, " n"]], weights: dict[str, float]) -> int:
    """The candidate with the highest weighted average of z-scores; the first of equals; never one without a score."""
    if len(next(iter(scores.values()))) == 1:
        return 0
    advantage = group_advantage({name: r[None] for name, r in scores.items()}, weights, silent="drop")[0]
    scored = torch.stack([r.isfinite() for r in scores.values()]).all(0)
    return int(advantage.where(scored | ~scored.any(), -torch.inf).argmax())


def save_sampled(folder: Path, number: int, one: Sampled, video: UInt8[Tensor, "T 3 H W"], fps: int = 8) -> None:
    """All files of one video."""
    from geometry.export import save_ply
    from vggrpo.bootstrap.assets import save_tensors
    from vggrpo.data import write_video

    name = folder / f"{number:03d}"
    folder.mkdir(parents=True, exist_ok=True)
    write_video(name.with_suffix(".mp4"), video, fps)
    save_tensors(name.with_suffix(".safetensors"), {"z0": one.z0.cpu().contiguous()})
    maps: dict[str, Any] = {key: x.cpu().numpy() for key, x in vars(one.scene).items() if isinstance(x, Tensor)}
    np.savez_compressed(name.with_suffix(".npz"), **maps)
    save_ply(name.with_suffix(".ply"), one.scene.map(lambda x: x.cpu()), video.float() / 255)


def record(cfg: SampleConfig, number: int, one: Sampled) -> dict[str, Any]:
    """A line of samples.json."""
    return {
        "file": f"{number:03d}.mp4",
        "prompt": one.prompt,
        "seed": [cfg.seed, number, one.chosen],
        "rewards": one.rewards,
        "candidates": one.candidates,
    }


def _parts(told: Told) -> tuple[Tensor, ...]:
    return (told,) if isinstance(told, Tensor) else told


def _told(network: Network, given: list[Tensor]) -> Network:
    """The network that is also told of a first frame, if there is one."""
    if not given:
        return network
    return lambda z_t, t, text: network(z_t, t, (text, *(x.expand(len(z_t), *x.shape[1:]) for x in given)))


def _total(lgm: Callable[[Tensor], Geometry], weights: dict[str, float]) -> Any:
    def reward(z0: Float[Tensor, "n C L h w"]) -> Float[Tensor, " n"]:
        scene = lgm(z0)
        return torch.stack([w * ESTIMATED[name](scene) for name, w in weights.items()]).sum(0) / sum(weights.values())

    return reward
