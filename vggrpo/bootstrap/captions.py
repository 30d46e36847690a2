"""Captions of the world without its pictures, with what each one says about camera and bodies."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from geometry.world.stage import draw_take
from geometry.world.trajectory import MOTIONS
from vggrpo.bootstrap.footage import kind_of, scene_of

FRAMES, SIZE = 17, (64, 64)
HELD_OUT = 7
"""Each scene keeps one in so many of the camera's commands, with their pace, for tests: `seeds_of`."""
PACES = ("none", "slowly", "steadily", "fast")


@dataclass(frozen=True)
class Captioned:
    """A caption and its truth, in words."""

    text: str
    facts: dict[str, str]
    """camera, direction, pace, bodies (how many), action, and what moves: `FACTS`."""


FACTS = ("camera", "direction", "pace", "bodies", "action", "mover", "whither")
"""Camera verb; its side; slow to fast; number of bodies; what the moving body does; its name; its side."""


def draw_captions(seeds: Sequence[int], scenes: int | None = None) -> list[Captioned]:
    """The captions of the clips that `render_footage` renders of the same seeds."""
    found = []
    for seed in seeds:
        scene = None if scenes is None else scene_of(seed, scenes)
        take = draw_take(seed, FRAMES, SIZE, kind_of(seed)[0], None, 0.0, 1.0, scene)
        words, moving = take.caption.split(), [body for body in take.scene.bodies if body.going]
        pace = next((word for word in PACES if word in words), "none")
        facts = {
            "camera": take.move.motion,
            "direction": str(take.move.side),
            "pace": pace,
            "bodies": str(len(take.scene.bodies)),
            "action": moving[0].going or "none" if moving else "none",
            "mover": moving[0].shape if moving else "none",
            "whither": take.caption.rstrip(".").split()[-1] if moving else "none",
        }
        found.append(Captioned(take.caption, facts))
    return found


def seeds_of(first: int, count: int, scenes: int | None = None, unseen: bool = False) -> list[int]:
    """The first `count` seeds from `first` on whose clips are for training, or (`unseen`) for nothing but tests.

    Without `scenes` every seed is as good as another. With them each scene has one in `HELD_OUT` of the camera's
    commands (motion, side and pace) for tests, other scenes others: of that caption the model has seen the scene, and
    the scene at another pace or from another way, and never the clip.
    """
    if scenes is None:
        return list(range(first, first + count))
    found = (seed for seed in itertools.count(first) if _held_out(seed, scenes) == unseen)
    return list(itertools.islice(found, count))


def _held_out(seed: int, scenes: int) -> bool:
    facts = draw_captions([seed], scenes)[0].facts
    command = 2 * MOTIONS.index(facts["camera"]) + (facts["direction"] == "1")
    return (scene_of(seed, scenes) + len(PACES) * command + PACES.index(facts["pace"])) % HELD_OUT == 0
