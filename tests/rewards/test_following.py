"""Camera following: closed forms, invariances, gradients, and commands that ask for nothing."""

import math
from dataclasses import replace

import pytest
import torch

from geometry.cameras import rigid, so3_exp
from geometry.world import make_clips
from rewards import camera_following
from tests.rewards.helpers import line, moved, scaled, walk

POSE = rigid(so3_exp(torch.tensor([0.4, -1.1, 0.3])), torch.tensor([2.0, -1.0, 5.0]))
TRUCK, BACK, RISE = line(9, (0.1, 0, 0)), line(9, (-0.1, 0, 0)), line(9, (0, 0.1, 0))
PAN = line(9, (0, 0.04, 0))
STILL = torch.zeros(9, 3)


def commanded(position, rotation=None):
    return walk(position, rotation).c2w


@pytest.mark.parametrize(
    ("done", "wanted", "expected"),
    [
        ((TRUCK, STILL), (TRUCK, STILL), 1.0),
        ((TRUCK, PAN), (TRUCK, PAN), 1.0),
        ((3 * TRUCK, STILL), (TRUCK, STILL), 1.0),  # a command's length has units of its own
        ((BACK, STILL), (TRUCK, STILL), 0.5),  # e_trans 1, e_rot 0
        ((STILL, STILL), (TRUCK, STILL), 0.5),
        ((STILL, STILL), (TRUCK, PAN), 0.0),
        ((RISE, STILL), (TRUCK, STILL), 1 - math.sqrt(2) / 4),  # |a - b| = sqrt(2), |a| + |b| = 2
        ((STILL, PAN), (STILL, PAN), 1.0),
        ((STILL, -PAN), (STILL, PAN), 0.5),
        ((STILL, 2 * PAN), (STILL, PAN), 1 - 1 / 6),  # e_rot = (2 - 1) / (2 + 1)
        ((TRUCK, PAN), (STILL, PAN), 0.5),  # translation that nobody asked for, all of it wrong
        ((STILL, STILL), (STILL, STILL), 1.0),
    ],
)
def test_by_hand(done, wanted, expected):
    assert camera_following(walk(*done), commanded(*wanted)) == pytest.approx(expected, abs=2e-3)


def test_speeds_within_the_clip_count_and_length_does_not():
    early = torch.cat([2 * TRUCK[:5], TRUCK[8].expand(4, 3)])  # all of the way in the first half
    assert camera_following(walk(early), commanded(TRUCK)) < 0.75
    assert camera_following(walk(early), commanded(5 * early)) == pytest.approx(1.0, abs=1e-3)


def test_noise_below_the_floor_is_no_disobedience():
    noise = 2e-3 * torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    assert camera_following(walk(noise, noise), commanded(STILL)) > 0.9
    assert camera_following(walk(noise, noise), commanded(STILL), floor=1e-4) < 0.6  # the control
    assert camera_following(walk(noise, noise), commanded(TRUCK)) < 0.6  # and no obedience either


def test_invariances():
    clips = make_clips(range(20, 26), size=(12, 12), motion="random")
    scene, wanted = clips.geometry, clips.geometry.c2w.roll(1, 0)
    score = camera_following(scene, wanted)
    assert score.shape == (6,)
    assert (score < 0.8).all()
    torch.testing.assert_close(camera_following(moved(scene, POSE), wanted), score, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(camera_following(scene, POSE @ wanted), score, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(camera_following(scaled(scene, 7.0), wanted), score, rtol=1e-3, atol=1e-3)
    groups = scene.map(lambda x: x.reshape(2, 3, *x.shape[1:]))
    assert torch.equal(camera_following(groups, wanted.reshape(2, 3, -1, 4, 4)), score.reshape(2, 3))
    one = camera_following(groups, wanted.reshape(2, 3, -1, 4, 4)[:, :1])  # a command for each group
    torch.testing.assert_close(one[:, 0], score.reshape(2, 3)[:, 0])


def test_the_command_of_its_own_clip_is_followed_best():
    clips = make_clips(range(40, 48), size=(12, 12), motion="random")
    own = camera_following(clips.geometry, clips.geometry.c2w)
    assert (own > 0.999).all()
    others = torch.stack([camera_following(clips.geometry, clips.geometry.c2w.roll(k, 0)) for k in range(1, 8)])
    assert (others < own).all()


def test_gradients_agree_with_finite_differences_and_point_to_the_command():
    generator = torch.Generator().manual_seed(0)
    position, rotation = 0.1 * torch.randn(2, 6, 3, dtype=torch.float64, generator=generator)
    wanted = commanded(line(6, (0.1, 0, 0.05), torch.float64), line(6, (0, 0.1, 0), torch.float64))

    def score(position, rotation):
        return camera_following(walk(position, rotation), wanted)

    given = [position.requires_grad_(), rotation.requires_grad_()]
    assert torch.autograd.gradcheck(score, given, eps=1e-6, atol=1e-5)
    optimizer = torch.optim.Adam(given, lr=0.02)
    for _ in range(120):
        optimizer.zero_grad()
        (-score(*given)).backward()
        optimizer.step()
    assert score(*given) > 0.9


def test_a_frozen_camera_has_a_finite_gradient():
    position = torch.zeros(5, 3, requires_grad=True)
    camera_following(walk(position), commanded(TRUCK[:5])).backward()
    assert position.grad.isfinite().all()


def test_what_cannot_be_scored_is_nan_and_nothing_else_is_touched():
    scene = make_clips(range(3), size=(12, 12), motion="random").geometry
    c2w = scene.c2w.clone()
    c2w[1, 4] = torch.nan
    score = camera_following(replace(scene, c2w=c2w), scene.c2w)
    assert score.isnan().tolist() == [False, True, False]
    assert camera_following(scene.map(lambda x: x[:, :1]), scene.c2w[:, :1]).isnan().all()


def test_bad_arguments_are_named(as_users_run):
    with pytest.raises(ValueError, match=r"commanded must be c2w \[\*batch 9 4 4\], .*, got \[5, 4, 4\]"):
        camera_following(walk(TRUCK), commanded(TRUCK[:5]))
    with pytest.raises(ValueError, match="segments must be >= 1"):
        camera_following(walk(TRUCK), commanded(TRUCK), segments=0)
    with pytest.raises(ValueError, match="floor > 0"):
        camera_following(walk(TRUCK), commanded(TRUCK), floor=0.0)
