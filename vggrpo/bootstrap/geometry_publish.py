"""The finished geometry model on disk: weights, what they measure on fresh clips, and a card that says both."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from geometry.backbone import HookedBackbone
from geometry.models.tiny import TinyConfig, TinyGeometry, call, parse, spec
from geometry.world import MOTIONS, Motion, make_clips
from vggrpo.bootstrap.assets import read_card, save_json, save_tensors, sha256
from vggrpo.bootstrap.geometry_eval import report
from vggrpo.bootstrap.geometry_recipe import GeometryRecipe
from vggrpo.bootstrap.geometry_train import VALIDATION
from vggrpo.bootstrap.lesson import Lesson, lesson
from vggrpo.bootstrap.training import Training
from vggrpo.bootstrap.vae_publish import hardware

WEIGHTS, CONFIG = "model.safetensors", "config.json"
HELD_OUT = 9_500_000
"""First seed of the clips that the card's numbers come from; trained on and chosen by none of them."""
PER_KIND = 8
"""Clips of each camera motion, as many with moving bodies as without."""
BARS = {
    "rotation": ("neighbour rotation, degrees, median", 0.25, -1),
    "turning": ("the same where the camera turns", None, -1),
    "clip_rotation": ("rotation over the clip, degrees, median", 2.5, -1),
    "direction": ("translation direction, degrees, median", 10.0, -1),
    "speed": ("speed per frame, Spearman", 0.94, 1),
    "abs_rel": ("depth AbsRel", 0.25, -1),
    "dynamic": ("dynamic mask, AUC", 0.85, 1),
}
"""What is measured, the bar for a model trained on a CPU, and whether more (1) or less (-1) is better."""


def publish(run: Training[TinyGeometry], recipe: GeometryRecipe, path: str) -> list[str]:
    """Write the run's average to `recipe.asset` and measure what was written. Returns what to tell the user."""
    folder = Path(recipe.asset)
    with run.averaged() as network:
        save_tensors(folder / WEIGHTS, {name: x.contiguous() for name, x in network.state_dict().items()})
    save_json(folder / CONFIG, asdict(recipe.model))
    card: dict[str, Any] = {
        "what": "RGB video in [0, 1] (and intrinsics, if known) to cameras, depth, confidence, points and scene flow",
        "command": f"vggrpo bootstrap geometry {path}",
        "recipe": asdict(recipe),
        "seeds": {
            "training": [recipe.first_clip, recipe.first_clip + recipe.num_clips - 1],
            "held out": [HELD_OUT, HELD_OUT + PER_KIND * len(MOTIONS) - 1],
        },
        "steps": run.step,
        "plans": run.plans,
        "hours": round(run.seconds / 3600, 3),
        "hardware": hardware(recipe.device),
        "parameters": sum(weight.numel() for weight in run.network.parameters()),
        "curve": run.curve,
        "curve_clips": len(VALIDATION),
        "sha256": {name: sha256(folder / name) for name in (CONFIG, WEIGHTS)},
    }
    save_json(folder / "card.json", card)
    backbone = load_geometry(folder).to(recipe.device)
    found = report(backbone, *held_out(recipe.model.patch, recipe.device))
    card["held_out"] = {kind: {k: round(x, 4) for k, x in numbers.items()} for kind, numbers in found.items()}
    save_json(folder / "card.json", card)
    text = card_text(card, "tiny-geometry", "geometry/models/tiny.py")
    (folder / "README.md").write_text(text + ("" if recipe.notes is None else "\n" + Path(recipe.notes).read_text()))
    return [f"wrote {folder}", *table(card["held_out"])]


def load_geometry(folder: str | Path) -> HookedBackbone:
    """The embedded geometry model, `(video, intrinsics or None) -> Geometry`, in evaluation mode.

    Raises:
        ValueError: no card, a file that is missing, one with other bytes than the card says, or another model.
    """
    folder = Path(folder)
    read_card(folder)
    try:
        known = json.loads((folder / CONFIG).read_text())
        config = TinyConfig(**{**known, "pairs": tuple(known["pairs"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} is not an embedded geometry model ({type(error).__name__}: {error}): give assets/tiny-geometry, "
            "or family:weights for another one"
        ) from None
    network = TinyGeometry(config)
    network.load_state_dict(load_file(folder / WEIGHTS))
    return HookedBackbone(network, spec(config), call, parse).eval()


def held_out(patch: int, device: str = "cpu", first: int = HELD_OUT) -> tuple[Lesson, list[str]]:
    """Steady clips of every camera motion, half of them with moving bodies, and the motion of each."""
    parts, motions = [], []
    for seeds, motion, dynamic in held_out_groups(first):
        parts.append(lesson(make_clips(seeds, dynamic=dynamic, motion=motion), patch))
        motions += [motion] * len(seeds)
    whole = {name: torch.cat([getattr(part, name) for part in parts]).to(device) for name in vars(parts[0])}
    return Lesson(**whole), list(motions)


def held_out_groups(first: int) -> Iterator[tuple[range, Motion, bool]]:
    """Seeds of held-out clips, with their camera motion and whether bodies move: half a kind at a time."""
    for family, motion in enumerate(MOTIONS):
        start = first + PER_KIND * family
        yield range(start, start + PER_KIND // 2), motion, False
        yield range(start + PER_KIND // 2, start + PER_KIND), motion, True


def table(found: dict[str, dict[str, float]]) -> list[str]:
    """One row for each kind of clip, Markdown."""
    rows = ["| clips | " + " | ".join(BARS) + " |", "|---|" + "---|" * len(BARS)]
    for kind, numbers in found.items():
        cells = ["-" if numbers[name] != numbers[name] else f"{numbers[name]:.2f}" for name in BARS]
        rows.append(f"| {kind} | " + " | ".join(cells) + " |")
    return rows


def card_text(card: dict[str, Any], name: str, source: str) -> str:
    """The card for people, of the asset `name` whose network is in the file `source`."""
    whole = card["held_out"]["all"]
    rows = ["| | measured | bar | |", "|---|---|---|---|"]
    for key, (words, bar, sign) in BARS.items():
        met = "" if bar is None else "met" if sign * (whole[key] - bar) >= 0 else "missed"
        rows.append(f"| {words} | {whole[key]:.3f} | {'' if bar is None else bar} | {met} |")
    curve = ["| step | minutes | " + " | ".join(BARS) + " |", "|---|---|" + "---|" * len(BARS)]
    for point in card["curve"]:
        cells = [f"{point[key]:.2f}" if key in point else "" for key in BARS]
        curve.append(f"| {point['step']} | {point['seconds'] / 60:.1f} | " + " | ".join(cells) + " |")
    first, last = card["seeds"]["training"]
    lines = [
        f"# {name}",
        "",
        f"{card['what']}. {card['parameters']:,} parameters; `{source}` says how it works.",
        "Depth is in units of about the clip's median depth.",
        "",
        f"Made by `{card['command']}`: {card['steps']} steps, {60 * card['hours']:.0f} minutes of training,",
        f"{card['hardware']}, clips of seeds {first} to {last} of the procedural world. Files: "
        + ", ".join(f"`{file}` ({digest[:12]}...)" for file, digest in card["sha256"].items())
        + ".",
        "",
        *_replanned(card["plans"]),
        f"## Held out: {PER_KIND} clips of each camera motion, seeds {card['seeds']['held out']}",
        "",
        *rows,
        "",
        "The bars are those of a model trained on a CPU. Half of the world's camera motions do not turn, so the",
        "medians of rotation flatter whoever answers that nothing turns (see the constant control): `turning` counts",
        "only pairs of frames whose true rotation exceeds 0.2 degrees.",
        "",
        *table(card["held_out"]),
        "",
        f"## Curve ({card['curve_clips']} clips of other seeds, the running average of the weights)",
        "",
        *curve,
        "",
    ]
    return "\n".join(lines)


def _replanned(plans: list[list[int]]) -> list[str]:
    """A run whose length was changed on the way is not quite the one that its recipe gives from nothing."""
    if len(plans) == 1:
        return []
    told = ", ".join(f"{steps} from step {step} on" for step, steps in plans[1:])
    return [f"The number of steps, which schedules go by, was planned as {plans[0][1]} and then changed: {told}.", ""]
