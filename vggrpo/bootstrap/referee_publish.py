"""The finished referee on disk: weights, what they measure on fresh clips, the verbs they read, and a card of all."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from geometry.models.referee import Referee, RefereeConfig
from geometry.models.referee_flow import CELL
from geometry.types import Geometry
from geometry.world import MOTIONS
from vggrpo.bootstrap.assets import read_card, save_json, save_tensors, sha256
from vggrpo.bootstrap.geometry_eval import predict, report
from vggrpo.bootstrap.geometry_publish import CONFIG, PER_KIND, WEIGHTS, card_text, held_out, load_geometry, table
from vggrpo.bootstrap.lesson import Lesson
from vggrpo.bootstrap.referee_train import VALIDATION, RefereeRecipe
from vggrpo.bootstrap.training import Training
from vggrpo.bootstrap.vae import load_vae
from vggrpo.bootstrap.vae_publish import hardware
from vggrpo.bootstrap.verbs_eval import commands, reconstructed, report_verbs

HELD_OUT = 49_500_000
"""First seed of the clips that the card's numbers come from; trained on and chosen by none of them."""
CONFUSED = ("referee, clips", "referee, after the VAE")
"""Readings whose confusion matrices are in the card."""


def publish(run: Training[Referee], recipe: RefereeRecipe, path: str) -> list[str]:
    """Write the average in fp16 to `recipe.asset` and measure what was written. Returns what to tell the user."""
    folder = Path(recipe.asset)
    save_tensors(folder / WEIGHTS, {name: x.half().contiguous() for name, x in run.average.items()})
    save_json(folder / CONFIG, asdict(recipe.model))
    card: dict[str, Any] = {
        "what": "RGB video in [0, 1] (and intrinsics, if known) to cameras, depth, confidence, points and scene flow",
        "command": f"vggrpo bootstrap referee {path}",
        "recipe": asdict(recipe),
        "seeds": {
            "training": [recipe.first_clip, recipe.first_clip + recipe.num_clips - 1],
            "held out": [HELD_OUT, HELD_OUT + PER_KIND * len(MOTIONS) - 1],
        },
        "steps": run.step,
        "plans": run.plans,
        "hours": round(run.seconds / 3600, 3),
        "hardware": hardware("cpu"),
        "parameters": sum(weight.numel() for weight in run.network.parameters()),
        "curve": run.curve,
        "curve_clips": len(VALIDATION),
        "sha256": {name: sha256(folder / name) for name in (CONFIG, WEIGHTS)},
    }
    save_json(folder / "card.json", card)
    referee = load_referee(folder)
    lessons, motions = held_out(CELL, first=HELD_OUT)
    found = report(referee, lessons, motions)
    card["held_out"] = {kind: {k: round(x, 4) for k, x in numbers.items()} for kind, numbers in found.items()}
    card["verbs"] = report_verbs(scenes(referee, lessons, recipe), commands(HELD_OUT), CONFUSED)
    save_json(folder / "card.json", card)
    text = card_text(card, "tiny-referee", "geometry/models/referee.py") + verbs_text(card["verbs"])
    (folder / "README.md").write_text(text)
    return [f"wrote {folder}", *table(card["held_out"]), *verbs_table(card["verbs"])]


def load_referee(folder: str | Path) -> Referee:
    """The embedded referee, `(video, intrinsics or None) -> Geometry`, in evaluation mode.

    Raises:
        ValueError: no card, a file that is missing, or one with other bytes than the card says.
    """
    folder = Path(folder)
    read_card(folder)
    known = json.loads((folder / CONFIG).read_text())
    network = Referee(RefereeConfig(tuple(known["widths"])))
    network.load_state_dict(load_file(folder / WEIGHTS))
    return network.requires_grad_(False).eval()


def scenes(referee: Referee, lessons: Lesson, recipe: RefereeRecipe) -> dict[str, Geometry]:
    """Clips as the world, the referee and the embedded geometry model see them; as they are, and through the VAE."""
    model, after = load_geometry(recipe.geometry), reconstructed(lessons, load_vae(Path(recipe.vae)))
    truth = Geometry(lessons.c2w, lessons.intrinsics, lessons.depth.float(), lessons.motion.float())
    return {
        "the truth": truth,
        CONFUSED[0]: predict(referee, lessons),
        CONFUSED[1]: predict(referee, after),
        "tiny-geometry, clips": predict(model, lessons),
        "tiny-geometry, after the VAE": predict(model, after),
    }


def verbs_table(found: dict[str, Any]) -> list[str]:
    """Share of right answers, Markdown."""
    rows = ["| cameras from | verb right | verb and side right |", "|---|---|---|"]
    for name, numbers in found["scores"].items():
        rows.append(f"| {name} | {numbers['verb']:.1%} | {numbers['verb and side']:.1%} |")
    return rows


def verbs_text(found: dict[str, Any]) -> str:
    """The part of the card that is about verbs."""
    lines = [
        "",
        "## The camera verb, read from the path",
        "",
        "`vggrpo.bootstrap.verbs.read_motion` compares a path with the world's families of paths, without training. Of",
        "the same held-out clips; the VAE is `assets/tiny-wan/vae`, focal lengths are given:",
        "",
        *verbs_table(found),
    ]
    for name, rows in found["confusion"].items():
        columns = list(next(iter(rows.values())))
        lines += ["", f"Clips of each true verb (rows) by what is read ({name}):", ""]
        lines += ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
        lines += [f"| {true} | " + " | ".join(str(n or "") for n in row.values()) + " |" for true, row in rows.items()]
    return "\n".join([*lines, ""])
