"""Videos from a model, tuned or not: each with its latents, its geometry and its rewards.

    out/000.mp4           the video                      out/000.ply    its points, coloured
    out/000.safetensors   z0, normalised latents         out/000.npz    c2w, intrinsics, depth, points, confidence, flow
    out/samples.json      prompt, seed and rewards of every video, and of every candidate that it was chosen from

Two ways to spend compute in place of training: best-of-n by reward, and guidance by the reward's gradient
(`guidance.guided`). The VAE is loaded for the mp4 alone.
"""

from collections.abc import Callable, Iterator
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
from vggrpo.policy.flow_policy import Complete, Encoder, Network, Told
from vggrpo.sampler import draw, normal, time_grid
from vggrpo.types import Condition, Streams

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
"""`policy.lora.WEIGHTS`, without the libraries that it needs."""
LORA_PARTS = ("", "transformer_2")
"""Folders in a LoRA's: of the only or first transformer, and of the second."""
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
    """A multiple of the VAE's stride times the transformer's patch: of 16, or of 32 for Wan2.2-TI2V-5B."""
    width: int = 64
    """See `height`."""
    max_len: int = 96
    """Tokens of a prompt; Wan's own is 512."""
    text_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which the text encoder computes."""
    prompt_cache: str | None = "runs/prompts"
    """Folder where embeddings of prompts are kept, as those of training are; None: nowhere."""
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
    first_frames: str | None = None
    """The first frame of each prompt's video, for a model that is told of one: a folder of pictures, in the order of
    their names, or safetensors with "frames" [N 3 height width], RGB in [0, 1]."""
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
    tiny_random: bool = False
    """With narrow stand-ins for a published model, by the name of its folder, which need not be here; at most 9 frames
    of 32 x 64. What comes out is worth nothing."""
    animate: str | None = None
    """Also all videos side by side, moving: a .gif, .webp or .png."""

    def check(self) -> None:
        """Raises ValueError, as `Drawing.check`."""
        super().check()
        if self.best_of < 1 or self.guidance_geometry < 0:
            raise ValueError("best_of must be >= 1, and guidance_geometry >= 0")
        if self.lora is not None and not any((Path(self.lora) / part / LORA_WEIGHTS).is_file() for part in LORA_PARTS):
            raise ValueError(f"{self.lora} has no {LORA_WEIGHTS}: it is not the folder of a LoRA")
        check_animation(self.animate)


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
