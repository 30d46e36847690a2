"""Videos from a model, tuned or not: each with its latents, its geometry and its rewards.

    out/000.mp4           the video                      out/000.ply    its points, coloured
    out/000.safetensors   z0, normalised latents         out/000.npz    c2w, intrinsics, depth, points, confidence, flow
    out/samples.json      prompt, seed and rewards of every video, and of every candidate that it was chosen from

Two ways to spend compute in place of training: best-of-n by reward, and guidance by the reward's gradient
(`guidance.guided`). The VAE is loaded for the mp4 alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from geometry.latent import LatentGeometryModel
from geometry.types import Geometry
from rewards import DEFAULT, ESTIMATED, PAPER
from vggrpo.animate import check_animation
from vggrpo.grpo import group_advantage
from vggrpo.guidance import guided
from vggrpo.policy.flow_policy import TextEncoder
from vggrpo.sampler import draw, normal, time_grid
from vggrpo.types import Condition, Streams

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
"""`policy.lora.WEIGHTS`, without the libraries that it needs."""
SETS: dict[str, dict[str, float]] = {"default": DEFAULT, "paper": PAPER}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How videos are drawn, from whatever model."""

    geometry: str = "assets/tiny-geometry"
    """The geometry model whose tail the latent geometry model uses: a folder, or family:weights (`geometry_model`)."""
    allow_import: bool = False
    """Run the code that builds a geometry model (any4d)."""
    lgm: str = "assets/tiny-lgm"
    """The latent geometry model."""
    frames: int = 17
    """4 n + 1."""
    height: int = 64
    """A multiple of 16."""
    width: int = 64
    """See `height`."""
    max_len: int = 96
    """Tokens of a prompt; Wan's own is 512."""
    num_steps: int = 20
    """Steps from noise to data."""
    shift: float | None = None
    """Of the time grid; by default what the model's own scheduler says."""
    guidance_scale: float = 2.5
    """Classifier-free guidance; 1 is none."""
    negative_prompt: str = ""
    """What it moves away from."""
    guide_every: int = 4
    """Steps between two that are guided by geometry."""
    rewards: Literal["default", "paper"] = "default"
    """Which rewards choose and guide."""
    seed: int = 0
    """Of the noise: candidate k of prompt b is the same whatever else is sampled."""
    device: str = "cpu"
    """Or cuda."""

    def check(self) -> None:
        """Raises ValueError for what cannot be; not when built, so that the command line can say it in one line."""
        time_grid(self.num_steps, 1.0 if self.shift is None else self.shift)
        if self.guide_every < 1:
            raise ValueError(f"guide_every must be >= 1, got {self.guide_every}")


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Drawing):
    """What is sampled, and how."""

    prompts: str
    """Text file, one prompt on each line."""
    out: str
    """Folder of the videos."""
    model: str = "assets/tiny-wan"
    """Wan folder in diffusers layout."""
    lora: str | None = None
    """Folder of a LoRA, as `vggrpo train` and `vggrpo sft` write it."""
    guidance_geometry: float = 0.0
    """Scale of the reward's gradient; 0 is none."""
    best_of: int = 1
    """Candidates for each prompt; the one whose rewards are best is kept."""
    animate: str | None = None
    """Also all videos side by side, moving: a .gif, .webp or .png."""

    def check(self) -> None:
        """Raises ValueError, as `Drawing.check`."""
        super().check()
        if self.best_of < 1 or self.guidance_geometry < 0:
            raise ValueError("best_of must be >= 1, and guidance_geometry >= 0")
        if self.lora is not None and not (Path(self.lora) / LORA_WEIGHTS).is_file():
            raise ValueError(f"{self.lora} has no {LORA_WEIGHTS}: it is not the folder of a LoRA")
        check_animation(self.animate)


class Models(NamedTuple):
    """What sampling needs."""

    network: nn.Module
    """A `flow_policy.Network`."""
    encode: TextEncoder
    lgm: LatentGeometryModel
    latent_shape: tuple[int, ...]
    grid: Float[Tensor, " times"]
    """From noise to data."""


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
        ValueError: a file that is missing or damaged, a size that the VAE's strides do not divide.
    """
    from vggrpo.policy.wan import WanVelocity, cached_prompts, latent_shape, load_encoders, own_shift
    from vggrpo.sft import load_transformer
    from vggrpo.stitch.load import load_lgm

    cfg.check()
    folder = Path(cfg.model)
    shape = latent_shape(folder, cfg.frames, cfg.height, cfg.width)
    lgm = load_lgm(cfg.lgm, cfg.geometry, folder / "vae", cfg.allow_import).to(cfg.device)
    transformer = load_transformer(folder)
    for side, patch, name in zip(shape[2:], transformer.config.patch_size[1:], ("height", "width"), strict=True):
        if side % patch:
            given = getattr(cfg, name)
            raise ValueError(f"{name} must be a multiple of {given // side * patch} for {folder}, got {given}")
    if cfg.lora is not None:
        transformer.load_lora_adapter(cfg.lora, prefix="transformer", weight_name=LORA_WEIGHTS)
    encode = cached_prompts(load_encoders(folder, cfg.max_len, cfg.device), [*prompts, cfg.negative_prompt])
    network = WanVelocity(transformer.requires_grad_(False).eval()).to(cfg.device)
    grid = time_grid(cfg.num_steps, own_shift(folder) if cfg.shift is None else cfg.shift)
    return Models(network, encode, lgm, shape, grid)


def sample_videos(models: Models, prompts: list[str], cfg: SampleConfig) -> Iterator[Sampled]:
    """The best of `best_of` candidates for each prompt."""
    weights, grid = SETS[cfg.rewards], models.grid
    for b, prompt in enumerate(prompts):
        streams = [Streams(cfg.seed, 0).member(b, k) for k in range(cfg.best_of)]
        z = normal((cfg.best_of, *models.latent_shape), streams).to(cfg.device)
        under, negative = (models.encode(Condition([text])).to(cfg.device) for text in (prompt, cfg.negative_prompt))
        by_reward = None
        if cfg.guidance_geometry > 0:
            reward = _total(models.lgm, weights)
            by_reward = partial(guided, reward=reward, scale=cfg.guidance_geometry, grid=grid, every=cfg.guide_every)
        z0 = draw(models.network, z, under, negative, grid, cfg.guidance_scale, by_reward)
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


def _total(lgm: LatentGeometryModel, weights: dict[str, float]) -> Any:
    def reward(z0: Float[Tensor, "n C L h w"]) -> Float[Tensor, " n"]:
        scene = lgm(z0)
        return torch.stack([w * ESTIMATED[name](scene) for name, w in weights.items()]).sum(0) / sum(weights.values())

    return reward
