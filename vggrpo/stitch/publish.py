"""A latent geometry model as an asset: weights, report, pictures, and a card."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from geometry.distil import trained
from geometry.stored import CARD, WEIGHTS, save_latent_model
from vggrpo.bootstrap.assets import save_json, sha256
from vggrpo.bootstrap.geometry_publish import PER_KIND
from vggrpo.bootstrap.vae_publish import hardware
from vggrpo.stitch.card import SOURCES, card_text, fidelity_table, held_out_table
from vggrpo.stitch.draw import draw_all
from vggrpo.stitch.fidelity import FIRST_SEED, REWARDS
from vggrpo.stitch.recipe import StitchRecipe
from vggrpo.stitch.run import EVERY, HELD_OUT, KEPT, RANKED_ON, sources


def publish(recipe: StitchRecipe, path: str, found: dict[str, Any], made: dict[str, Any]) -> list[str]:
    """Write the report to `recipe.out` and the model with it to `recipe.asset`. Returns what to tell the user."""
    shipped, folder = made["shipped"], Path(recipe.asset)
    model = shipped["model"]
    save_latent_model(model, folder, {}, KEPT)
    values = found["fidelity"].pop("values")
    card: dict[str, Any] = {
        "what": "normalised latents of the embedded VAE (and intrinsics, if known) to cameras, depth, confidence, "
        "points and scene flow, without a decoder",
        "command": f"vggrpo stitch {path}",
        "recipe": asdict(recipe),
        "made_from": sources(recipe),
        "seeds": {
            "calibration": [recipe.first_clip, recipe.first_clip + recipe.num_clips - 1],
            "samples": recipe.sampling.num_samples,
            "ranking": [RANKED_ON, RANKED_ON + recipe.ranking_clips - 1],
            "held out": [HELD_OUT, HELD_OUT + 10 * PER_KIND - 1],
            "held out, every": EVERY,
            "fidelity": [FIRST_SEED, FIRST_SEED + recipe.fidelity_clips - 1],
        },
        "point": model.point,
        "mode": model.connector.mode,
        "steps": shipped["steps"],
        "plans": shipped["plans"],
        "hours": round(shipped["seconds"] / 3600, 3),
        "hardware": hardware("cpu"),
        "parameters": sum(p.numel() for p in trained(model).values()),
        "curve": shipped["curve"],
        "refined": {
            "curve": shipped["refined"]["curve"],
            "plans": shipped["refined"]["plans"],
            "hours": round(shipped["refined"]["seconds"] / 3600, 3),
        },
        "sha256": {name: sha256(folder / name) for name in (CARD, WEIGHTS)},
        "held_out": found["held_out"],
        "report": {name: part for name, part in found.items() if name != "held_out"},
    }
    card = rounded(card)
    save_json(folder / "card.json", card)
    found["fidelity"]["values"] = values
    text = card_text(card) + ("" if recipe.notes is None else "\n" + Path(recipe.notes).read_text())
    for where in (Path(recipe.out), folder):
        draw_all(found, shipped["curve"], where)
        (where / ("README.md" if where == folder else "report.md")).write_text(text)
    save_json(Path(recipe.out) / "report.json", rounded(found))
    return [
        f"wrote {folder}",
        *held_out_table(found["held_out"]["all"]),
        "",
        *fidelity_table(found["fidelity"]["spearman"], REWARDS, SOURCES),
    ]


def rounded(x: Any) -> Any:
    """Floats to four digits, all the way down."""
    if isinstance(x, dict):
        return {name: rounded(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [rounded(value) for value in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x
