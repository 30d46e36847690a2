"""The latent geometry model of a pretrained pair, stage by stage; each is kept on disk and not done again.

    clips        latents and videos, one file each (`shelf.py`)
    closed form  every stitch point, some of them in a pass over the clips; ranked on held-out ones
    controls     the best one, and it with its numbers in another order, on clips that nothing else saw
    distilled    its connector, and LoRA on the tail, against the teacher: the same backbone without LoRA
    asset        what `load_lgm` loads: weights, how they are built, a card

Nothing of a clip is kept in memory but sums of products. Processes share clips and add up sums and gradients, so that
the model is the same on any number of them, to rounding.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from geometry.backbone import BackboneSpec, HookedBackbone
from geometry.distil import trained
from geometry.latent import Connector, LatentGeometryModel, LatentSpec
from geometry.stitch import Sample, rank_layers, stitch, student, teach
from geometry.stored import CARD, WEIGHTS, load_latent_model, save_latent_model
from geometry.types import Geometry
from vggrpo.bootstrap.assets import save_json, sha256
from vggrpo.bootstrap.progress import Progress
from vggrpo.bootstrap.training import check_same_recipe
from vggrpo.bootstrap.vae import decode, denormalise
from vggrpo.bootstrap.vae_publish import hardware
from vggrpo.geometry_model import identity, load_geometry_model
from vggrpo.launch import start as launched
from vggrpo.stitch.closed import Ranked
from vggrpo.stitch.judge import random_connector
from vggrpo.stitch.load import read_latent_spec, weights_of
from vggrpo.stitch.pair_card import card_text
from vggrpo.stitch.pair_recipe import MAY_CHANGE, PairRecipe
from vggrpo.stitch.pair_train import Distances, autocast, distances, distilling, refining, train
from vggrpo.stitch.shelf import fill, samples, split
from vggrpo.stitch.team import Team


def stitch_pair(recipe: PairRecipe, path: str, *, allow_import: bool = False) -> list[str]:
    """All stages, or those that are left. Returns what to tell the user.

    Raises:
        ValueError: whatever is wrong with the recipe, the folders it names, the launch, or what is in `out` already.
    """
    parts, vae_folder = split(recipe), Path(recipe.wan) / "vae"
    latent, vae_files = read_latent_spec(vae_folder), weights_of(vae_folder)
    team = Team(launched(recipe.launch))
    for name, rows in (("ranking", parts[1]), ("held_out", parts[2])):
        if len(rows) < team.size:
            raise ValueError(f"clips.{name} must be at least the number of processes, {team.size}, got {len(rows)}")
    backbone = load_geometry_model(recipe.geometry, allow_import)
    made_from = {"geometry": identity(recipe.geometry, backbone), "vae": vae_files}
    connector = build_connector(backbone.spec, latent, recipe)
    points = chosen_points(backbone.spec, recipe.points)
    prepare(recipe, made_from, team)
    vae = AutoencoderKLWan.from_pretrained(vae_folder, local_files_only=True, torch_dtype=torch.float32)
    vae = vae.eval().requires_grad_(False).to(team.device)
    fill(recipe, vae, team)
    backbone.to(team.device).requires_grad_(False)
    ranked = closed_forms(recipe, backbone, connector.to(team.device), points, parts[:2], team)
    found = controls(recipe, backbone, vae, ranked[0], parts[2], team)
    del vae
    model = _closed(recipe, backbone, ranked[0], team)
    refined = train(recipe, refining(recipe), model, parts, team) if recipe.refine.steps else None
    if refined is not None:
        found["refined"] = distances(recipe, lambda one: student(model, one), model, parts[2], team)
    training = train(recipe, distilling(recipe), model, parts, team)
    found["distilled"] = distances(recipe, lambda one: student(model, one), model, parts[2], team)
    card = {
        "what": f"normalised latents of the VAE in {recipe.wan} to what {recipe.geometry} says of the video",
        "command": f"vggrpo stitch {path}",
        "recipe": asdict(recipe),
        "made_from": made_from,
        "clips": {"fitted": len(parts[0]), "ranking": len(parts[1]), "held out": len(parts[2])},
        "point": model.point,
        "mode": model.connector.mode,
        "parameters": sum(p.numel() for p in trained(model).values()),
        "steps": training.step,
        "plans": training.plans,
        "hours": round(training.seconds / 3600, 3),
        "hardware": f"{team.size} x {hardware(team.device.type)}",
        "ranking": [asdict(layer) for layer in ranked],
        "refined": None if refined is None else {"plans": refined.plans, "curve": refined.curve},
        "held_out": found,
        "curve": training.curve,
    }
    if team.main:
        publish(recipe, model, card)
    team.wait()
    return [f"wrote {recipe.asset}", *card_text(card).splitlines()]


def build_connector(spec: BackboneSpec, latent: LatentSpec, recipe: PairRecipe) -> Connector:
    """A connector from latents to tokens of about the teacher's own size in pixels: see `PairRecipe.stride`."""
    stride, split_by = max(1, round(spec.patch / latent.space_stride)), max(1, round(latent.space_stride / spec.patch))
    if recipe.stride is not None:
        stride, split_by = recipe.stride, 1
    kernel = None if recipe.kernel is None else (recipe.kernel[0], recipe.kernel[1], recipe.kernel[2])
    return Connector(latent, spec.dim, mode=recipe.mode, kernel=kernel, stride=stride, split=split_by)


def chosen_points(spec: BackboneSpec, wanted: Sequence[int] | None) -> list[str]:
    """The stitch points of these numbers, in their order; all of them for None.

    Raises:
        ValueError: a number that there is not.
    """
    for number in wanted or ():
        if not 0 <= number < len(spec.stitch_points):
            raise ValueError(f"points: there are stitch points 0 to {len(spec.stitch_points) - 1}, got {number}")
    chosen = range(len(spec.stitch_points)) if wanted is None else sorted(set(wanted))
    return [spec.stitch_points[number] for number in chosen]


def prepare(recipe: PairRecipe, made_from: dict[str, Any], team: Team) -> None:
    """Bind the folder `out` to one recipe and to the models it starts from.

    Raises:
        ValueError: the folder belongs to others.
    """
    notes = Path(recipe.out) / "recipe.json"
    wanted: dict[str, Any] = asdict(recipe) | {"made from": made_from}
    del wanted["distil"]["steps"]  # a distillation may be made longer or shorter on the way
    if notes.exists():
        check_same_recipe(notes, json.loads(notes.read_text()), wanted, MAY_CHANGE)
    team.wait()
    if team.main:
        save_json(notes, wanted)
    team.wait()


def closed_forms(
    recipe: PairRecipe,
    backbone: HookedBackbone,
    connector: Connector,
    points: list[str],
    parts: Sequence[list[int]],
    team: Team,
) -> list[Ranked]:
    """Every point's closed form, best first; `at_once` points share a pass over the clips to fit and to rank on."""
    found: list[Ranked] = []
    progress = Progress()
    for begin in range(0, len(points), recipe.at_once):
        some = points[begin : begin + recipe.at_once]
        place = "closed/" + "-".join(point.replace(".", "_") for point in (some[0], some[-1]))
        folder = Path(recipe.out) / place
        if not (folder / "ranked.json").exists():
            progress(f"closed form: stitch points {begin + 1} to {begin + len(some)} of {len(points)}")
            with autocast(recipe, team):
                fitted, held = (samples(recipe, rows, team) for rows in parts)
                models = stitch(backbone, connector, fitted, some, ridge=recipe.ridge, total=team.total)
                layers = rank_layers(models, held, recipe.distil.weights, team.total)
            if team.main:
                ranked = []
                for k, layer in enumerate(layers):
                    save_latent_model(layer.model, folder / str(k), {})
                    kernel = list(layer.model.connector.conv.kernel_size)
                    facts = (layer.point, layer.r2, layer.total, layer.distances, f"{place}/{k}")
                    ranked.append(asdict(Ranked(recipe.mode, kernel, *facts)))
                save_json(folder / "ranked.json", {"layers": ranked})
        team.wait()
        found += [Ranked(**layer) for layer in json.loads((folder / "ranked.json").read_text())["layers"]]
    return sorted(found, key=lambda layer: layer.total)


def controls(
    recipe: PairRecipe, backbone: HookedBackbone, vae: AutoencoderKLWan, best: Ranked, rows: list[int], team: Team
) -> dict[str, Distances]:
    """How far each is from the teacher on clips that nothing else saw: the closed form; the same connector in another
    order, which must be far; and the teacher itself on what the VAE makes of the video, which is the way without
    stitching."""
    path = Path(recipe.out) / "controls.json"
    if not path.exists():
        model = _closed(recipe, backbone, best, team)
        found = {"closed form": distances(recipe, lambda one: student(model, one), model, rows, team)}
        random_connector(model.connector, recipe.seed)
        found["random connector"] = distances(recipe, lambda one: student(model, one), model, rows, team)

        def decoded(one: Sample) -> Geometry:
            with torch.autocast(team.device.type, enabled=False):
                video = decode(vae, denormalise(vae, one.z)).clamp(0, 1)
            return teach(model, Sample(one.z, video))

        found["teacher on decoded latents"] = distances(recipe, decoded, model, rows, team)
        if team.main:
            save_json(path, {"point": best.point, "found": found})
        team.wait()
    kept: dict[str, Distances] = json.loads(path.read_text())["found"]
    return kept


def publish(recipe: PairRecipe, model: LatentGeometryModel, card: dict[str, Any]) -> None:
    """The asset: the model, its card, and the card in words."""
    folder = Path(recipe.asset)
    save_latent_model(model, folder, {})
    save_json(folder / "card.json", card | {"sha256": {name: sha256(folder / name) for name in (CARD, WEIGHTS)}})
    (folder / "README.md").write_text(card_text(card))


def _closed(recipe: PairRecipe, backbone: HookedBackbone, best: Ranked, team: Team) -> LatentGeometryModel:
    """The closed form that was kept, around the one backbone, which must have no adapters yet."""
    model = load_latent_model(Path(recipe.out) / best.folder, backbone).to(team.device)
    model.recompute = recipe.recompute
    return model
