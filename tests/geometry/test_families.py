"""Other people's models: what they say in their own conventions comes back as the truth, and they can be stitched."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import nn

from geometry.backbone import HookedBackbone, Tokens
from geometry.cameras import inverse, rigid, so3_exp
from geometry.models import any4d, depth_anything3, pi3, vggt
from geometry.models.convert import pinhole_of_rays, rotation_of
from geometry.types import check_geometry
from geometry.world import make_clips
from tests.geometry import families
from tests.geometry.standins import largest_difference, random_projection

ADAPTERS = {
    "vggt": (vggt, families.VGGT),
    "depth_anything3": (depth_anything3, families.DepthAnything3),
    "pi3": (pi3, families.Pi3),
    "any4d": (any4d, families.Any4D),
}
SIZE = (28, 42)


@pytest.fixture(scope="module")
def clips():
    return make_clips([41, 43], frames=4, size=SIZE, motion="random", dynamic=True, supersample=1)


def quaternion(rotation):
    """xyzw, by scipy."""
    flat = Rotation.from_matrix(rotation.reshape(-1, 3, 3).double().numpy()).as_quat()
    return torch.from_numpy(flat).float().view(*rotation.shape[:-2], 4)


def fields_of_view(intrinsics):
    """Vertical and horizontal, radians."""
    return [2 * torch.atan(side / 2 / intrinsics[..., k, k]) for side, k in ((SIZE[0], 1), (SIZE[1], 0))]


def rays(scene):
    """Directions of the pixels in the camera's own axes, of length 1."""
    local = torch.einsum(
        "...ji,...hwj->...hwi", scene.c2w[..., :3, :3], scene.points - scene.c2w[..., None, None, :3, 3]
    )
    return local / local.norm(dim=-1, keepdim=True), local


def raw_vggt(scene, scale=1.0):
    """Everything in units of `scale` scene units."""
    w2c = inverse(scene.c2w)
    encoded = [
        w2c[..., :3, 3] / scale,
        quaternion(w2c[..., :3, :3]),
        *(x[..., None] for x in fields_of_view(scene.intrinsics)),
    ]
    return {"pose_enc": torch.cat(encoded, -1), "depth": scene.depth[..., None] / scale, "depth_conf": 1 + scene.depth}


def raw_depth_anything3(scene):
    w2c = inverse(scene.c2w)[..., :3, :]
    return {"extrinsics": w2c, "intrinsics": scene.intrinsics, "depth": scene.depth, "depth_conf": 1 + scene.depth}


def raw_pi3(scene):
    """In a world of no one's."""
    elsewhere = rigid(so3_exp(torch.tensor([0.3, -1.0, 0.5])), torch.tensor([1.0, 2.0, -3.0]))
    confidence = scene.depth.log()[..., None]  # sigmoid(log d) = 1 - 1 / (1 + d), as the others have it
    return {"camera_poses": elsewhere @ scene.c2w, "local_points": rays(scene)[1], "conf": confidence}


def raw_any4d(scene, paths):
    """`paths`: where the points of frame 0's pixels are in each frame."""
    ray, local = rays(scene)
    return [
        {
            "cam_trans": scene.c2w[:, i, :3, 3],
            "cam_quats": quaternion(scene.c2w[:, i, :3, :3]),
            "ray_directions": ray[:, i],
            "depth_along_ray": local[:, i].norm(dim=-1, keepdim=True),
            "scene_flow": paths[:, i] - paths[:, 0],
            "conf": 1 + scene.depth[:, i],
            "non_ambiguous_mask": scene.valid[:, i],
        }
        for i in range(scene.c2w.shape[1])
    ]


def paths_of(clips):
    """World positions of the points of frame 0's pixels, [B T H W 3], by the world's own tracks."""
    rows, columns = torch.meshgrid(torch.arange(SIZE[0]) + 0.5, torch.arange(SIZE[1]) + 0.5, indexing="ij")
    pixels = torch.stack([columns, rows], -1).view(-1, 2).expand(len(clips), -1, -1)
    found = clips.track(pixels).points.unflatten(2, SIZE)
    return found.where(clips.geometry.valid[:, :1, ..., None], clips.geometry.points[:, :1])


def parsed(name, clips):
    scene = clips.geometry
    raw = raw_any4d(scene, paths_of(clips)) if name == "any4d" else globals()[f"raw_{name}"](scene)
    return ADAPTERS[name][0].parse(raw, SIZE)


def wrong(found, scene):
    """The largest error in poses, focal lengths (relative), depth (relative) and points."""
    seen = scene.valid
    errors = {
        "c2w": (found.c2w - scene.c2w).abs().max(),
        "intrinsics": ((found.intrinsics - scene.intrinsics) / SIZE[1]).abs().max(),
        "depth": ((found.depth / scene.depth).log().abs())[seen].max(),
        "points": ((found.points - scene.points).norm(dim=-1) / scene.depth)[seen].max(),
    }
    return {name: float(error) for name, error in errors.items()}


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_a_model_says_in_its_own_conventions_comes_back_as_the_truth(name, clips):
    scene, found = clips.geometry, parsed(name, clips)
    check_geometry(found)
    assert max(wrong(found, scene).values()) < 1e-3
    expected = scene.depth / (1 + scene.depth)
    torch.testing.assert_close(found.confidence, expected, rtol=1e-4, atol=1e-4)
    assert (found.scene_flow is not None) == (name == "any4d")


def test_scene_flow_from_frame_0_comes_back_as_the_worlds_own_tracks(clips):
    found, paths = parsed("any4d", clips), paths_of(clips)
    assert found.flow_grid == "first"
    torch.testing.assert_close(found.scene_flow, paths - paths[:, :1], atol=1e-4, rtol=1e-4)
    assert found.scene_flow[:, -1].norm(dim=-1).max() > 0.05
    step = clips.geometry.scene_flow[:, 0] * clips.geometry.valid[:, 0, ..., None]
    torch.testing.assert_close(paths[:, 1] - paths[:, 0], step, atol=1e-3, rtol=1e-2)
    # Another world: poses, and with them flow, turned; the geometry is the same.
    turn = so3_exp(torch.tensor([0.2, 0.5, -0.1]))
    raw = raw_any4d(clips.geometry, paths)
    for view in raw:
        pose = turn @ rotation_of(view["cam_quats"])
        view.update(
            cam_trans=view["cam_trans"] @ turn.T, cam_quats=quaternion(pose), scene_flow=view["scene_flow"] @ turn.T
        )
    again = any4d.parse(raw, SIZE)
    assert max(wrong(again, clips.geometry).values()) < 1e-3
    torch.testing.assert_close(again.scene_flow, found.scene_flow, atol=1e-4, rtol=1e-3)


def test_normalised_units_are_only_units(clips):
    scene = clips.geometry
    found = vggt.parse(raw_vggt(scene, scale=2.5), SIZE)
    torch.testing.assert_close(2.5 * found.depth, scene.depth)
    torch.testing.assert_close(2.5 * found.c2w[..., :3, 3], scene.c2w[..., :3, 3], atol=1e-4, rtol=1e-3)


def test_every_wrong_convention_is_caught(clips):
    """The controls: the same raw outputs, each with one convention mistaken."""
    scene = clips.geometry
    raw = raw_vggt(scene)
    code = raw["pose_enc"]
    mistaken = {
        "wxyz": torch.cat([code[..., :3], code[..., 6:7], code[..., 3:6], code[..., 7:]], -1),
        "c2w": torch.cat([scene.c2w[..., :3, 3], quaternion(scene.c2w[..., :3, :3]), code[..., 7:]], -1),
        "fov": torch.cat([code[..., :7], code[..., [8, 7]]], -1),
    }
    for what, other in mistaken.items():
        assert max(wrong(vggt.parse({**raw, "pose_enc": other}, SIZE), scene).values()) > 0.02, what
    raw = raw_depth_anything3(scene)
    errors = wrong(depth_anything3.parse({**raw, "extrinsics": scene.c2w[..., :3, :]}, SIZE), scene)
    assert errors["c2w"] > 0.02
    assert (parsed("depth_anything3", clips).confidence - raw["depth_conf"]).abs().min() > 0.5
    raw = raw_pi3(scene)
    along = torch.cat([raw["local_points"][..., :2], raw["local_points"].norm(dim=-1, keepdim=True)], -1)
    assert wrong(pi3.parse({**raw, "local_points": along}, SIZE), scene)["depth"] > 0.02
    raw = raw_any4d(scene, paths_of(clips))
    z_depth = [{**view, "depth_along_ray": scene.depth[:, i, ..., None]} for i, view in enumerate(raw)]
    assert wrong(any4d.parse(z_depth, SIZE), scene)["depth"] > 0.02


def test_a_pinhole_is_found_in_rays_of_any_length_and_in_noise(clips):
    scene = clips.geometry
    ray, local = rays(scene)
    for given in (ray, local):
        torch.testing.assert_close(pinhole_of_rays(given), scene.intrinsics, rtol=1e-3, atol=1e-2)
    noise = 0.02 * torch.randn(local.shape, generator=torch.Generator().manual_seed(0))
    noisy = pinhole_of_rays(local / local[..., 2:] + noise)
    assert ((noisy - scene.intrinsics) / scene.intrinsics[..., :1, :1]).abs().max() < 0.02
    mirrored = pinhole_of_rays(local * torch.tensor([-1.0, 1.0, 1.0]))  # senseless rays: still a pinhole
    torch.testing.assert_close(mirrored[..., 0, 0], torch.full_like(mirrored[..., 0, 0], 20.0 * SIZE[1]))


def test_points_behind_a_camera_are_not_valid(clips):
    raw = raw_any4d(clips.geometry, paths_of(clips))
    raw[1]["ray_directions"][:, 3, 4] *= -1
    found = any4d.parse(raw, SIZE)
    check_geometry(found)
    assert not found.valid[:, 1, 3, 4].any()


def backbone_of(name):
    adapter, kind = ADAPTERS[name]
    return adapter.backbone(families.made(kind))


def video(B=2, T=3):
    return torch.rand(B, T, 3, *SIZE, generator=torch.Generator().manual_seed(0))


STITCHES = {
    "vggt": [f"aggregator.patch_embed.blocks.{k}" for k in range(4)],
    "depth_anything3": [f"backbone.pretrained.blocks.{k}" for k in range(3)],
    "pi3": [f"encoder.blocks.{k}" for k in range(3)],
    "any4d": [f"encoder.model.blocks.{k}" for k in range(2)],
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_blocks_own_tokens_put_in_its_place_change_nothing_at_every_point(name):
    backbone, clip = backbone_of(name), video()
    truth = backbone.forward_rgb(clip)
    check_geometry(truth)
    assert list(backbone.spec.stitch_points) == STITCHES[name]
    tokens = backbone.tokens_at(STITCHES[name], clip)
    blocks = [backbone.module.get_submodule(path) for path in backbone.spec.blocks]
    for number, point in enumerate(STITCHES[name]):
        for skip in (True, False):
            for block in blocks:
                block.runs = 0
            entered = backbone.forward_from(point, tokens[point], skip=skip)
            assert largest_difference(entered, truth) == 0.0, (point, skip)
            assert [block.runs for block in blocks] == [int(not skip or k > number) for k in range(len(blocks))]
        other = tokens[point]._replace(patch=tokens[point].patch.flip(1))
        assert largest_difference(backbone.forward_from(point, other), truth) > 1e-3
    one = backbone.forward_rgb(clip[1])  # clips of a batch do not mix, and their frames keep their order
    assert largest_difference(one, truth.map(lambda x: x[1])) < 1e-4


@pytest.mark.parametrize("name", ADAPTERS)
def test_gradients_reach_the_tokens_from_every_output(name):
    backbone = backbone_of(name)
    point = STITCHES[name][0]  # after its last block an encoder hands on no class or register tokens
    tokens = Tokens(*(x.requires_grad_() for x in backbone.tokens_at([point], video(1))[point]))
    scene = random_projection(backbone.forward_from(point, tokens, recompute=True))
    assert set(scene) >= {"c2w", "depth", "points", "confidence"}
    for output, value in scene.items():
        if output == "intrinsics" and not value.requires_grad:
            continue
        for gradient in torch.autograd.grad(value, tokens, retain_graph=True):
            assert gradient.isfinite().all(), output
            assert gradient.abs().max() > 1e-7, output


def test_views_before_clips_would_be_mixed_up_without_being_told():
    """The control: Any4D's order of views and clips taken for that of the others."""
    backbone, clip, point = backbone_of("any4d"), video(), STITCHES["any4d"][0]
    told = backbone.tokens_at([point], clip)[point]
    alone = backbone.tokens_at([point], clip[1])[point]
    torch.testing.assert_close(told.patch[1], alone.patch)
    untold = HookedBackbone(backbone.module, replace(backbone.spec, frames_first=False), any4d.call, any4d.parse)
    assert not torch.allclose(untold.tokens_at([point], clip)[point].patch[1], alone.patch, atol=1e-2)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_module_of_another_class_is_one_line_that_says_where_to_get_the_right_one(name):
    adapter, _ = ADAPTERS[name]
    other = families.Any4D if name != "any4d" else families.VGGT
    with pytest.raises(ValueError, match=re.escape(str(adapter.SOURCE))) as error:
        adapter.backbone(families.made(other))
    assert "\n" not in str(error.value)
    assert "licen" in str(adapter.SOURCE).lower() or "CC-BY" in str(adapter.SOURCE)


def test_an_any4d_that_says_less_is_refused(clips):
    raw = [{key: x for key, x in view.items() if key != "conf"} for view in raw_any4d(clips.geometry, paths_of(clips))]
    with pytest.raises(ValueError, match="Any4D says no conf: build it with"):
        any4d.parse(raw, SIZE)


def test_models_without_cameras_or_an_early_block_are_refused():
    with pytest.raises(ValueError, match="METRIC and MONO estimate no cameras"):
        depth_anything3.backbone(families.DepthAnything3(cameras=False))
    net = families.DepthAnything3()
    net.backbone.pretrained.alt_start = 0
    with pytest.raises(ValueError, match="there is nowhere to stitch"):
        depth_anything3.backbone(net)


@pytest.mark.parametrize(
    ("adapter", "package", "name"), [(vggt, "vggt.models.vggt", "VGGT"), (pi3, "pi3.models.pi3", "Pi3")]
)
def test_loading_needs_the_package_and_says_so(adapter, package, name, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"cannot import {name} from {package}.*{adapter.SOURCE.name}: code github"):
        adapter.load("a/folder")
    kind = type(name, (), {"from_pretrained": staticmethod(lambda weights: families.made(getattr(families, name)))})
    for parent in (package.split(".")[0], package.rsplit(".", 1)[0], package):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    setattr(sys.modules[package], name, kind)
    loaded = adapter.load("a/folder")
    assert not loaded.module.training
    assert not any(weight.requires_grad for weight in loaded.module.parameters())

    def gated(weights):
        raise OSError(f"401: access to {weights} is restricted\nsecond line")

    kind.from_pretrained = staticmethod(gated)
    with pytest.raises(
        ValueError, match=r"cannot load a/folder \(401: access .* restricted\): accept its terms"
    ) as error:
        adapter.load("a/folder")
    assert "\n" not in str(error.value)
    monkeypatch.setattr(kind, "from_pretrained", staticmethod(lambda weights: Path(weights).read_bytes()))
    with pytest.raises(ValueError, match=r"cannot load a/folder \(.*No such file.*\): " + adapter.SOURCE.name):
        adapter.load("a/folder")


def test_depth_anything_3_itself(tmp_path):
    """The real class with random weights; skipped where the package is not installed."""
    pytest.importorskip("depth_anything_3.model.da3", reason="depth-anything-3 is not installed", exc_type=ImportError)
    from safetensors.torch import save_model

    torch.manual_seed(0)
    backbone = depth_anything3.backbone(depth_anything3.build("da3-small"))
    assert backbone.spec.stitch_points == tuple(f"backbone.pretrained.blocks.{k}" for k in range(4))
    clip = video(1)
    truth = backbone.forward_rgb(clip)
    tokens = backbone.tokens_at(backbone.spec.stitch_points, clip)
    for point in backbone.spec.stitch_points:
        assert largest_difference(backbone.forward_from(point, tokens[point]), truth) == 0.0
    point = backbone.spec.stitch_points[0]  # after the last of them the class token is replaced
    given = Tokens(*(x.requires_grad_() for x in tokens[point]))
    total = sum(random_projection(backbone.forward_from(point, given)).values())
    assert all(x.abs().max() > 0 for x in torch.autograd.grad(total, given))
    save_model(nn.ModuleDict({"model": backbone.module}), tmp_path / "model.safetensors")
    assert largest_difference(depth_anything3.load(tmp_path, "da3-small").forward_rgb(clip), truth) == 0.0
    with pytest.raises(ValueError, match=r"is not da3-base: size mismatch for model\.") as error:
        depth_anything3.load(tmp_path, "da3-base")
    assert "\n" not in str(error.value)


def test_depth_anything_3_says_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "depth_anything_3.cfg", None)
    with pytest.raises(ValueError, match="pip install --no-deps depth-anything-3"):
        depth_anything3.load(tmp_path, "da3-small")
    fake = ModuleType("depth_anything_3.cfg")
    fake.create_object = lambda cfg: nn.Linear(2, 2)

    def load_config(path):
        if not path.endswith("da3-small"):
            raise FileNotFoundError(path)

    fake.load_config = load_config
    monkeypatch.setitem(sys.modules, "depth_anything_3", ModuleType("depth_anything_3"))
    monkeypatch.setitem(sys.modules, "depth_anything_3.cfg", fake)
    with pytest.raises(ValueError, match=r"no weights at .*model\.safetensors; Depth Anything 3: code"):
        depth_anything3.load(tmp_path, "da3-small")
    with pytest.raises(ValueError, match="depth_anything_3 has no model 'da3-tiny'"):
        depth_anything3.load(tmp_path, "da3-tiny")
