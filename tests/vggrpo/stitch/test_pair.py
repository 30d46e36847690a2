"""A pretrained pair, stitched by the command: diffusers' own Wan VAEs and stand-ins of the geometry models at tiny
random widths, saved to and loaded from folders as the hub has them."""

import json
import math
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline
from safetensors.torch import load_file, load_model, save_model

from geometry.backbone import BackboneSpec
from geometry.distil import DistilConfig
from geometry.latent import LatentSpec
from geometry.refine import RefineConfig
from geometry.types import check_geometry
from geometry.world import make_clips
from rewards import ESTIMATED
from tests.geometry import families
from tests.vggrpo.test_distributed import spawn
from tests.vggrpo.test_wan import saved, transformer, vae, wan22
from vggrpo import cli
from vggrpo.bootstrap.assets import read_card
from vggrpo.bootstrap.vae import encode, normalise
from vggrpo.config import LaunchConfig
from vggrpo.data import write_video
from vggrpo.geometry_model import FAMILIES, load_geometry_model
from vggrpo.stitch import pair, pair_train
from vggrpo.stitch.load import load_lgm, read_latent_spec
from vggrpo.stitch.pair_recipe import ClipsRecipe, PairRecipe, read_stitch_recipe
from vggrpo.stitch.recipe import SamplingRecipe, StitchRecipe
from vggrpo.stitch.shelf import drawer, load_clip, split

ROOT = Path(__file__).parents[3]
TRAINED = ROOT / "assets/tiny-wan/vae"
"""The embedded VAE, here without its card: of random latents nobody can tell what a video shows."""
HERE = "tests.vggrpo.stitch.test_pair"


class HubVGGT(families.VGGT):
    """The stand-in, as the package `vggt` would load it."""

    @classmethod
    def from_pretrained(cls, folder):
        model = cls()
        load_model(model, Path(folder) / "model.safetensors")
        return model


def build_any4d():
    return families.made(families.Any4D, 3)


def build_nothing():
    return {"not": "a module"}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module", autouse=True)
def package():
    """The package `vggt`, as if it were installed."""
    patch = pytest.MonkeyPatch()
    for name in ("vggt", "vggt.models", "vggt.models.vggt"):
        patch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vggt.models.vggt"].VGGT = HubVGGT
    yield
    patch.undo()


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    return make_stack(tmp_path_factory.mktemp("pair"))


def make_stack(folder: Path) -> Path:
    """Folders of a Wan 2.1, of a VGGT and of videos, and a file of prompts."""
    torch.manual_seed(0)
    saved(folder / "wan", WanPipeline, transformer=transformer(), vae=AutoencoderKLWan.from_pretrained(TRAINED))
    (folder / "vggt").mkdir()
    save_model(families.made(families.VGGT), str(folder / "vggt/model.safetensors"))
    (folder / "videos").mkdir()
    clips = make_clips(range(70, 90), frames=9, size=(64, 64), supersample=1).video
    for number, clip in enumerate(clips):
        write_video(folder / f"videos/{number}.mp4", (255 * clip).round().byte(), 8)
    (folder / "prompts.txt").write_text("a red cube\na blue ball\n")
    return folder


def recipe_of(stack: Path, out: str, **more: object) -> PairRecipe:
    sampling = SamplingRecipe(num_samples=2, prompts=str(stack / "prompts.txt"), num_steps=2, max_len=8, first_seed=1)
    size = {"frames": 9, "height": 64, "width": 64}
    clips = ClipsRecipe(videos=str(stack / "videos"), sampling=sampling, ranking=2, held_out=2, **size)
    settings = {
        "wan": str(stack / "wan"),
        "geometry": f"vggt:{stack / 'vggt'}",
        "out": str(stack / out / "run"),
        "asset": str(stack / out / "asset"),
        "at_once": 3,
        "kernel": [1, 3, 3],
        "ridge": 1e-2,
        "refine": RefineConfig(steps=4, width=8, blocks=1, warmup=1),
        "distil": DistilConfig(steps=4, lr=1e-4, warmup=1, rank=2, alpha=2),
        "batch": 2,
        "lengths": [5, 9],
        "checkpoint_every": 2,
    }
    return PairRecipe(clips=clips, **settings | more)


def written(recipe: PairRecipe, path: Path) -> str:
    path.write_text(yaml.safe_dump(asdict(recipe)))
    return str(path)


@pytest.fixture(scope="module")
def stitched(stack):
    """The command, on all of it; the folder of the asset comes back."""
    recipe = recipe_of(stack, "whole")
    assert cli.main(["stitch", written(recipe, stack / "recipe.yaml")]) == 0
    return recipe


def test_a_pretrained_pair_is_stitched_loaded_and_rewarded(stack, stitched):
    folder = stack / "wan/vae"
    model = load_lgm(stitched.asset, stitched.geometry, folder)
    assert model.connector.stride == 2
    assert model.lora == (2, 2)
    net = AutoencoderKLWan.from_pretrained(folder).eval()
    clip = load_clip(stitched, 0, torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(normalise(net, encode(net, clip.video)), clip.z)
    z = clip.z.repeat(2, 1, 1, 1, 1).requires_grad_()
    scene = model(z)
    check_geometry(scene)
    assert scene.depth.shape == (2, 9, 56, 56)  # 8 x 8 latents, 4 x 4 tokens, patches of 14
    reward = {name: ESTIMATED[name](scene) for name in ("motion_smoothness", "camera_motion_floor")}
    assert all(r.isfinite().all() for r in reward.values())
    reward["motion_smoothness"].sum().backward()
    assert z.grad.abs().max() > 0


def test_the_card_says_what_the_model_is_worth_beside_its_controls(stitched):
    card = read_card(Path(stitched.asset))
    held = card["held_out"]
    total = {name: sum(numbers.values()) for name, numbers in held.items()}
    assert total["closed form"] < total["random connector"]
    assert total["teacher on decoded latents"] > 0
    assert held["distilled"] != held["refined"] != held["closed form"]
    assert [point["step"] for point in card["refined"]["curve"]] == [0, 2, 4]
    assert [point["step"] for point in card["curve"]] == [0, 2, 4]
    assert [layer["total"] for layer in card["ranking"]] == sorted(layer["total"] for layer in card["ranking"])
    assert len(card["ranking"]) == 4  # at_once=3: two passes over the clips
    assert card["clips"] == {"fitted": 18, "ranking": 2, "held out": 2}
    assert set(card["made_from"]["vae"]) == {"diffusion_pytorch_model.safetensors"}
    assert "control" in (Path(stitched.asset) / "README.md").read_text()


@pytest.mark.parametrize("kind", [RefineConfig, DistilConfig])
def test_a_stitching_that_was_stopped_ends_as_an_unbroken_one_to_the_bit(stack, stitched, monkeypatch, kind):
    recipe = recipe_of(stack, f"stopped {kind.__name__}")
    update, reads = pair_train.distil_update, []

    def stops(optimizer, step, config):
        if step == 3 and isinstance(config, kind):
            raise KeyboardInterrupt
        return update(optimizer, step, config)

    monkeypatch.setattr(pair_train, "distil_update", stops)
    with pytest.raises(KeyboardInterrupt):
        pair.stitch_pair(recipe, "recipe.yaml")
    monkeypatch.setattr(pair_train, "distil_update", update)
    monkeypatch.setattr("vggrpo.stitch.shelf.read_video", lambda *args: reads.append(args))
    monkeypatch.setattr(pair, "stitch", lambda *args, **how: reads.append(args))
    pair.stitch_pair(recipe, "recipe.yaml")
    assert reads == []  # clips and closed forms were there
    whole, again = (load_file(Path(one.asset) / "lgm.safetensors") for one in (stitched, recipe))
    assert all(torch.equal(x, again[name]) for name, x in whole.items())
    other = replace(recipe, ridge=0.1)
    with pytest.raises(ValueError, match=r"was made with ridge 0\.01 and the recipe says 0\.1: restore it, or set"):
        pair.stitch_pair(other, "recipe.yaml")


def stitch_as_a_rank(accelerator, recipe: PairRecipe) -> None:
    for name in ("vggt", "vggt.models", "vggt.models.vggt"):
        sys.modules[name] = ModuleType(name)
    sys.modules["vggt.models.vggt"].VGGT = HubVGGT
    pair.stitch_pair(recipe, "recipe.yaml")


@pytest.mark.slow
def test_two_processes_stitch_what_one_does(stack, stitched):
    recipe = recipe_of(stack, "two", launch=LaunchConfig(num_processes=2, engine="ddp"))
    spawn(stitch_as_a_rank, 2, recipe)
    one, two = (read_card(Path(recipe.asset)) for recipe in (stitched, recipe))
    assert [layer["point"] for layer in one["ranking"]] == [layer["point"] for layer in two["ranking"]]
    for name in ("closed form", "random connector", "teacher on decoded latents", "refined", "distilled"):
        assert two["held_out"][name] == pytest.approx(one["held_out"][name], rel=2e-3)
    whole, shared = (load_file(Path(recipe.asset) / "lgm.safetensors") for recipe in (stitched, recipe))
    for name, x in whole.items():
        torch.testing.assert_close(shared[name], x, atol=2e-4, rtol=2e-3)
    start = load_file(Path(stitched.out) / one["ranking"][0]["folder"] / "lgm.safetensors")["connector.conv.weight"]
    moved = (whole["connector.conv.weight"] - start).abs().max()
    apart = (whole["connector.conv.weight"] - shared["connector.conv.weight"]).abs().max()
    print(f"moved {moved:.1e}, one process against two {apart:.1e}")
    assert moved > 10 * apart  # the control: training did move it


def test_gradients_of_a_batch_are_those_of_its_clips_together(stack, stitched):
    """One after the other, as much of the loss as one batch of both."""
    model = load_lgm(stitched.asset, stitched.geometry, stack / "wan/vae")
    config, found = DistilConfig(steps=4, warmup=1, rank=2, alpha=2), []
    clips = [load_clip(stitched, number, torch.device("cpu")) for number in (0, 1)]
    together = type(clips[0])(*(torch.cat(pair) for pair in zip(clips[0][:2], clips[1][:2], strict=True)))
    for batches, share in (([together], 1.0), (clips, 0.5), (clips, 1.0)):
        optimizer = pair_train.start(model, config)
        optimizer.zero_grad()
        for batch in batches:
            pair_train.distil_backward(model, batch, config, share)
        found.append(torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]))
    scale = found[0].abs().max()
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=float(1e-4 * scale))
    assert (found[2] - found[0]).abs().max() > 0.1 * scale  # the control: without the share


@pytest.mark.parametrize(
    ("space", "channels", "patch", "latents", "tokens", "stride"),
    [
        (8, 16, 14, (60, 104), (30, 52), None),
        (8, 16, 16, (60, 104), (30, 52), None),
        (8, 16, 14, (64, 64), (32, 32), None),
        (16, 48, 14, (30, 52), (30, 52), None),
        (16, 48, 14, (44, 80), (44, 80), None),
        (16, 48, 14, (44, 80), (22, 40), 2),
    ],
)
def test_grids_are_those_of_the_reference_table(stack, space, channels, patch, latents, tokens, stride):
    latent = LatentSpec(channels, 4, space, (0.0,) * channels, (1.0,) * channels)
    spec = BackboneSpec(patch, 8, 1, ("blocks.0", "blocks.1"), ("blocks.0",))
    connector = pair.build_connector(spec, latent, recipe_of(stack, "x", stride=stride))
    assert connector.grid(*latents) == tokens
    assert connector.split == 1
    assert connector(torch.zeros(1, channels, 2, 8, 8)).shape == (1, 5, 8 // connector.stride, 8 // connector.stride, 8)


def test_wan22_of_48_channels_is_stitched_with_stride_1_and_one_map_a_latent(stack, tmp_path):
    folder = wan22(WanPipeline, tmp_path / "wan")
    recipe = recipe_of(
        stack, "wan22", wan=str(folder), mode="latent", points=[0, 1], bf16=True, recompute=True,
        distil=DistilConfig(1, warmup=0, rank=1, alpha=1),
    )  # fmt: skip
    pair.stitch_pair(recipe, "recipe.yaml")
    model = load_lgm(recipe.asset, recipe.geometry, folder / "vae")
    assert (model.connector.stride, model.connector.split, model.connector.latent.channels) == (1, 1, 48)
    assert model(load_clip(recipe, 21, torch.device("cpu")).z).depth.shape == (1, 3, 56, 56)
    with pytest.raises(ValueError, match="stitched for latents of 48 channels, 16 times smaller, 4 frames each, and"):
        load_lgm(recipe.asset, recipe.geometry, stack / "wan/vae")


def test_a_model_of_another_vae_or_geometry_model_is_refused_in_one_line(stack, stitched, tmp_path):
    def refused(message: str, geometry: str = stitched.geometry, vae: Path = stack / "wan/vae") -> None:
        with pytest.raises(ValueError, match=message) as error:
            load_lgm(stitched.asset, geometry, vae)
        assert "\n" not in str(error.value)

    other = shutil.copytree(stack / "wan/vae", tmp_path / "vae")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"latents_mean": [0.0] * 16}))
    refused(r"of another mean and deviation than those in .*/config.json \(by up to [\d.]+\): stitch one", vae=other)
    (other / "config.json").write_text(json.dumps(config))
    load_lgm(stitched.asset, stitched.geometry, other)  # the control: a copy will do
    net = AutoencoderKLWan.from_pretrained(other)
    net.encoder.conv_in.bias.data += 0.1
    net.save_pretrained(other)
    refused(r"was made from another vae than .*: restore it, or run vggrpo stitch", vae=other)
    (other / "diffusion_pytorch_model.safetensors").unlink()
    refused(r"has no \*\.safetensors: it must be the vae/ of a Wan", vae=other)
    (other / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    refused(r"config.json is not that of an AutoencoderKLWan \('latents_mean'\): fetch", vae=other)
    refused(r"has no config\.json: it must be the vae/ of a Wan model", vae=tmp_path / "nowhere")
    (tmp_path / "vggt").mkdir()
    save_model(families.made(families.VGGT, 5), str(tmp_path / "vggt/model.safetensors"))
    refused("was made from another geometry than vggt:", geometry=f"vggt:{tmp_path / 'vggt'}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vgtt:folder", "no family of geometry models 'vgtt' .*did you mean 'vggt'"),
        ("moge:folder", "there are vggt, pi3, da3-small, .* any4d, or give a folder alone"),
        ("nowhere", r"no card\.json in nowhere: this is not an asset folder"),
        ("pi3:yyfz233/Pi3", r"cannot import Pi3 from pi3\.models\.pi3 .*github.com/yyfz/Pi3"),
        ("da3-small:folder", "cannot import create_object from depth_anything_3.cfg .*pip install --no-deps"),
        ("vggt:nowhere", "cannot load nowhere .*VGGT: code github.com/facebookresearch/vggt .*gated"),
        (f"any4d:{HERE}:build_any4d", "would run code that is not this project's: give --allow-import"),
    ],
)
def test_a_geometry_model_that_cannot_be_had_is_one_line(name, message):
    with pytest.raises(ValueError, match=message) as error:
        load_geometry_model(name)
    assert "\n" not in str(error.value)


def test_code_that_builds_a_geometry_model_runs_only_if_it_may():
    model = load_geometry_model(f"any4d:{HERE}:build_any4d", allow_import=True)
    scene = model(torch.rand(1, 3, 3, 28, 42, generator=torch.Generator().manual_seed(0)))
    assert scene.flow_grid == "first"
    for path, message in {
        f"{HERE}:build_nothing": "built a dict, and a geometry model is a torch.nn.Module",
        f"{HERE}:no_such": "cannot import what builds the geometry model, .*has no attribute 'no_such'",
        "no_such_package": r"no_such_package \(it must be package.module:function\)",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_geometry_model(f"any4d:{path}", allow_import=True)


def test_a_geometry_module_of_the_wrong_class_is_one_line(monkeypatch, stack):
    wrong = type("Wrong", (torch.nn.Linear,), {"from_pretrained": classmethod(lambda cls, weights: cls(2, 2))})
    monkeypatch.setattr(sys.modules["vggt.models.vggt"], "VGGT", wrong)
    with pytest.raises(ValueError, match=r"Wrong is not the module of VGGT: no aggregator\.patch_embed"):
        load_geometry_model(f"vggt:{stack / 'vggt'}")


def test_what_cannot_be_stitched_is_told_before_anything_is_done(stack, tmp_path):
    recipe = recipe_of(stack, "never")
    clips = recipe.clips
    for changed, message in (
        ({"clips": replace(clips, held_out=20)}, "there are 22 clips, and 22 are held out"),
        ({"clips": replace(clips, videos="nowhere")}, "no folder of videos at nowhere: set clips.videos"),
        ({"clips": replace(clips, videos=str(tmp_path))}, r"holds no video \(\.mp4"),
        ({"wan": str(tmp_path)}, r"vae has no config\.json: it must be the vae/ of a Wan"),
        ({"points": [4]}, "there are stitch points 0 to 3, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            pair.stitch_pair(replace(recipe, **changed), "recipe.yaml")
    assert not Path(recipe.out).exists()


def test_samples_of_an_image_to_video_model_are_refused(stack, tmp_path):
    torch.manual_seed(0)
    saved(tmp_path / "i2v", WanImageToVideoPipeline, transformer=transformer(36, out_channels=16), vae=vae())
    recipe = recipe_of(stack, "i2v", wan=str(tmp_path / "i2v"))
    with pytest.raises(ValueError, match=r"makes videos of a first frame, and samples to stitch on have none: set"):
        drawer(recipe, "cpu")


def test_samples_of_two_transformers_are_drawn_by_both(stack, tmp_path):
    torch.manual_seed(0)
    parts = {"transformer": transformer(), "transformer_2": transformer(), "vae": vae(), "boundary_ratio": 0.8}
    saved(tmp_path / "moe", WanPipeline, **parts)
    recipe = recipe_of(stack, "moe", wan=str(tmp_path / "moe"))
    both = drawer(recipe, "cpu")(1)
    torch.manual_seed(1)
    transformer().save_pretrained(tmp_path / "moe/transformer_2")
    assert both.shape == (16, 3, 8, 8)
    assert not torch.equal(drawer(recipe, "cpu")(1), both)


def test_every_clip_is_for_one_purpose_and_held_out_ones_are_spread(stack):
    recipe = recipe_of(stack, "x")
    fitted, ranking, held = split(recipe)
    assert sorted([*fitted, *ranking, *held]) == list(range(22))
    assert [len(part) for part in (fitted, ranking, held)] == [18, 2, 2]
    assert sorted(ranking + held) == [2, 8, 13, 19]


def test_a_recipe_with_clips_is_of_a_pair(stack, tmp_path):
    path = written(recipe_of(stack, "x"), tmp_path / "a.yaml")
    assert isinstance(read_stitch_recipe(path, []), PairRecipe)
    assert isinstance(read_stitch_recipe("launch/recipes/stitch/tiny.yaml", []), StitchRecipe)
    (tmp_path / "b.yaml").write_text("clips: {videos: x}\nwan: y\n")
    for overrides, message in (
        ([], "the recipe of a pair needs geometry"),
        (["geometry=vggt:z", "launch.engine=zero2"], "launch.engine is zero2: use --accelerate ddp"),
        (["geometry=vggt:z", "lengths=[7]"], "lengths must be 4 n"),
        (["geometry=vggt:z", "clips.frames=82"], "frames must be 4 n"),
        (["geometry=vggt:z", "clips.videos=null"], "there is nothing to stitch on"),
        (["geometry=vggt:z", "kernel=[5, 3]"], "kernel must be three odd numbers"),
        (["geometry=vggt:z", "stried=2"], "unknown key 'stried': did you mean 'stride'"),
    ):
        with pytest.raises(ValueError, match=message):
            read_stitch_recipe(str(tmp_path / "b.yaml"), overrides)


@pytest.mark.parametrize(
    ("name", "tokens"), [("wan21_vggt", (30, 52)), ("wan21_da3", (30, 52)), ("wan22_vggt", (44, 80))]
)
def test_shipped_recipes_are_read_and_have_the_grids_that_they_say(name, tokens):
    recipe = read_stitch_recipe(f"launch/recipes/stitch/{name}.yaml", ["clips.videos=somewhere"])
    channels, space = (48, 16) if name.startswith("wan22") else (16, 8)
    latent = LatentSpec(channels, 4, space, (0.0,) * channels, (1.0,) * channels)
    connector = pair.build_connector(BackboneSpec(14, 8, 1, ("a", "b"), ("a",)), latent, recipe)
    assert connector.grid(recipe.clips.height // space, recipe.clips.width // space) == tokens
    assert recipe.geometry.split(":")[0] in FAMILIES


def test_latent_specs_are_the_vaes_own(stack):
    net = AutoencoderKLWan.from_pretrained(stack / "wan/vae")
    spec = read_latent_spec(stack / "wan/vae")
    assert (spec.channels, spec.time_stride, spec.space_stride) == (16, 4, 8)
    assert math.isclose(spec.std[3], net.config.latents_std[3])


def test_several_processes_are_started_with_what_the_recipe_insists_on(stack, tmp_path, monkeypatch, capsys):
    started = []

    def replaced(program, words):
        started.append(words)
        raise SystemExit

    monkeypatch.setattr("os.execv", replaced)
    path = written(recipe_of(stack, "x"), tmp_path / "a.yaml")
    words = ["stitch", path, "ridge=0.5", "--accelerate"]
    with pytest.raises(SystemExit):
        cli.main([*words, "ddp", "--num_processes", "4", "--allow-import"])
    (line,) = started
    assert line[line.index("-m", 2) :] == [
        *("-m", "vggrpo", "stitch", path, "ridge=0.5", "--allow-import", "launch.num_processes=4", "launch.engine=ddp"),
    ]
    for name, recipe, message in (
        ("zero2", path, "launch.engine is zero2: use --accelerate ddp or multi_node"),
        ("ddp", "launch/recipes/stitch/tiny.yaml", "is stitched by one process: leave --accelerate out"),
    ):
        assert cli.main(["stitch", recipe, "--accelerate", name]) == 2
        assert message in capsys.readouterr().err
    assert len(started) == 1
