"""Epipolar consistency: the world's own tracks, kornia's formula, invariances, gradients, and degenerate baselines."""

from dataclasses import replace

import pytest
import torch
from kornia.geometry.epipolar import fundamental_from_projections, sampson_epipolar_distance

from geometry.cameras import inverse, rigid, so3_exp
from geometry.world import make_clips
from rewards import Matches, epipolar, sampson_errors
from tests.rewards.helpers import line, moved, scaled, walk

POSE = rigid(so3_exp(torch.tensor([0.4, -1.1, 0.3])), torch.tensor([2.0, -1.0, 5.0]))


def matches_of(clip, frames=((0, 4), (0, 8), (0, 16)), num=40, seed=0):
    """True correspondences of a batch of clips, from frame 0 to others."""
    H, W = clip.video.shape[-2:]
    generator = torch.Generator().manual_seed(seed)
    pixels = 0.5 + (torch.rand(len(clip), num, 2, generator=generator) * torch.tensor([W - 1, H - 1]))
    tracks = clip.track(pixels)
    first, second = torch.tensor(frames).T
    usable = tracks.visible[:, first] & tracks.visible[:, second]
    return Matches(first, second, tracks.pixels[:, first], tracks.pixels[:, second], usable)


@pytest.fixture(scope="module")
def clips():
    return make_clips(range(60, 64), size=(32, 40), motion="truck", supersample=1)


def turned(scene, degrees, axis=1):
    """Every pose after the first turned by so much about its own axis."""
    omega = torch.zeros(3)
    omega[axis] = torch.deg2rad(torch.tensor(float(degrees)))
    twist = rigid(so3_exp(omega), torch.zeros(3)).expand(*scene.c2w.shape).clone()
    twist[..., 0, :, :] = torch.eye(4)
    return replace(scene, c2w=scene.c2w @ twist)


def test_the_truth_explains_its_own_tracks_and_wrong_poses_do_not(clips):
    matches = matches_of(clips)
    scene = clips.geometry
    assert (matches.usable.sum(-1) >= 8).all()
    assert (epipolar(scene, matches) > -1e-3).all()
    scores = torch.stack([epipolar(turned(scene, angle, 0), matches) for angle in (0.5, 1, 2)])
    assert (scores.diff(dim=0) < 0).all()
    assert (scores[0] < -0.03).all()
    assert (epipolar(scene, matches_of(clips, ((0, 4), (0, 8), (16, 0)), seed=1)) > -1e-3).all()  # and backwards
    shuffled = replace(matches, there=matches.there.roll(1, -2))
    assert (epipolar(scene, shuffled) < -0.2).all()  # the control: correspondences of other points


def test_agrees_with_kornia(clips):
    """Its formula (the square of ours) from projection matrices, a way that ours does not take."""
    matches, scene = matches_of(clips), turned(clips.geometry, 2)
    scene = scene.map(lambda x: x.double() if x.is_floating_point() else x)
    ours = sampson_errors(scene, matches) * (32**2 + 40**2) ** 0.5
    views = scene.intrinsics @ inverse(scene.c2w)[..., :3, :]
    F = fundamental_from_projections(views[:, matches.first].flatten(0, 1), views[:, matches.second].flatten(0, 1))
    at, there = (x.double().flatten(0, 1) for x in (matches.at, matches.there))
    theirs = sampson_epipolar_distance(at, there, F).sqrt().view(ours.shape)
    torch.testing.assert_close(ours, theirs.where(matches.usable, 0.0), rtol=1e-4, atol=1e-6)
    assert ours.max() > 0.1


def test_a_match_that_is_off_across_the_epipolar_line_is_off_by_that_much():
    """A camera that trucks: lines are rows. v off by d in one image: the error is d / sqrt(2) of the diagonal."""
    scene = walk(line(2, (0.5, 0, 0)), size=16)
    at = torch.rand(1, 10, 2, generator=torch.Generator().manual_seed(0)) * 16
    there, pair = at - torch.tensor([3.0, 0.8]), (torch.tensor([0]), torch.tensor([1]))
    usable = torch.ones(1, 10, dtype=torch.bool)
    error = sampson_errors(scene, Matches(*pair, at, there, usable))
    torch.testing.assert_close(error, torch.full_like(error, 0.8 / 2**0.5 / (16 * 2**0.5)), rtol=1e-4, atol=1e-6)
    assert epipolar(scene, Matches(*pair, at, there, usable), cap=0.1) == pytest.approx(-0.25, rel=1e-3)
    far = Matches(*pair, at, at + torch.tensor([0.0, 9.0]), usable)
    assert epipolar(scene, far, cap=0.1) == -1.0


def test_invariances(clips):
    matches, scene = matches_of(clips), turned(clips.geometry, 1, 0)
    score = epipolar(scene, matches)
    torch.testing.assert_close(epipolar(moved(scene, POSE), matches), score, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(epipolar(scaled(scene, 7.0), matches), score, rtol=1e-3, atol=1e-4)
    there = Matches(matches.second, matches.first, matches.there, matches.at, matches.usable)
    torch.testing.assert_close(epipolar(scene, there), score, rtol=1e-3, atol=1e-4)
    deeper = replace(scene, depth=scene.depth * torch.linspace(0.9, 1.1, scene.depth.shape[-1]))
    torch.testing.assert_close(epipolar(deeper, matches), score, rtol=1e-4, atol=1e-5)  # depth has no say
    groups = scene.map(lambda x: x.reshape(2, 2, *x.shape[1:]))
    pairs = {name: getattr(matches, name).unflatten(0, (2, 2)) for name in ("at", "there", "usable")}
    torch.testing.assert_close(epipolar(groups, replace(matches, **pairs)), score.view(2, 2))


def test_gradients_agree_with_finite_differences_and_mend_a_pose(clips):
    one = matches_of(clips)
    one = replace(one, at=one.at[0].double(), there=one.there[0].double(), usable=one.usable[0])
    scene = clips.geometry.map(lambda x: x[0].double() if x.is_floating_point() else x[0])

    def score(twist, focal):
        return epipolar(
            replace(scene, c2w=scene.c2w @ rigid(so3_exp(twist), twist / 50), intrinsics=scene.intrinsics * focal), one
        )

    wrong = 0.02 * torch.randn(17, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    focal = torch.tensor([[1.02, 1.02, 1.02], [1.02, 1.02, 1.02], [1, 1, 1]], dtype=torch.float64)
    given = [wrong.clone().requires_grad_(), focal.requires_grad_()]
    assert torch.autograd.gradcheck(score, given, eps=1e-7, atol=1e-4)
    twist = wrong.clone().requires_grad_()
    optimizer = torch.optim.Adam([twist], lr=2e-3)
    before = score(twist, 1.0).item()
    for _ in range(60):
        optimizer.zero_grad()
        (-score(twist, 1.0)).backward()
        optimizer.step()
    assert score(twist, 1.0) > 0.3 * before


def test_without_a_baseline_or_matches_there_is_no_score(clips):
    matches, scene = matches_of(clips), clips.geometry
    frozen = replace(scene, c2w=torch.eye(4).expand_as(scene.c2w))
    assert epipolar(frozen, matches).isnan().all()
    none = matches.usable.clone()
    none[1], none[2, 1:] = False, False
    nowhere = matches.at.where(none[..., None], torch.nan)
    score = epipolar(scene, replace(matches, usable=none, at=nowhere))
    assert score.isnan().tolist() == [False, True, False, False]
    c2w = scene.c2w.clone()
    c2w[3, 2] = torch.nan
    intrinsics = scene.intrinsics.clone()
    intrinsics[0, 0, 0, 0] = torch.nan
    score = epipolar(replace(scene, c2w=c2w, intrinsics=intrinsics), matches)
    assert score.isnan().tolist() == [True, False, False, True]


def test_bad_arguments_are_named(clips, as_users_run):
    matches, scene = matches_of(clips), clips.geometry
    bad = {
        r"matches.second must be 3 frames of 0 to 16, got \[4, 8, 17\]": {"second": torch.tensor([4, 8, 17])},
        r"matches.there must be \[4, 3, 40, 2\], got \[4, 3, 39, 2\]": {"there": matches.there[:, :, :-1]},
        r"matches.at must be \[4, 3, 40, 2\], got \[3, 3, 40, 2\]": {"at": matches.at[:3]},
        "matches.first must be some frames": {"first": torch.tensor([], dtype=torch.long)},
    }
    for named, change in bad.items():
        with pytest.raises(ValueError, match=named):
            epipolar(scene, replace(matches, **change))
    with pytest.raises(ValueError, match="baseline, cap and min_matches must be > 0"):
        epipolar(scene, matches, cap=0.0)
