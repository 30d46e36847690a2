"""Depth Anything 3 and Pi3, from a folder to a step of training: stand-ins at tiny random widths, in the place of the
packages that would build them, stitched to diffusers' own Wan VAEs by the command."""

import json
import math
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_model, save_model
from torch import nn

from geometry.cameras import inverse, rigid, so3_exp
from geometry.distil import DistilConfig
from geometry.models import pi3
from geometry.types import check_geometry
from rewards import ESTIMATED
from tests.geometry import families
from tests.vggrpo.stitch.test_pair import make_stack, recipe_of, written
from tests.vggrpo.test_wan import wan22
from vggrpo import cli
from vggrpo.bootstrap.assets import read_card
from vggrpo.stitch.load import load_lgm
from vggrpo.stitch.shelf import load_clip

ROOT = Path(__file__).parents[3]


class HubPi3(families.Pi3):
    """As the package `pi3` loads it."""

    @classmethod
    def from_pretrained(cls, folder):
        model = cls()
        load_model(model, Path(folder) / "model.safetensors")
        return model


@pytest.fixture(scope="module", autouse=True)
def packages():
    """`pi3` and `depth_anything_3`, as if they were installed."""
    patch = pytest.MonkeyPatch()
    for name in ("pi3", "pi3.models", "pi3.models.pi3", "depth_anything_3", "depth_anything_3.cfg"):
        patch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["pi3.models.pi3"].Pi3 = HubPi3
    cfg = sys.modules["depth_anything_3.cfg"]
    cfg.load_config, cfg.create_object = lambda path: path, lambda path: families.DepthAnything3()
    yield
    patch.undo()


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """Folders of two Wans, of both geometry models as the hub has them, and of videos."""
    folder = make_stack(tmp_path_factory.mktemp("families"))
    wan22(WanPipeline, folder / "wan22")
    net, anything = families.made(families.Pi3), families.made(families.DepthAnything3)
    for weight in (net.camera_head.weight, *net.point_head.parameters()):
        weight.data *= 0.01  # random cameras before random depths see nothing in common, and no edge-free surface
    for weight in (anything.cam_dec.weight, *anything.head.parameters()):
        weight.data *= 0.01
    for name, model in {"pi3": net, "da3": nn.ModuleDict({"model": anything})}.items():
        (folder / name).mkdir()
        save_model(model, str(folder / name / "model.safetensors"))
    return folder


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


WANS = {"wan": (8, 16, 2), "wan22": (16, 48, 1)}
"""Folder: the VAE's stride and channels, and the stride of the connector to tokens of 14 pixels."""
CASES = [(wan, name) for wan in WANS for name in ("da3-small:da3", "pi3:pi3")]


@pytest.fixture(scope="module")
def stitch(stack):
    """Runs the command on a pair, once."""
    done = {}

    def run(wan, name):
        if (wan, name) not in done:
            family, _, folder = name.partition(":")
            recipe = recipe_of(
                stack, f"{wan}-{folder}", wan=str(stack / wan), geometry=f"{family}:{stack / folder}",
                distil=DistilConfig(2, lr=1e-4, warmup=1, rank=2, alpha=2),
            )  # fmt: skip
            assert cli.main(["stitch", written(recipe, stack / f"{wan}-{folder}.yaml")]) == 0
            done[wan, name] = recipe
        return done[wan, name]

    return run


@pytest.mark.parametrize(("wan", "name"), CASES)
def test_the_command_stitches_what_loads_and_a_step_of_training_reads(stack, stitch, tmp_path, wan, name):
    recipe, (space, channels, stride) = stitch(wan, name), WANS[wan]
    held = read_card(Path(recipe.asset))["held_out"]
    total = {kind: sum(numbers.values()) for kind, numbers in held.items()}
    assert all(math.isfinite(x) for x in total.values())
    assert total["closed form"] < total["random connector"]  # the control
    assert held["distilled"] != held["closed form"]
    model = load_lgm(recipe.asset, recipe.geometry, Path(recipe.wan) / "vae")
    latent = model.connector.latent
    assert (latent.space_stride, latent.channels, model.connector.stride) == (space, channels, stride)
    z = load_clip(recipe, 0, torch.device("cpu")).z.requires_grad_()
    scene = model(z)
    check_geometry(scene)
    assert scene.depth.shape == (1, 9, 56, 56)
    torch.testing.assert_close(scene.c2w[:, 0], torch.eye(4)[None], atol=1e-5, rtol=0)
    ESTIMATED["motion_smoothness"](scene).sum().backward()
    assert z.grad.abs().max() > 0
    words = [
        *(f"video.model={recipe.wan}", f"video.geometry={recipe.geometry}", f"video.lgm={recipe.asset}"),
        *(f"video.prompts={stack}/prompts.txt", "video.max_len=8", "video.frames=9", "video.prompt_cache=null"),
        *("video.motion_samples=0", "sampling.num_steps=2", "sampling.window={size: 1, stop: 1}"),
        *("grpo.num_iterations=1", "grpo.group_size=3", f"out={tmp_path}/run"),
        "grpo.weights={motion_smoothness: 1, camera_motion_floor: 3}",  # random views may have nothing in common
    ]
    assert cli.main(["train", "launch/recipes/tiny.yaml", *words]) == 0
    numbers = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert math.isfinite(numbers["reward/motion_smoothness/mean"])
    assert numbers["reward/motion_smoothness/std"] > 0  # of three videos
    assert numbers["reward/motion_smoothness/nan"] == 0
    assert numbers["grad_norm"] > 0


def test_pi3s_world_is_the_first_cameras_whatever_world_and_scale_it_spoke_in(stitch, stack):
    recipe, raw = stitch("wan", "pi3:pi3"), {}
    model = load_lgm(recipe.asset, recipe.geometry, stack / "wan/vae")
    model.backbone.module.register_forward_hook(lambda module, args, out: raw.update(out))
    with torch.no_grad():
        scene = model(load_clip(recipe, 0, torch.device("cpu")).z)
    said = raw["camera_poses"]
    assert (said[:, 0] - torch.eye(4)).abs().max() > 0.1  # the control: the module itself speaks of another world
    torch.testing.assert_close(scene.c2w, inverse(said[:, :1]) @ said, atol=1e-4, rtol=1e-4)
    elsewhere, size = rigid(so3_exp(torch.tensor([0.4, -1.3, 0.7])), torch.tensor([3.0, -2.0, 9.0])), 5.0
    scaled = said.clone()
    scaled[..., :3, 3] *= size
    told = {"camera_poses": elsewhere @ scaled, "local_points": size * raw["local_points"], "conf": raw["conf"]}
    again = pi3.parse(told, scene.depth.shape[-2:])
    torch.testing.assert_close(again.c2w[..., :3, :3], scene.c2w[..., :3, :3], atol=1e-4, rtol=0)
    torch.testing.assert_close(again.points, size * scene.points, atol=1e-3, rtol=1e-3)
    for name in ("motion_smoothness", "reprojection_consistency", "camera_motion_floor"):
        torch.testing.assert_close(ESTIMATED[name](again), ESTIMATED[name](scene), atol=1e-3, rtol=1e-3)


def test_weights_of_another_model_of_the_family_are_refused(stitch, stack, tmp_path):
    recipe = stitch("wan", "da3-small:da3")
    other = shutil.copytree(stack / "da3", tmp_path / "da3")
    load_lgm(recipe.asset, f"da3-small:{other}", stack / "wan/vae")  # the control: a copy will do
    model = nn.ModuleDict({"model": families.made(families.DepthAnything3, 5)})
    save_model(model, str(other / "model.safetensors"))
    with pytest.raises(ValueError, match="was made from another geometry than da3-small:"):
        load_lgm(recipe.asset, f"da3-small:{other}", stack / "wan/vae")
