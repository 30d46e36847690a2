"""`vggrpo stitch`, stage by stage: clips, closed forms, distillation, report. What is on disk is not made again."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from geometry.backbone import HookedBackbone
from geometry.distil import trained
from geometry.latent import LatentGeometryModel, TimeMode
from geometry.models.tiny import TinyGeometry
from geometry.stitch import stitch
from vggrpo.bootstrap.assets import load_tensors, read_card, save_json, save_tensors
from vggrpo.bootstrap.geometry_eval import measure
from vggrpo.bootstrap.geometry_publish import held_out, load_geometry
from vggrpo.bootstrap.geometry_recipe import GeometryRecipe
from vggrpo.bootstrap.geometry_train import lessons_of, start_run, train_step
from vggrpo.bootstrap.progress import Progress
from vggrpo.bootstrap.training import check_same_recipe
from vggrpo.stitch.clips import Clips, check_generator, generated_clips, latent_spec, latents_of, world_clips
from vggrpo.stitch.closed import Ranked, build_connector, choose, load_closed, solve_and_rank
from vggrpo.stitch.cost import cost
from vggrpo.stitch.fidelity import fidelity, score
from vggrpo.stitch.judge import HeldOut, at_latents, in_parts, judge, random_connector
from vggrpo.stitch.noise import robustness
from vggrpo.stitch.recipe import MAY_CHANGE, ConnectorRecipe, StitchRecipe
from vggrpo.stitch.refined import load_refined, refining, train_refine
from vggrpo.stitch.train import start_distil, train_distil

HELD_OUT = 9_700_000
"""First seed of the clips that the report's numbers come from; fitted, ranked and distilled on none of them."""
EVERY = 2
"""One in so many of them is used: half of each camera motion's, half of those with moving bodies."""
RANKED_ON = 9_900_000
"""First seed of the clips that layers are ranked on."""
KEPT = torch.float16
"""What the asset's weights are kept in, and so what the report is of."""
BARELY_STEPS, BARELY_CLIPS = 25, 64
"""Of the control's training: a geometry model that has hardly begun, stitched as the real one is."""


def sources(recipe: StitchRecipe) -> dict[str, dict[str, str]]:
    """sha256 of the files that the model is made from.

    Raises:
        ValueError: a file is missing or is not the one its card speaks of.
    """
    folders = {"geometry": Path(recipe.geometry), "vae": Path(recipe.wan) / "vae"}
    return {name: read_card(folder)["sha256"] for name, folder in folders.items()}


def prepare(recipe: StitchRecipe) -> None:
    """Bind the folder `out` to one recipe and to the files it starts from.

    Raises:
        ValueError: the folder belongs to others; samples are wanted and there is no generator; no notes where the
            recipe says.
    """
    _generator(recipe)
    if recipe.notes is not None and not Path(recipe.notes).is_file():
        raise ValueError(f"no notes at {recipe.notes}: write them there, or leave `notes` out of the recipe")
    notes = Path(recipe.out) / "recipe.json"
    wanted: dict[str, Any] = asdict(recipe) | {"made from": sources(recipe)}
    del wanted["distil"]["steps"]  # a distillation may be made longer or shorter on the way
    if notes.exists():
        check_same_recipe(notes, json.loads(notes.read_text()), wanted, MAY_CHANGE)
    save_json(notes, wanted)


def make_model(recipe: StitchRecipe, vae: AutoencoderKLWan) -> tuple[list[Ranked], dict[str, Any]]:
    """Every stage up to the distilled models: the ranking, and what came of each time mode that was distilled.

    Returns:
        "shipped" and "latent": each a dict with its Ranked, the model, and curve and seconds of its distillation.
    """
    out = Path(recipe.out)
    seeds = range(recipe.first_clip, recipe.first_clip + recipe.num_clips)
    clips = world_clips(out / "world.safetensors", vae, seeds, recipe.sway)
    unseen = range(RANKED_ON, RANKED_ON + recipe.ranking_clips)
    held = world_clips(out / "ranking.safetensors", vae, unseen)
    everything = [clips]
    if recipe.sampling.num_samples:
        everything.append(generated_clips(out / "samples.safetensors", vae, _generator(recipe), recipe.sampling))
    ranked = solve_and_rank(recipe, latent_spec(vae), everything, held)
    modes: tuple[TimeMode, ...] = ("frames", "phases") if recipe.mode is None else (recipe.mode,)
    made = {"shipped": _distilled(recipe, choose(ranked, modes, recipe.point), recipe.distil.steps, everything, held)}
    if any(layer.mode == "latent" for layer in ranked):
        made["latent"] = _distilled(
            recipe, choose(ranked, ("latent",), recipe.point), recipe.latent_steps, everything, held
        )
    return ranked, made


def report(recipe: StitchRecipe, vae: AutoencoderKLWan, ranked: list[Ranked], made: dict[str, Any]) -> dict[str, Any]:
    """All that is measured; each part is kept in `out/report` until the models change."""
    out, progress = Path(recipe.out), Progress()
    teacher, shipped = load_geometry(recipe.geometry), made["shipped"]["model"]
    closed = load_closed(recipe, made["shipped"]["ranked"])
    shuffled = load_closed(recipe, made["shipped"]["ranked"])
    random_connector(shuffled.connector)
    lessons, motions = held_out(teacher.spec.patch, first=HELD_OUT)
    lessons, motions = lessons.map(lambda x: x[::EVERY]), motions[::EVERY]
    clips = HeldOut(lessons, motions, latents_of(vae, lessons.video.float() / 255))
    stamp: dict[str, Any] = {"steps": {name: made[name]["steps"] for name in made}, "refined": recipe.refine.steps}
    stamp |= {"fidelity_clips": recipe.fidelity_clips, "noise_clips": recipe.noise_clips}

    def once(name: str, compute: Callable[[], Any]) -> Any:
        path = out / "report" / f"{name}.json"
        if path.exists() and (kept := json.loads(path.read_text()))["of"] == stamp:
            return kept["found"]
        progress(f"report: {name}")
        found = compute()
        save_json(path, {"of": stamp, "found": found})
        return found

    models = {"random connector": shuffled, "closed form": closed}
    if recipe.refine.steps:
        models["refined"] = load_refined(recipe, made["shipped"]["ranked"])
    models["distilled"] = shipped
    found = {"ranking": [asdict(layer) for layer in ranked]}
    found["held_out"] = once("held_out", lambda: judge(teacher, models, vae, clips))
    found["modes"] = once("modes", lambda: _modes(recipe, vae, teacher, made, clips))
    few = _spread(clips, recipe.noise_clips)
    found["noise"] = once("noise", lambda: robustness(vae, teacher, shipped, few))
    found["fidelity"] = once("fidelity", lambda: _fidelity(recipe, vae, teacher, shipped, progress))
    return found


def _generator(recipe: StitchRecipe) -> Path:
    return check_generator(
        Path(recipe.wan), recipe.sampling, None if recipe.generator is None else Path(recipe.generator)
    )


def _distilled(recipe: StitchRecipe, chosen: Ranked, steps: int, clips: list[Clips], held: Clips) -> dict[str, Any]:
    """A closed-form model, refined and then trained; as it is for 0 steps of both."""
    model, progress = load_closed(recipe, chosen), Progress()
    nothing: dict[str, Any] = {"curve": [], "plans": [], "seconds": 0.0}
    found: dict[str, Any] = {"ranked": chosen, "model": model, "steps": steps, "refined": nothing} | nothing
    if recipe.refine.steps:
        path = Path(recipe.out) / f"refine-{chosen.mode}.safetensors"
        training = refining(recipe, model, path)
        for numbers in train_refine(training, recipe, path, clips, held):
            left = training.seconds / training.step * (recipe.refine.steps - training.step) / 60
            progress(
                f"{chosen.mode}: refining, step {training.step} of {recipe.refine.steps}  loss {numbers['loss']:.4f}  "
                f"held out R^2 {training.curve[-1]['r2']:.4f}  {left:.0f} min left"
            )
        found["refined"] = {"curve": training.curve, "plans": training.plans, "seconds": training.seconds}
    if steps:
        path = Path(recipe.out) / f"distil-{chosen.mode}.safetensors"
        training = start_distil(recipe, model, steps, path)
        for numbers in train_distil(training, recipe, steps, path, clips, held):
            left = training.seconds / training.step * (steps - training.step) / 60
            progress(
                f"{chosen.mode}: step {training.step} of {steps}  loss {numbers['loss']:.3f}  "
                f"held out {training.curve[-1]['total']:.3f}  {left:.0f} min left"
            )
        found |= {"curve": training.curve, "plans": training.plans, "seconds": training.seconds}
    with torch.no_grad():
        for weight in trained(model).values():
            weight.copy_(weight.to(KEPT))
    return found


def _modes(
    recipe: StitchRecipe, vae: AutoencoderKLWan, teacher: HookedBackbone, made: dict[str, Any], clips: HeldOut
) -> dict[str, Any]:
    """A map per video frame and a map per latent frame, side by side: both judged at the frames of the latter.

    The teacher of the second kind sees those frames only, and so do its errors.
    """
    few = clips.some(slice(0, None, 2))
    there, known = few.lessons.map(lambda x: x[:, ::4]), few.lessons.intrinsics
    models = {made["shipped"]["ranked"].mode: made["shipped"]["model"]}
    scenes = {
        "teacher, all frames": at_latents(in_parts(teacher, few.video, known)),
        next(iter(models)): at_latents(in_parts(made["shipped"]["model"], few.z, known)),
        "teacher, every fourth frame": in_parts(teacher, few.video[:, ::4], known[:, ::4]),
    }
    if "latent" in made:
        models["latent"] = made["latent"]["model"]
        if made["latent"]["steps"] or recipe.refine.steps:
            scenes["latent, closed form"] = in_parts(
                load_closed(recipe, made["latent"]["ranked"]), few.z, known[:, ::4]
            )
        scenes["latent"] = in_parts(made["latent"]["model"], few.z, known[:, ::4])
    errors = {name: measure(scene, there) for name, scene in scenes.items()}
    return {"errors": errors, "cost": cost(vae, teacher, models, clips.z[:1])}


def _spread(clips: HeldOut, count: int) -> HeldOut:
    """`count` of the clips from all over the list, standing and moving bodies alternating where families allow."""
    return clips.some(slice(0, None, max(1, len(clips.z) // count)))


def _fidelity(
    recipe: StitchRecipe,
    vae: AutoencoderKLWan,
    teacher: HookedBackbone,
    shipped: LatentGeometryModel,
    progress: Progress,
) -> dict[str, Any]:
    models = {"latent model": shipped, "barely trained": barely_trained(recipe, vae)}
    listed, values = score(vae, teacher, models, recipe.fidelity_clips, progress)
    points = {source: {name: x.tolist() for name, x in rewards.items()} for source, rewards in values.items()}
    return {"versions": listed, "values": points, "spearman": fidelity(listed, values)}


def barely_trained(recipe: StitchRecipe, vae: AutoencoderKLWan) -> LatentGeometryModel:
    """The control: a geometry model after `BARELY_STEPS` steps of its training, stitched in closed form."""
    folder = Path(recipe.out) / "barely"
    backbone = load_geometry(recipe.geometry)
    assert isinstance(backbone.module, TinyGeometry)
    path = folder / "weights.safetensors"
    if not path.exists():
        how = GeometryRecipe(out=str(folder), model=backbone.module.config, seed=recipe.seed + 1)
        run, lessons = start_run(how), lessons_of(range(how.first_clip, how.first_clip + BARELY_CLIPS), how.model.patch)
        for _ in range(BARELY_STEPS):
            train_step(run, how, lessons)
        save_tensors(path, {name: x.contiguous() for name, x in run.network.state_dict().items()})
    backbone.module.load_state_dict(load_tensors(path)[0])
    latent, point = latent_spec(vae), backbone.spec.stitch_points[-1]
    clips = Clips(**load_tensors(Path(recipe.out) / "world.safetensors")[0])
    connector = build_connector(backbone, latent, ConnectorRecipe("phases"))
    return stitch(backbone, connector, clips.batches(), [point], ridge=recipe.ridge)[point].eval()
