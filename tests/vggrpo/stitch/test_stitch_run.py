"""The whole command on a few clips: each stage is kept, resumed and refused where it must be; what it writes loads.

A small geometry model that nobody trained stands for the teacher; the VAE is the shipped one.
"""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from geometry.distil import DistilConfig
from geometry.models.tiny import TinyConfig, TinyGeometry
from geometry.refine import RefineConfig
from geometry.types import check_geometry
from vggrpo.bootstrap.assets import read_card, save_json, save_tensors, sha256
from vggrpo.bootstrap.geometry_recipe import Batch
from vggrpo.bootstrap.geometry_train import lessons_of
from vggrpo.bootstrap.vae import load_vae
from vggrpo.stitch import cost, fidelity, noise, run
from vggrpo.stitch.clips import Clips, check_generator, generated_clips, latents_of, world_clips
from vggrpo.stitch.closed import choose, load_closed
from vggrpo.stitch.load import load_lgm
from vggrpo.stitch.publish import publish
from vggrpo.stitch.recipe import ConnectorRecipe, SamplingRecipe, StitchRecipe
from vggrpo.stitch.refined import explained, load_refined, refining, train_refine
from vggrpo.stitch.train import draw_batch, start_distil, train_distil

ASSETS = Path(__file__).parents[3] / "assets"
SMALL = TinyConfig(encoder_layers=2, dim=24, heads=1, pairs=(1, 1), registers=0)


@pytest.fixture(scope="module")
def vae():
    return load_vae(ASSETS / "tiny-wan" / "vae")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The folders of a small stack, and what to make of it."""
    folder = tmp_path_factory.mktemp("stack")
    torch.manual_seed(0)
    network, where = TinyGeometry(SMALL), folder / "geometry"
    save_tensors(where / "model.safetensors", {k: x.contiguous() for k, x in network.state_dict().items()})
    save_json(where / "config.json", asdict(SMALL))
    files = ("config.json", "model.safetensors")
    save_json(where / "card.json", {"sha256": {name: sha256(where / name) for name in files}})
    (folder / "notes.md").write_text("## What limits it\n\nIts size.\n")
    return StitchRecipe(
        out=str(folder / "run"),
        asset=str(folder / "asset"),
        geometry=str(where),
        wan=str(ASSETS / "tiny-wan"),
        num_clips=8,
        connectors=[ConnectorRecipe("phases"), ConnectorRecipe("latent", [1, 3, 3])],
        ranking_clips=1,
        ridge=1e-2,
        refine=RefineConfig(steps=4, width=8, blocks=1, warmup=1),
        refine_clips=2,
        sway=2.0,
        distil=DistilConfig(steps=4, lr=1e-4, warmup=1, rank=2, alpha=2),
        batches=[Batch(1.0, 1, 5)],
        checkpoint_every=2,
        fidelity_clips=1,
        noise_clips=1,
        notes=str(folder / "notes.md"),
    )


@pytest.fixture(scope="module")
def made(recipe, vae):
    run.prepare(recipe)
    return run.make_model(recipe, vae)


@pytest.fixture(scope="module")
def published(recipe, vae, made):
    patch = pytest.MonkeyPatch()
    few = lessons_of(range(500, 509), 4)
    some = few.map(lambda x: x[::8, :9])  # one clip whose bodies stand, one whose bodies move
    patch.setattr(run, "held_out", lambda patch, first: (some, ["pan", "orbit"]))
    patch.setattr(run, "EVERY", 1)
    patch.setattr(run, "BARELY_STEPS", 1)
    patch.setattr(run, "BARELY_CLIPS", 5)
    patch.setattr(cost, "REPEATS", 1)
    patch.setattr(noise, "LEVELS", (0.0, 0.3))
    patch.setattr(fidelity, "COARSE", (4,))
    patch.setattr(fidelity, "FINE", ())
    patch.setattr(fidelity, "UNSEEN", tuple(set(fidelity.PERTURBATIONS) - {"blur", "shuffled_frames"}))
    report = run.report(recipe, vae, *made)
    again = run.report(recipe, vae, *made)  # from the files
    said = publish(recipe, "recipe.yaml", report, made[1])
    patch.undo()
    return report, again, said


def test_every_connector_is_ranked_at_every_point_and_the_best_of_a_kind_is_chosen(recipe, made):
    ranked, models = made
    assert {(r.mode, r.point.split(".")[-1]) for r in ranked} == {(m, k) for m in ("phases", "latent") for k in "01"}
    assert [r.total for r in ranked] == sorted(r.total for r in ranked)
    best = choose(ranked, ("phases",), None)
    assert models["shipped"]["ranked"] == best == min((r for r in ranked if r.mode == "phases"), key=lambda r: r.total)
    assert choose(ranked, ("latent",), "encoder.encoder.layer.1").point.endswith("1")
    with pytest.raises(ValueError, match="no connector in phases at nowhere"):
        choose(ranked, ("phases",), "nowhere")


def test_a_folder_is_bound_to_its_recipe_and_to_what_it_was_made_from(recipe, made, tmp_path):
    run.prepare(replace(recipe, distil=replace(recipe.distil, steps=9), checkpoint_every=7))
    with pytest.raises(ValueError, match=r"made with ridge 0\.01 and the recipe says 0\.1"):
        run.prepare(replace(recipe, ridge=0.1))
    other = shutil.copytree(recipe.geometry, tmp_path / "other")
    changed = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(changed))  # the same in other bytes
    save_json(other / "card.json", {"sha256": {"config.json": sha256(other / "config.json")}})
    notes = json.loads((Path(recipe.out) / "recipe.json").read_text())
    with pytest.raises(ValueError, match=r"made with (geometry|made from)"):
        run.prepare(replace(recipe, geometry=str(other)))
    assert json.loads((Path(recipe.out) / "recipe.json").read_text()) == notes


def test_a_resumed_distillation_is_the_same_to_the_bit(recipe, vae, made, tmp_path):
    clips, held = (
        Clips(**world_clips(Path(recipe.out) / f"{name}.safetensors", vae, range(0)).__dict__)
        for name in ("world", "ranking")
    )
    layer, weights = choose(made[0], ("phases",), None), []
    for stop in (None, 2):
        path = tmp_path / f"{stop}.safetensors"
        training = start_distil(recipe, load_closed(recipe, layer), 4, path)
        records = train_distil(training, recipe, 4, path, [clips], held)
        if stop:
            for _ in range(stop + 1):  # the third step is lost: the checkpoint is at two
                next(records)
            training = start_distil(recipe, load_closed(recipe, layer), 4, path)
            assert training.step == stop
            records = train_distil(training, recipe, 4, path, [clips], held)
        list(records)
        weights.append({name: x.clone() for name, x in training.network.state_dict().items()})
        assert [point["step"] for point in training.curve] == [0, 2, 4]
    assert all(torch.equal(weights[1][name], x) for name, x in weights[0].items())
    moved = [name for name, x in load_closed(recipe, layer).state_dict().items() if name in weights[0]]
    assert any(not torch.equal(weights[0][n], load_closed(recipe, layer).state_dict()[n]) for n in moved)
    with pytest.raises(ValueError, match="made with lr"):
        start_distil(replace(recipe, distil=replace(recipe.distil, lr=1.0)), load_closed(recipe, layer), 4, path)


def test_a_resumed_refining_is_the_same_to_the_bit(recipe, vae, made, tmp_path):
    clips, held = (
        world_clips(Path(recipe.out) / f"{name}.safetensors", vae, range(0)) for name in ("world", "ranking")
    )
    layer, weights = choose(made[0], ("phases",), None), []
    for stop in (None, 2):
        path = tmp_path / f"{stop}.safetensors"
        training = refining(recipe, load_closed(recipe, layer), path)
        records = train_refine(training, recipe, path, [clips], held)
        if stop:
            for _ in range(stop + 1):
                next(records)
            training = refining(recipe, load_closed(recipe, layer), path)
            assert training.step == stop
            records = train_refine(training, recipe, path, [clips], held)
        list(records)
        weights.append({name: x.clone() for name, x in training.network.state_dict().items()})
        assert [point["step"] for point in training.curve] == [0, 2, 4]
    assert all(torch.equal(weights[1][name], x) for name, x in weights[0].items())
    assert any(weights[0][name].any() for name in weights[0] if "refiner.leave" in name)
    with pytest.raises(ValueError, match="made with change"):
        refining(replace(recipe, refine=replace(recipe.refine, change=9.0)), load_closed(recipe, layer), path)


def test_what_a_refiner_explains_is_measured_on_the_teachers_tokens(recipe, vae, made):
    """The control's tokens are another clip's."""
    held = world_clips(Path(recipe.out) / "ranking.safetensors", vae, range(0))
    model = load_refined(recipe, choose(made[0], ("phases",), None))
    before = load_closed(recipe, choose(made[0], ("phases",), None))
    z = held.z[:1]
    with torch.no_grad():
        assert not torch.equal(model.connector(z), before.connector(z))
        told = explained(before, held)
        wanted = before.backbone.tokens_at((before.point,), held.video[:1].float() / 255)[before.point].patch
        error = (before.connector(z) - wanted).double()
    mean = wanted.double().flatten(0, 3).mean(0)
    assert told["r2"] == pytest.approx(1 - float((error**2).sum() / ((wanted - mean) ** 2).sum()), abs=1e-5)
    moved = float((error.diff(dim=1) ** 2).sum() / (wanted.double().diff(dim=1) ** 2).sum())
    assert told["change r2"] == pytest.approx(1 - moved, abs=1e-5)
    wrong = explained(before, Clips(held.z, held.video.roll(5, 1), None))
    assert wrong["r2"] < told["r2"]


def test_what_was_made_is_kept(recipe, vae, made, monkeypatch):
    for name in ("stitch", "rank_layers"):
        monkeypatch.setattr(f"vggrpo.stitch.closed.{name}", None)  # nothing is fitted again
    monkeypatch.setattr("vggrpo.stitch.train.distil_step", None)  # and nothing trained
    monkeypatch.setattr("vggrpo.stitch.refined.refine_step", None)
    ranked, models = run.make_model(recipe, vae)
    assert ranked == made[0]
    z = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(models["shipped"]["model"](z).depth, made[1]["shipped"]["model"](z).depth)


def test_the_report_has_all_rows_and_is_read_back(published):
    report, again, said = published
    assert json.dumps(report["noise"]) == json.dumps(again["noise"])
    held = report["held_out"]
    assert set(held["all"]) == {
        "teacher", "teacher on decoded latents", "random connector", "closed form", "refined", "distilled"
    }  # fmt: skip
    assert {"bodies stand", "bodies move", "camera: pan", "camera: orbit", "focal length unknown"} <= set(held)
    assert {"control: constant", "control: frozen", "control: shuffled latents"} <= set(held)
    assert (
        held["all"]["closed form"]["from teacher: log_depth"]
        < held["all"]["random connector"]["from teacher: log_depth"]
    )
    assert report["noise"]["latent"][0]["moved: rotation"] == 0
    assert report["noise"]["latent"][1]["moved: log_depth"] > 0
    assert report["modes"]["cost"]["latent"]["tokens"] < report["modes"]["cost"]["phases"]["tokens"] / 2
    assert set(report["fidelity"]["spearman"]) == {"teacher", "latent model", "barely trained", *fidelity.OFF}
    assert any("distilled / teacher" in line for line in said)


def test_the_asset_loads_and_says_what_it_is(recipe, published, made):
    folder = Path(recipe.asset)
    model = load_lgm(folder, recipe.geometry, ASSETS / "tiny-wan" / "vae")
    z = torch.randn(2, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        scene = model(z)
        wanted = made[1]["shipped"]["model"](z)
    check_geometry(scene)
    assert scene.depth.shape == (2, 9, 64, 64)
    assert torch.equal(scene.depth, wanted.depth)
    card, text = read_card(folder), (folder / "README.md").read_text()
    assert card["made_from"] == run.sources(recipe)
    assert "values" not in card["report"]["fidelity"]
    assert set(card["held_out"]["all"]) >= {"teacher", "distilled"}
    assert text.endswith("\n\n## What limits it\n\nIts size.\n")
    for picture in ("made.png", "noise.png", "fidelity.png"):
        assert (folder / picture).stat().st_size > 1000
        assert picture in text


def test_a_missing_changed_or_foreign_file_is_one_line(recipe, published, tmp_path):
    vae = ASSETS / "tiny-wan" / "vae"
    folder = shutil.copytree(recipe.asset, tmp_path / "asset")
    with pytest.raises(ValueError, match="made from another geometry"):
        load_lgm(folder, ASSETS / "tiny-geometry", vae)
    (folder / "lgm.safetensors").write_bytes((folder / "lgm.safetensors").read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="sha256"):
        load_lgm(folder, recipe.geometry, vae)
    (folder / "lgm.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lgm\.safetensors is missing"):
        load_lgm(folder, recipe.geometry, vae)
    with pytest.raises(ValueError, match=r"no card\.json"):
        load_lgm(tmp_path, recipe.geometry, vae)


def test_samples_need_a_generator(recipe, tmp_path):
    how = SamplingRecipe(num_samples=2)
    with pytest.raises(ValueError, match=r"no transformer/ to draw samples from: set sampling\.num_samples=0"):
        check_generator(tmp_path, how)
    assert check_generator(tmp_path, SamplingRecipe()) == tmp_path
    for folder in ("other/transformer", "other/vae"):
        (tmp_path / folder).mkdir(parents=True)
    save_json(tmp_path / "other/vae/card.json", {"sha256": {}})
    with pytest.raises(ValueError, match="another VAE"):
        check_generator(ASSETS / "tiny-wan", how, tmp_path / "other")
    assert check_generator(ASSETS / "tiny-wan", how, ASSETS / "tiny-wan") == ASSETS / "tiny-wan"
    (tmp_path / "other/transformer_2").mkdir()
    with pytest.raises(ValueError, match="has two transformers, each for some times, and the recipe of the embedded"):
        check_generator(ASSETS / "tiny-wan", how, tmp_path / "other")
    with pytest.raises(ValueError, match=r"no prompts at nowhere\.txt"):
        check_generator(ASSETS / "tiny-wan", replace(how, prompts="nowhere.txt"))
    with pytest.raises(ValueError, match=r"no notes at nowhere\.md: write them"):
        run.prepare(replace(recipe, notes="nowhere.md"))


def test_a_sample_is_its_caption_and_seed_whatever_else_is_drawn(vae, tmp_path):
    from vggrpo.sft import new_transformer
    from vggrpo.sft_config import WanSize

    for part in ("vae", "text_encoder", "tokenizer"):
        (tmp_path / part).symlink_to(ASSETS / "tiny-wan" / part)
    torch.manual_seed(0)
    network = new_transformer(WanSize(1, 1, 32, 32), 16, 64)
    torch.nn.init.normal_(network.proj_out.weight, std=0.1)
    network.save_pretrained(tmp_path / "transformer")
    prompts, fifth = tmp_path / "prompts.txt", tmp_path / "fifth.txt"
    prompts.write_text("a red box\na blue sphere\na room\n")
    fifth.write_text("a blue sphere\n")  # they are taken in turn, over and over
    how = SamplingRecipe(5, str(prompts), 7, num_steps=2, shift=3.0, max_len=32)
    five = generated_clips(tmp_path / "five", vae, tmp_path, how)
    one = generated_clips(
        tmp_path / "one", vae, tmp_path, replace(how, num_samples=1, first_seed=11, prompts=str(fifth))
    )
    assert five.z.shape == (5, 16, 5, 8, 8)
    assert five.video.shape == (5, 17, 3, 64, 64)
    assert five.intrinsics is None
    torch.testing.assert_close(one.z[0], five.z[4], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(five.z[0], five.z[4], atol=0.1)
    other = generated_clips(tmp_path / "other", vae, tmp_path, replace(how, num_samples=1, first_seed=11))
    assert not torch.allclose(other.z[0], five.z[4], atol=1e-4)
    bare = generated_clips(tmp_path / "bare", vae, tmp_path, replace(how, num_samples=1, guidance_scale=1.0))
    assert not torch.allclose(bare.z[0], five.z[0], atol=1e-4)


def test_the_first_latents_of_a_clip_are_those_of_its_beginning(recipe, vae, made):
    clips = world_clips(Path(recipe.out) / "world.safetensors", vae, range(0))
    sample = clips.sample(torch.tensor([3, 0]), 2)
    assert sample.video.shape == (2, 5, 3, 64, 64)
    torch.testing.assert_close(latents_of(vae, sample.video), sample.z, atol=1e-4, rtol=1e-4)
    assert clips.sample(slice(0, 1), focal=False).intrinsics is None
    # In proportion to their numbers, and from its own generator.
    other = Clips(clips.z.repeat(3, 1, 1, 1, 1), clips.video.repeat(3, 1, 1, 1, 1), None)
    drawn = [draw_batch(recipe, [clips, other], step, 400) for step in range(400)]
    known = sum(sample.intrinsics is not None for sample in drawn)
    assert 25 < known < 80  # a quarter are of the world, half of those with their focal length
    assert torch.equal(draw_batch(recipe, [clips, other], 3, 400).z, drawn[3].z)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_clips": 0}, "num_clips must be >= 1"),
        ({"connectors": [ConnectorRecipe("latent")]}, "frames or phases"),
        ({"mode": "frames"}, "must have the mode that ships, frames"),
        ({"batches": [Batch(1.0, 1, 8)]}, "4 n \\+ 1 frames"),
        ({"batches": [Batch(0.5, 1, 9)]}, "ends with 1.0"),
        ({"without_focal": 1.5}, "without_focal in"),
    ],
)
def test_a_bad_recipe_is_refused(recipe, change, words):
    with pytest.raises(ValueError, match=words.replace("without_focal in", "without_focal must be in")):
        replace(recipe, **change)
    with pytest.raises(ValueError, match="three odd numbers"):
        ConnectorRecipe("frames", [3, 3])
