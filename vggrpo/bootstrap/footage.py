"""Clips of the procedural world for training, as ordinary as web video: half are hand-held, half have moving bodies.

Kept as bytes in one safetensors file, so that a resumed run does not render them again.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from geometry.world import Motion, make_clips
from vggrpo.bootstrap.assets import load_tensors, save_tensors
from vggrpo.bootstrap.progress import Progress

JITTER = (0.0, 0.3, 0.0, 0.8)
"""Degrees of hand-held shake that clips take in turn."""
RENDERED_AT_ONCE = 16


def render_footage(
    seeds: Sequence[int], motion: Motion | None = None, scenes: int | None = None, sway: float = 0.0
) -> Iterator[UInt8[Tensor, "B 17 3 64 64"]]:
    """The clips of `seeds`, some at a time, in order. Odd seeds have moving bodies; `JITTER` goes by pairs of seeds.

    Every clip has a scene of its own, or one of `scenes` (`scene_of`). Those that would shake, half of them, do not but
    sway, if `sway` > 0: by so many degrees.
    """
    for start in range(0, len(seeds), RENDERED_AT_ONCE):
        some = seeds[start : start + RENDERED_AT_ONCE]
        clips: dict[int, Tensor] = {}
        for kind in {kind_of(seed) for seed in some}:
            alike = [seed for seed in some if kind_of(seed) == kind]
            known = None if scenes is None else [scene_of(seed, scenes) for seed in alike]
            jitter, swaying = held(kind[1], sway)
            clip = make_clips(alike, dynamic=kind[0], jitter=jitter, sway=swaying, motion=motion, scenes=known)
            clips |= dict(zip(alike, (255 * clip.video).round().byte(), strict=True))
        yield torch.stack([clips[seed] for seed in some])


def kind_of(seed: int) -> tuple[bool, float]:
    """Whether bodies move in a clip, and how much the camera shakes."""
    return seed % 2 == 1, JITTER[seed // 2 % len(JITTER)]


def held(jitter: float, sway: float) -> tuple[float, float]:
    """Shake and sway of a clip that would shake by `jitter`, where such clips sway by `sway`, if that is > 0."""
    return (0.0, sway) if jitter and sway else (jitter, 0.0)


def scene_of(seed: int, scenes: int) -> int:
    """Which of so many scenes a clip has; of every kind (`kind_of`) in turn."""
    return seed // (2 * len(JITTER)) % scenes


def cached_footage(path: Path, seeds: range) -> UInt8[Tensor, "N 17 3 64 64"]:
    """The clips of `seeds`, from `path` where they have been rendered before.

    Raises:
        ValueError: the file is damaged or holds other seeds.
    """
    if not path.exists():
        parts, progress = [], Progress()
        for part in render_footage(seeds):
            parts.append(part)
            progress(f"rendering: {sum(map(len, parts))} of {len(seeds)} clips")
        save_tensors(path, {"video": torch.cat(parts), "seeds": torch.tensor(seeds)})
    stored, _ = load_tensors(path)
    if stored["seeds"].tolist() != list(seeds):
        raise ValueError(f"{path} holds clips of other seeds than {seeds}: delete it or give the run another folder")
    return stored["video"]
