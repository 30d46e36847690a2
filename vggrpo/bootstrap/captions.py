"""Captions of the world without its pictures, with what each one says about camera and bodies."""

from collections.abc import Sequence
from dataclasses import dataclass

from geometry.world.stage import draw_take
from vggrpo.bootstrap.footage import kind_of

FRAMES, SIZE = 17, (64, 64)


@dataclass(frozen=True)
class Captioned:
    """A caption and its truth, in words."""

    text: str
    facts: dict[str, str]
    """camera, direction, pace, bodies (how many), action, and what moves: `FACTS`."""


FACTS = ("camera", "direction", "pace", "bodies", "action", "mover", "whither")
"""Camera verb; its side; slow to fast; number of bodies; what the moving body does; its name; its side."""


def draw_captions(seeds: Sequence[int]) -> list[Captioned]:
    """The captions of the clips that `render_footage` renders of the same seeds."""
    found = []
    for seed in seeds:
        take = draw_take(seed, FRAMES, SIZE, kind_of(seed)[0], None, 0.0, 1.0)
        words, moving = take.caption.split(), [body for body in take.scene.bodies if body.going]
        pace = next((word for word in ("slowly", "steadily", "fast") if word in words), "none")
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
