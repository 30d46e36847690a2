"""From a rollout's latents to its scene, some videos at a time."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from geometry.types import Geometry
from vggrpo.memory import Agree, OutOfMemory, agreed, halved


class Scenes:
    """A latent geometry model for the trainer: [B K *latent] -> Geometry with axes [B K ...].

    Out of memory, it goes on with half as many at once, from then on: the same scene, for videos do not meet in it.
    """

    def __init__(self, lgm: Callable[[Tensor], Geometry], at_once: int, agree: Agree = bool) -> None:
        """
        Args:
            at_once: videos.
            agree: asked after every micro-batch (`Run.agree`).
        """
        self.lgm, self.at_once, self.agree = lgm, at_once, agree

    def __call__(self, z0: Tensor) -> Geometry:
        """The scene of all videos.

        Raises:
            ValueError: one video does not fit in memory.
        """
        while True:
            try:
                every = z0.flatten(0, 1).split(self.at_once)
                scene = concatenated([agreed(lambda some=some: self.lgm(some), self.agree) for some in every])  # type: ignore[misc]
                return scene.map(lambda x: x.unflatten(0, z0.shape[:2]))
            except OutOfMemory:
                self.at_once = halved(self.at_once, "video.judged_at_once")
                print(f"out of memory in the geometry model: {self.at_once} video(s) at once now", file=sys.stderr)


def concatenated(scenes: Sequence[Geometry]) -> Geometry:
    """Geometries of clips, one after the other along their first axis."""
    first = scenes[0]
    names = [name for name, value in vars(first).items() if isinstance(value, Tensor)]
    joined: dict[str, Any] = {name: torch.cat([getattr(scene, name) for scene in scenes]) for name in names}
    return replace(first, **joined)
