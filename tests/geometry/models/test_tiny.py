"""The embedded network: driven through the same hooks as the large ones, right by construction before any training."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from geometry.backbone import HookedBackbone, Tokens
from geometry.cameras import relative, unproject
from geometry.models.correlation import Correspondence, Spans
from geometry.models.cues import sideways
from geometry.models.tiny import TinyConfig, TinyGeometry, call, parse, spec
from geometry.types import check_geometry
from geometry.world import make_clips
from vggrpo.bootstrap.lesson import lesson

CONFIG = TinyConfig()


@pytest.fixture(scope="module", params=[False, True], ids=["displacements", "adjusted"])
def backbone(request) -> HookedBackbone:
    torch.manual_seed(0)
    network = TinyGeometry(replace(CONFIG, adjust=request.param))
    for name, weight in network.named_parameters():
        if weight.ndim > 1 and weight.abs().max() == 0:  # what starts at zero would hide what it multiplies
            torch.nn.init.normal_(weight, std=0.02, generator=torch.Generator().manual_seed(len(name)))
    return HookedBackbone(network, spec(CONFIG), call, parse).eval()


@pytest.mark.parametrize(("frames", "size"), [(5, (64, 64)), (1, (64, 64)), (2, (36, 52))])
def test_its_answers_keep_the_conventions(backbone, frames, size):
    """Also of one frame, of other sides, and of token grids (9 x 13) that two by two do not divide."""
    video = torch.rand(2, frames, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        scene = backbone(video)
    check_geometry(scene)
    assert scene.depth.shape == (2, frames, *size)
    assert torch.equal(scene.c2w[:, 0], torch.eye(4).expand(2, 4, 4))
    torch.testing.assert_close(scene.points, unproject(scene.depth, scene.intrinsics, scene.c2w))
    assert torch.equal(scene.intrinsics[..., :2, 2], torch.tensor([size[1] / 2, size[0] / 2]).expand(2, frames, 2))


@pytest.mark.parametrize("point", spec(CONFIG).stitch_points)
def test_all_that_follows_the_encoder_sees_tokens_only(backbone, point):
    video = torch.rand(1, 5, 3, 32, 48, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        tokens = backbone.tokens_at([point], video)[point]
        whole, entered = backbone(video), backbone.forward_from(point, tokens)
        other = backbone.forward_from(point, Tokens(tokens.prefix, tokens.patch.flip(1)))
    for name in ("c2w", "intrinsics", "depth", "points", "confidence", "scene_flow"):
        assert torch.equal(getattr(whole, name), getattr(entered, name)), name
        assert not torch.equal(getattr(whole, name), getattr(other, name)), name


def test_gradients_reach_the_tokens_from_every_output(backbone):
    point = spec(CONFIG).stitch_points[0]
    video = make_clips([3], frames=5, supersample=1).video
    tokens = backbone.tokens_at([point], video)[point]
    for name in ("c2w", "intrinsics", "depth", "points", "confidence", "scene_flow"):
        patch = tokens.patch.detach().requires_grad_()
        output = getattr(backbone.forward_from(point, Tokens(tokens.prefix.detach(), patch)), name)
        probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
        (gradient,) = torch.autograd.grad((output * probe).sum(), patch)
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name


def test_cameras_feel_frames_further_apart(backbone):
    """The trust in spans of four frames changes the path of five frames, and cannot that of three."""
    for frames, changes in ((5, True), (3, False)):
        video = make_clips([3], frames=frames, supersample=1).video
        with torch.no_grad():
            before = backbone(video).c2w
            backbone.module.apart[1] += 2.0
            after = backbone(video).c2w
            backbone.module.apart[1] -= 2.0
        assert torch.equal(before, after) != changes


def test_cameras_are_the_same_with_and_without_gradients(backbone):
    """The last step of the adjustment is always taken, and is the one that is differentiated."""
    video = make_clips([3], frames=5, supersample=1).video
    with torch.no_grad():
        plain = backbone(video).c2w
    assert torch.equal(plain, backbone(video.requires_grad_()).c2w)


def test_given_intrinsics_are_used_and_given_back(backbone):
    clip = make_clips([4], frames=3, supersample=1)
    with torch.no_grad():
        known = backbone(clip.video, clip.geometry.intrinsics)
        wide = backbone(clip.video, clip.geometry.intrinsics * torch.tensor([0.5, 0.5, 1.0])[:, None])
    assert torch.equal(known.intrinsics, clip.geometry.intrinsics)
    assert not torch.allclose(known.c2w, wide.c2w, atol=1e-4)


def test_a_side_that_the_patch_does_not_divide_is_refused(backbone):
    with pytest.raises(ValueError, match="multiples of 4, got 63 x 64"):
        backbone.module(torch.rand(1, 2, 3, 63, 64))


def test_only_what_is_configured_adjusts():
    """One weight more, and otherwise the same network, whose cameras start where the other's end."""
    clip = make_clips([3], frames=5, supersample=1)
    torch.manual_seed(0)
    plain = TinyGeometry(CONFIG)
    adjusted = TinyGeometry(replace(CONFIG, adjust=True))
    missing = adjusted.load_state_dict(plain.state_dict(), strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == (["trust"], [])
    with torch.no_grad():
        found = [network(clip.video, clip.geometry.intrinsics) for network in (plain, adjusted)]
    assert torch.equal(found[0].guess, found[0].log_depth)
    assert torch.equal(found[0].guess, found[1].guess)
    assert not torch.equal(found[1].guess, found[1].log_depth)
    assert not torch.equal(found[0].c2w, found[1].c2w)


def test_untrained_it_follows_the_world_already():
    """The tokens start as their pixels, so that training begins with correspondence; a wrong pairing has none."""
    torch.manual_seed(0)
    network = TinyGeometry(CONFIG)
    clip = make_clips(range(60, 64), frames=9)
    wanted = lesson(clip, CONFIG.patch).flow[:, :-1].float()
    with torch.no_grad():
        flow = network(clip.video, clip.geometry.intrinsics).correspondence.flow
        astray = network(clip.video.roll(1, 0), clip.geometry.intrinsics).correspondence.flow
    size = wanted.norm(dim=-1).mean()
    assert (flow - wanted).norm(dim=-1).mean() < 0.7 * size
    assert (flow - wanted).norm(dim=-1).median() < 0.4 * wanted.norm(dim=-1).median()
    assert (astray - wanted).norm(dim=-1).mean() > size


def test_importing_it_loads_no_transformers():
    code = "import sys, geometry.models.tiny; print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_moving_bodies_are_seen_in_what_the_camera_does_not_explain():
    """With the true depth, cameras and flow, the sideways part of scene flow is exact; without motion it is nothing."""
    for dynamic in (True, False):
        clip = make_clips([722], frames=5, dynamic=dynamic, supersample=1)
        truth, scene = lesson(clip, 4), clip.geometry
        flow = truth.flow[:, :-1].float()
        none = torch.zeros(flow.shape[:-1])
        nowhere = torch.zeros(0, dtype=torch.long)
        spans = Spans(nowhere, nowhere, flow[:, :0, 0], none[:, :0, 0], none[:, :0, 0, ..., None, None])
        pair = Correspondence(flow, flow, none, none[..., None, None], torch.zeros(1, 5, 1, 64, 64), spans)
        log_depth = F.avg_pool2d(scene.depth, 4).log()
        found = sideways(pair, relative(scene.c2w), log_depth, scene.intrinsics, 4)[:, :-1].movedim(2, -1)
        wanted = F.avg_pool2d(truth.motion.float().movedim(-1, 2).flatten(0, 1), 4).unflatten(0, (1, 5))
        wanted = wanted.movedim(2, -1)[:, :-1]
        moving = wanted.norm(dim=-1) > 0.02
        if dynamic:
            assert moving.float().mean() > 0.05
            error = (found - wanted)[..., :2].norm(dim=-1)[moving].median()
            assert error < 0.15 * wanted[..., :2].norm(dim=-1)[moving].median()
        else:
            assert found.norm(dim=-1).median() < 1e-3
