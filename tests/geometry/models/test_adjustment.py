"""Direct bundle adjustment on the world: cameras and depth move to the truth, by what features say and nothing else."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import geometry.models.adjustment as adjustment
from geometry.cameras import pixel_grid, project, rigid, so3_exp, so3_log, unproject
from geometry.models import path
from geometry.models.adjustment import adjust, matched, pictures, placed
from geometry.models.sightings import Edges
from geometry.world import make_clips

PATCH = 4
PAIRS = [(i, i + 1) for i in range(4)] + [(i + 1, i) for i in range(4)] + [(0, 2), (1, 3), (2, 4), (0, 4)]
TRUST = torch.zeros(())


@pytest.fixture(scope="module")
def world():
    """Five frames of four clips, in which nothing moves but the camera; their own pixels are the features."""
    clip = make_clips(range(810, 814), motion="random")
    return SimpleNamespace(video=clip.video[:, :5], geometry=clip.geometry.map(lambda x: x[:, :5]))


@pytest.fixture(scope="module")
def seen(world):
    source, target = torch.tensor(PAIRS).unbind(1)
    shape = (4, len(PAIRS), 16, 16)
    return Edges(source, target, torch.zeros(*shape, 2), torch.zeros(*shape, 2, 2), torch.ones(shape))


def features(world):
    return 4 * world.video - 2


def token_depth(world):
    return F.avg_pool2d(world.geometry.depth.log(), PATCH)


def turned_away(c2w, degrees, shift, seed=0):
    """Cameras that are wrong by about so much, but for the first."""
    rng = torch.Generator().manual_seed(seed)
    turn = torch.deg2rad(torch.tensor(degrees)) * torch.randn(*c2w.shape[:2], 3, generator=rng)
    off = rigid(so3_exp(turn), shift * torch.randn(*c2w.shape[:2], 3, generator=rng))
    off[:, 0] = torch.eye(4)
    return c2w @ off


def error(found, wanted):
    """Mean degrees, and mean distance."""
    turn = torch.rad2deg(so3_log(wanted[..., :3, :3].mT @ found[..., :3, :3]).norm(dim=-1))
    return turn[:, 1:].mean(), (found - wanted)[:, 1:, :3, 3].norm(dim=-1).mean()


def test_cameras_that_are_off_come_back(world, seen):
    truth = world.geometry
    start = turned_away(truth.c2w, 0.5, 0.02)
    before, after = (
        error(c2w, truth.c2w)
        for c2w in (start, adjust(features(world), seen, token_depth(world), truth.intrinsics, start, TRUST)[0])
    )
    assert after[0] < 0.25 * before[0]
    assert after[1] < 0.4 * before[1]


def test_other_frames_or_the_wrong_sign_lead_astray(world, seen, monkeypatch):
    truth = world.geometry
    start = turned_away(truth.c2w, 0.5, 0.02)
    before = error(start, truth.c2w)[0]
    others = features(world)[:, [0, 3, 1, 4, 2]]
    assert error(adjust(others, seen, token_depth(world), truth.intrinsics, start, TRUST)[0], truth.c2w)[0] > before

    def backwards(*args):
        asked, push = matched(*args)
        return asked._replace(flow=2 * args[2] - asked.flow), -push

    monkeypatch.setattr(adjustment, "matched", backwards)
    found = adjust(features(world), seen, token_depth(world), truth.intrinsics, start, TRUST)[0]
    assert error(found, truth.c2w)[0] > before


def test_the_more_errors_are_shared_the_steadier_is_the_path(world, seen, monkeypatch):
    truth, rng = world.geometry, torch.Generator().manual_seed(3)
    noisy = features(world) + 0.3 * torch.randn(world.video.shape, generator=rng)
    jolt = []
    for shared in (0.01, path.SHARED, 10 * path.SHARED):
        monkeypatch.setattr(path, "SHARED", shared)
        found = adjust(noisy, seen, token_depth(world), truth.intrinsics, truth.c2w, TRUST)[0]
        jolt.append(found[..., :3, 3].diff(dim=1).diff(dim=1).norm(dim=-1).mean())
    assert jolt[0] > 1.02 * jolt[1] > 1.04 * jolt[2], jolt


def test_parallax_corrects_the_depth_where_there_is_any(world, seen):
    truth = world.geometry
    wanted = token_depth(world)
    rng = torch.Generator().manual_seed(1)
    wrong = wanted + 0.3 * F.interpolate(torch.randn(4, 5, 4, 4, generator=rng), size=(16, 16), mode="bilinear")
    _, found = adjust(features(world), seen, wrong, truth.intrinsics, truth.c2w, TRUST)
    off = [((x - wanted) - (x - wanted).flatten(1).median(1).values[:, None, None, None]).abs() for x in (wrong, found)]
    assert off[1].mean() < 0.8 * off[0].mean()
    still = adjust(features(world)[:, :1].expand(-1, 5, -1, -1, -1), seen, wrong, truth.intrinsics,
                   torch.eye(4).expand(4, 5, 4, 4), TRUST)[1]  # fmt: skip
    assert (still - wrong).abs().mean() < 0.1 * (found - wrong).abs().mean()


def test_without_texture_nothing_is_said(world, seen):
    truth = world.geometry
    flat = torch.full_like(features(world), 0.3)
    start = turned_away(truth.c2w, 0.5, 0.02)
    depth = token_depth(world)
    assert torch.equal(adjust(flat, seen, depth, truth.intrinsics, truth.c2w, TRUST)[1], depth)
    at = placed(start, depth, truth.intrinsics, seen, PATCH)[0]
    asked, push = matched(pictures(flat, PATCH, PATCH), seen, at, PATCH)
    assert asked.information.abs().max() < 1e-8
    assert push.abs().max() < 1e-8


def test_tokens_are_placed_where_the_cameras_see_their_points(world, seen):
    truth = world.geometry
    depth = token_depth(world)
    flow, slope = placed(truth.c2w, depth, truth.intrinsics, seen, PATCH)
    scaled = truth.intrinsics.clone()
    scaled[..., :2, :] /= PATCH  # the same lens, in tokens
    points = unproject(depth.exp(), scaled, truth.c2w)
    at, _ = project(points[:, seen.source], scaled[:, seen.target], truth.c2w[:, seen.target])
    torch.testing.assert_close(flow, PATCH * (at - pixel_grid(16, 16, at)), atol=2e-3, rtol=0)
    further = placed(truth.c2w, depth + 1e-2, truth.intrinsics, seen, PATCH)[0]
    torch.testing.assert_close((further - flow) / 1e-2, slope, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("cells", [2, 4])
def test_features_ask_for_the_shift_that_they_have_seen(cells):
    shift = torch.tensor([0.4, -0.3])
    place = pixel_grid(64, 64, shift)

    def waves(at):
        u, v = at.unbind(-1)
        return torch.stack([torch.sin(0.5 * u + 0.2 * v), torch.cos(0.3 * u - 0.45 * v), torch.sin(0.4 * (u + v))])

    video = torch.stack([waves(place), waves(place - shift)])[None]
    pair = Edges(
        torch.tensor([0]), torch.tensor([1]), *(torch.ones(1, 1, 16, 16, *more) for more in ((2,), (2, 2), ()))
    )
    for at in (torch.zeros(2), shift):
        asked, push = matched(pictures(video, PATCH, cells), pair, at.expand(1, 1, 16, 16, 2), PATCH)
        inner = asked.flow[:, :, 2:-2, 2:-2]
        torch.testing.assert_close(inner, shift.expand_as(inner), atol=0.15 if cells < PATCH else 0.05, rtol=0)
        wanted = (asked.information @ (at - asked.flow)[..., None])[..., 0]
        torch.testing.assert_close(push, wanted, atol=0.02 * push.abs().max().item() + 1e-3, rtol=0)


def test_gradients_reach_features_depth_and_say(world, seen):
    truth = world.geometry
    given = {"features": features(world), "depth": token_depth(world), "say": seen.say.clone()}
    for tensor in given.values():
        tensor.requires_grad_()
    start = turned_away(truth.c2w, 0.3, 0.01)
    c2w, depth = adjust(
        given["features"], seen._replace(say=given["say"]), given["depth"], truth.intrinsics, start, TRUST
    )
    for out in (c2w[:, 1:].square().sum(), depth.sum()):
        gradients = torch.autograd.grad(out, list(given.values()), retain_graph=True)
        for name, gradient in zip(given, gradients, strict=True):
            assert gradient.isfinite().all(), name
            assert gradient.abs().max() > 0, name


def test_one_frame_has_nothing_to_adjust(world):
    none = torch.zeros(0, dtype=torch.long)
    nothing = Edges(
        none, none, torch.zeros(4, 0, 16, 16, 2), torch.zeros(4, 0, 16, 16, 2, 2), torch.zeros(4, 0, 16, 16)
    )
    start, depth = world.geometry.c2w[:, :1], token_depth(world)[:, :1]
    found = adjust(features(world)[:, :1], nothing, depth, world.geometry.intrinsics[:, :1], start, TRUST)
    assert found[0] is start
    assert found[1] is depth


def test_the_gradient_of_the_cameras_is_that_of_the_solution(world, seen, monkeypatch):
    """To within a factor: the last step knows cameras at this depth, and the solution moves the depth with them."""
    monkeypatch.setattr(adjustment, "ROUNDS", 6 * (PATCH,))
    truth = world.geometry
    rng = torch.Generator().manual_seed(2)
    images, depth = features(world), token_depth(world)
    toward = F.avg_pool2d(torch.randn(images.flatten(0, 1).shape, generator=rng), 3, 1, 1).view(images.shape)
    which = torch.randn(4, 5, 4, 4, generator=rng)

    def cameras(share):
        return (which * adjust(images + share * toward, seen, depth, truth.intrinsics, truth.c2w, TRUST)[0]).sum(
            (1, 2, 3)
        )

    share = torch.zeros((), requires_grad=True)
    exact = torch.stack([torch.autograd.grad(x, share, retain_graph=True)[0] for x in cameras(share)])
    with torch.no_grad():
        numeric = (cameras(torch.tensor(0.02)) - cameras(torch.tensor(-0.02))) / 0.04
    assert F.cosine_similarity(exact, numeric, dim=0) > 0.9
    assert 0.5 < exact.norm() / numeric.norm() < 2
