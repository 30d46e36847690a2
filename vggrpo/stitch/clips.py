"""What a latent geometry model is made of: clips of the world and videos of the generator, and their latents."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from jaxtyping import Float, UInt8
from torch import Tensor

from geometry.latent import LatentSpec
from geometry.stitch import Sample
from geometry.world import make_clips
from vggrpo.bootstrap.assets import load_tensors, read_card, save_tensors
from vggrpo.bootstrap.geometry_train import JITTER, RENDERED_AT_ONCE
from vggrpo.bootstrap.progress import Progress
from vggrpo.bootstrap.vae import decode, denormalise, encode, normalise
from vggrpo.data import read_prompts
from vggrpo.stitch.recipe import SamplingRecipe

AT_ONCE = 4
"""Clips in one pass of a network."""


@dataclass(frozen=True)
class Clips:
    """N clips as both models see them."""

    z: Float[Tensor, "N C L h w"]
    """Normalised."""
    video: UInt8[Tensor, "N T 3 H W"]
    """What the teacher looks at."""
    intrinsics: Float[Tensor, "N T 3 3"] | None
    """None where nobody knows them."""

    def __len__(self) -> int:
        return len(self.z)

    def sample(self, rows: Tensor | slice, L: int | None = None, *, focal: bool = True) -> Sample:
        """Some of the clips up to their latent L, which the causal VAE makes of their first 4 (L - 1) + 1 frames."""
        z = self.z[rows, :, :L]
        T = 4 * (z.shape[2] - 1) + 1
        known = None if self.intrinsics is None or not focal else self.intrinsics[rows, :T]
        return Sample(z, self.video[rows, :T].float() / 255, known)

    def batches(self) -> Iterator[Sample]:
        """All of them in order, `AT_ONCE` at a time."""
        return (self.sample(slice(start, start + AT_ONCE)) for start in range(0, len(self), AT_ONCE))


def latent_spec(vae: AutoencoderKLWan) -> LatentSpec:
    """What the latents of a Wan VAE are."""
    c = vae.config
    return LatentSpec(
        c.z_dim, c.scale_factor_temporal, c.scale_factor_spatial, tuple(c.latents_mean), tuple(c.latents_std)
    )


@torch.no_grad()
def latents_of(vae: AutoencoderKLWan, video: Float[Tensor, "N T 3 H W"]) -> Float[Tensor, "N C L h w"]:
    """Normalised latents of video in [0, 1]."""
    return torch.cat([normalise(vae, encode(vae, some)) for some in video.split(AT_ONCE)])


@torch.no_grad()
def decoded(vae: AutoencoderKLWan, z: Float[Tensor, "N C L h w"]) -> Float[Tensor, "N T 3 H W"]:
    """Video in [0, 1] of normalised latents."""
    return torch.cat([decode(vae, denormalise(vae, some)).clamp(0, 1) for some in z.split(AT_ONCE)])


def world_clips(path: Path, vae: AutoencoderKLWan, seeds: range, sway: float = 0.0) -> Clips:
    """Clips of the world, with moving bodies and hand-held as those the teacher learnt from; kept in `path`.

    With a `sway`, a third of them sway by so many degrees, in place of those that shake least.
    """
    if not path.exists():
        parts: list[dict[str, Tensor]] = []
        progress = Progress()
        for k, start in enumerate(range(seeds.start, seeds.stop, RENDERED_AT_ONCE)):
            some = range(start, min(start + RENDERED_AT_ONCE, seeds.stop))
            shaking = JITTER[k // 2 % len(JITTER)]
            shake, swaying = (0.0, sway) if sway and k // 2 % 3 == 2 else (shaking, 0.0)
            clip = make_clips(some, dynamic=k % 2 == 1, jitter=shake, sway=swaying)
            video = (255 * clip.video).round().byte()
            z, intrinsics = latents_of(vae, video.float() / 255), clip.geometry.intrinsics
            parts.append({"z": z, "video": video, "intrinsics": intrinsics})
            progress(f"rendering and encoding: {some.stop - seeds.start} of {len(seeds)} clips")
        save_tensors(path, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    return Clips(**load_tensors(path)[0])


def generated_clips(path: Path, vae: AutoencoderKLWan, wan: Path, how: SamplingRecipe) -> Clips:
    """Videos that the generator draws for prompts, decoded for the teacher; kept in `path`."""
    if not path.exists():
        z = _draw(wan, vae, how)
        save_tensors(path, {"z": z, "video": (255 * decoded(vae, z)).round().byte()})
    return Clips(**load_tensors(path)[0], intrinsics=None)


def check_alone(folder: Path) -> None:
    """Refuse a Wan that the recipe of the embedded stack cannot draw samples from.

    Raises:
        ValueError: it has two transformers, or one that must be told of a first frame.
    """
    if (folder / "transformer_2").is_dir():
        raise ValueError(
            f"{folder} has two transformers, each for some times, and the recipe of the embedded stack knows of one: "
            "take a Wan that has one (2.1, or 2.2 TI2V-5B), or a recipe with `clips`, as stitch/wan21_vggt.yaml has it"
        )
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {"in_channels": 0}
    if config["in_channels"] != (config.get("out_channels") or config["in_channels"]):
        raise ValueError(
            f"{folder} makes videos of a first frame, which the recipe of the embedded stack does not tell it of: take "
            "a Wan that takes prompts alone (T2V, or 2.2 TI2V-5B)"
        )


def check_generator(wan: Path, how: SamplingRecipe, generator: Path | None = None) -> Path:
    """The folder to draw samples with: `generator`, or `wan` itself.

    Raises:
        ValueError: samples are wanted of a generator, or for prompts, that are not there, or of another VAE.
    """
    own, wan = wan, generator or wan
    if how.num_samples and not (wan / "transformer").is_dir():
        raise ValueError(f"{wan} has no transformer/ to draw samples from: set sampling.num_samples=0 or train one")
    if how.num_samples:
        check_alone(wan)
        read_prompts(how.prompts)
        if wan != own and read_card(wan / "vae")["sha256"] != read_card(own / "vae")["sha256"]:
            raise ValueError(f"{wan} has another VAE than {own}: its latents mean other things; give one with the same")
    return wan


@torch.no_grad()
def _draw(wan: Path, vae: AutoencoderKLWan, how: SamplingRecipe) -> Float[Tensor, "N C L h w"]:
    """Latents of `num_samples` videos by the ODE with guidance; prompts are taken in turn, over and over."""
    from vggrpo.policy.encoders import load_encoders
    from vggrpo.policy.wan import WanVelocity, own_shift
    from vggrpo.sampler import draw, normal, time_grid
    from vggrpo.sft import load_transformer

    check_generator(wan, how)
    network = WanVelocity(load_transformer(wan).eval())
    encode_text = load_encoders(wan, how.max_len, "cpu").text
    seeds, progress, parts = range(how.first_seed, how.first_seed + how.num_samples), Progress(), []
    prompts = list(islice(cycle(read_prompts(how.prompts)), how.num_samples))
    grid, negative = time_grid(how.num_steps, own_shift(wan) if how.shift is None else how.shift), encode_text([""])
    for start in range(0, len(seeds), AT_ONCE):
        some = seeds[start : start + AT_ONCE]
        text = encode_text(prompts[start : start + AT_ONCE])
        noise = normal((len(some), vae.config.z_dim, 5, 8, 8), [torch.Generator().manual_seed(seed) for seed in some])
        parts.append(draw(network, noise, text, negative, grid, how.guidance_scale))
        progress(f"sampling: {start + len(some)} of {len(seeds)} videos")
    return torch.cat(parts)
