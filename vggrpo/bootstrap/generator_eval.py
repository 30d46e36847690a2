"""What the generator's samples are worth: are they sharp, and does the camera do what the caption says?

Samples come from `sampler.draw` on the scheduler's own grid: a test holds them to what WanPipeline gives.
Whoever reads the camera's motion off a video is handed in.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from geometry.world import MOTIONS
from vggrpo.bootstrap.captions import draw_captions, seeds_of
from vggrpo.bootstrap.footage import render_footage
from vggrpo.bootstrap.referee_publish import load_referee
from vggrpo.bootstrap.text import TextStage, encode_prompts
from vggrpo.bootstrap.vae import decode, denormalise
from vggrpo.bootstrap.vae_eval import reconstruct
from vggrpo.bootstrap.verbs_eval import Verb, read
from vggrpo.policy.wan import WanVelocity
from vggrpo.sampler import draw

HELD_OUT = 42_000_000
"""First seed of the captions that the card's numbers come from."""
AT_ONCE = 8
"""Clips that are sampled or decoded together."""

Reader = Callable[[Float[Tensor, "B T 3 H W"]], list[Verb]]
"""Says it of videos in [0, 1]."""


def load_reader(folder: Path) -> Reader:
    """The camera's motion as the referee of an asset folder sees it, which does not know the focal length.

    Raises:
        ValueError: a file is missing or has been changed (`assets.read_card`).
    """
    referee = load_referee(folder)
    return lambda video: read(referee(video))


@dataclass(frozen=True)
class Sampling:
    """How clips are sampled."""

    num_steps: int = 20
    """Of the ODE, one after the other on the scheduler's grid."""
    guidance: float = 3.0
    """Classifier-free; 1 is none, 0 unconditional."""
    max_len: int = 96
    """Tokens of a prompt."""
    seed: int = 0
    """Of the noise."""


@torch.no_grad()
def sample_latents(
    pipe: WanPipeline, captions: Sequence[str], sampling: Sampling, shape: tuple[int, int, int] = (5, 8, 8)
) -> Float[Tensor, "N C L h w"]:
    """Normalised latents of captions, `shape` = (L, h, w); the noise of a caption depends on its place alone."""
    stage = TextStage(pipe.tokenizer, pipe.text_encoder)
    rng = torch.Generator().manual_seed(sampling.seed)
    noise = torch.randn(len(captions), pipe.transformer.config.in_channels, *shape, generator=rng)
    negative = encode_prompts(stage, [""], sampling.max_len)[0]
    grid = scheduler_grid(pipe.scheduler, sampling.num_steps)

    network, parts = WanVelocity(pipe.transformer), []
    for start in range(0, len(captions), AT_ONCE):
        text = encode_prompts(stage, captions[start : start + AT_ONCE], sampling.max_len)[0]
        parts.append(draw(network, noise[start : start + AT_ONCE], text, negative, grid, sampling.guidance))
    return torch.cat(parts)


def scheduler_grid(scheduler: FlowMatchEulerDiscreteScheduler, num_steps: int) -> Float[Tensor, " {num_steps}+1"]:
    """The times that a pipeline with this scheduler walks through."""
    own = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    own.set_timesteps(num_steps)
    sigmas: Tensor = own.sigmas
    return sigmas


@torch.no_grad()
def decoded(vae: AutoencoderKLWan, z0: Float[Tensor, "N C L h w"]) -> Float[Tensor, "N T 3 H W"]:
    """Videos in [0, 1] of normalised latents."""
    return torch.cat([decode(vae, denormalise(vae, some)) for some in z0.split(AT_ONCE)]).clamp(0, 1)


def sharpness(video: Float[Tensor, "N T 3 H W"]) -> float:
    """Mean squared difference of neighbouring pixels, over all clips."""
    return sum(video.diff(dim=axis).square().mean().item() for axis in (-1, -2))


def held_out_seeds(count: int, scenes: int | None, first: int = HELD_OUT) -> list[int]:
    """Seeds of clips that no generator was trained on; in shared scenes the camera does what it never did there."""
    return seeds_of(first, count, scenes, unseen=scenes is not None)


def commands(seeds: Sequence[int], scenes: int | None = None) -> tuple[list[str], list[Verb]]:
    """Captions of seeds and what each tells the camera to do."""
    drawn = draw_captions(seeds, scenes)
    return [c.text for c in drawn], [(c.facts["camera"], int(c.facts["direction"])) for c in drawn]


def recovered(found: Sequence[Verb], told: Sequence[Verb]) -> dict[str, Any]:
    """Shares of clips whose motion, and whose motion and side, are those of the caption; the latter by motion."""
    hits = [one == other for one, other in zip(found, told, strict=True)]
    kinds = [one[0] == other[0] for one, other in zip(found, told, strict=True)]
    by_motion = {
        motion: [hit for hit, (name, _) in zip(hits, told, strict=True) if name == motion] for motion in MOTIONS
    }
    return {
        "verb": round(sum(hits) / len(hits), 4),
        "motion": round(sum(kinds) / len(kinds), 4),
        "by_motion": {name: round(sum(some) / len(some), 4) for name, some in by_motion.items() if some},
    }


def evaluate_generator(
    pipe: WanPipeline,
    reader: Reader,
    num_clips: int,
    sampling: Sampling,
    scenes: int | None = None,
    first_seed: int = HELD_OUT,
    sway: float = 0.0,
) -> dict[str, Any]:
    """Sharpness and obedience of `num_clips` samples of held-out captions, beside ceilings and controls.

    The ceiling is the rendered clip of the same seed through the VAE: what a perfect generator would give. It is
    hand-held (`sway` as in `render_footage`) and has moving bodies as often as the training clips. Controls: the same
    samples against each other's captions; unconditional samples; for sharpness, the ceiling blurred by 3 x 3.
    """
    seeds = held_out_seeds(num_clips, scenes, first_seed)
    captions, told = commands(seeds, scenes)

    def read_all(video: Float[Tensor, "N T 3 H W"]) -> list[Verb]:
        return [verb for some in video.split(AT_ONCE) for verb in reader(some)]

    rendered = torch.cat(list(render_footage(seeds, scenes=scenes, sway=sway))).float() / 255
    ceiling = reconstruct(pipe.vae, rendered).clamp(0, 1)
    samples = decoded(pipe.vae, sample_latents(pipe, captions, sampling))
    free = decoded(pipe.vae, sample_latents(pipe, [""] * num_clips, sampling))
    blurred = torch.nn.functional.avg_pool3d(ceiling, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
    unit = sharpness(ceiling)
    found = read_all(samples)
    return {
        "clips": num_clips,
        "first_seed": first_seed,
        "sharpness": round(sharpness(samples) / unit, 4),
        **recovered(found, told),
        "read_as": _confusion(found, told),
        "ceiling": recovered(read_all(ceiling), told),
        "rendered": recovered(read_all(rendered), told),
        "controls": {
            "other captions": recovered(found, told[1:] + told[:1])["verb"],
            "unconditional": recovered(read_all(free), told)["verb"],
            "blurred": round(sharpness(blurred) / unit, 4),
        },
    }


def draw_sheet(video: Float[Tensor, "N 17 3 64 64"], path: Path, columns: int = 2) -> None:
    """A contact sheet: frames 0, 4, 8, 12 and 16 of each clip in a row, `columns` clips side by side."""
    strips = [torch.cat(list(clip[::4]), dim=-1) for clip in video]
    strips = [torch.nn.functional.pad(strip, (0, 6, 0, 4), value=1.0) for strip in strips]
    rows = [torch.cat(strips[start : start + columns], dim=-1) for start in range(0, len(strips), columns)]
    picture = torch.cat(rows, dim=-2)
    Image.fromarray((255 * picture.movedim(0, -1).clamp(0, 1)).round().byte().cpu().numpy()).save(path, optimize=True)


def _confusion(found: Sequence[Verb], told: Sequence[Verb]) -> dict[str, dict[str, int]]:
    """How often each commanded motion was read as which; `-` marks the wrong side of the right motion."""
    table: dict[str, Counter[str]] = {}
    for one, other in zip(found, told, strict=True):
        name = one[0] if one == other or one[0] != other[0] else f"{one[0]} -"
        table.setdefault(other[0], Counter())[name] += 1
    return {motion: dict(table[motion].most_common()) for motion in MOTIONS if motion in table}
