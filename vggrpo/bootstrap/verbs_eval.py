"""How often the verb and the side of a camera are read right, from the truth and from models, beside controls."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from geometry.types import Geometry
from geometry.world import MOTIONS
from geometry.world.stage import draw_take
from vggrpo.bootstrap.geometry_publish import held_out_groups
from vggrpo.bootstrap.lesson import Lesson
from vggrpo.bootstrap.vae_eval import reconstruct
from vggrpo.bootstrap.verbs import read_motion

Verb = tuple[str, int]
"""A motion and its side."""


def commands(first: int) -> list[Verb]:
    """What the cameras of `held_out(first=first)` were told to do."""
    found: list[Verb] = []
    for seeds, motion, dynamic in held_out_groups(first):
        moves = [draw_take(seed, 17, (64, 64), dynamic, motion, 0.0, 1.0).move for seed in seeds]
        found += [(move.motion, move.side) for move in moves]
    return found


def read(scene: Geometry) -> list[Verb]:
    """The verb of each clip of a batch."""
    return list(zip(*read_motion(scene.c2w, scene.depth), strict=True))


def reconstructed(lessons: Lesson, vae: AutoencoderKLWan) -> Lesson:
    """The same lessons, their videos encoded and decoded."""
    return replace(lessons, video=(255 * reconstruct(vae, lessons.video.float() / 255).clamp(0, 1)).round().byte())


def score(found: Sequence[Verb], wanted: Sequence[Verb]) -> dict[str, float]:
    """Share of clips whose verb is right, and whose verb and side both are."""
    pairs = list(zip(found, wanted, strict=True))
    return {
        "verb": sum(a[0] == b[0] for a, b in pairs) / len(pairs),
        "verb and side": sum(a == b for a, b in pairs) / len(pairs),
    }


def confusion(found: Sequence[Verb], wanted: Sequence[Verb]) -> dict[str, dict[str, int]]:
    """Of the clips of each true verb, how many were read as which; `wrong side` counts within the right verb."""
    table: dict[str, dict[str, int]] = {}
    for motion in MOTIONS:
        mine = [(a, b) for a, b in zip(found, wanted, strict=True) if b[0] == motion]
        counts = Counter(a[0] for a, _ in mine)
        flipped = sum(a[0] == b[0] and a[1] != b[1] for a, b in mine)
        table[motion] = {name: counts[name] for name in MOTIONS} | {"wrong side": flipped}
    return table


def report_verbs(scenes: dict[str, Geometry], wanted: Sequence[Verb], confused: Sequence[str]) -> dict[str, Any]:
    """Scores of every scene by name, with controls, and the confusion matrices of those in `confused`.

    Controls: the answer that is right most often, for every clip; and the first scene's answers for other clips.
    """
    found = {name: read(scene) for name, scene in scenes.items()}
    scores = {name: score(verbs, wanted) for name, verbs in found.items()}
    usual = Counter(wanted).most_common(1)[0][0]
    scores["control: one answer for all"] = score([usual] * len(wanted), wanted)
    order = torch.randperm(len(wanted), generator=torch.Generator().manual_seed(0)).tolist()
    first = next(iter(found.values()))
    scores["control: answers of other clips"] = score([first[k] for k in order], wanted)
    return {"scores": scores, "confusion": {name: confusion(found[name], wanted) for name in confused}}
