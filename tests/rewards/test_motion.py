"""Motion rewards: closed forms, the slow reference, invariances, gradients, and cases where 0/0 lurks."""

import math
from dataclasses import replace

import pytest
import torch

from geometry.cameras import rigid, so3_exp
from geometry.world import make_clips
from rewards import camera_motion, camera_motion_floor, motion_errors, motion_prior, motion_smoothness
from tests.rewards import reference
from tests.rewards.helpers import backwards, line, moved, scaled, walk

POSE = rigid(so3_exp(torch.tensor([0.4, -1.1, 0.3])), torch.tensor([2.0, -1.0, 5.0]))


@pytest.mark.parametrize("floor", [0.0, 0.06])
def test_constant_velocity_is_perfectly_smooth(floor):
    straight = walk(line(9, (0.03, 0.0, 0.05)))
    turning = walk(line(9, (0.0, 0.0, 0.0)), line(9, (0.0, 0.02, 0.01)))
    both = walk(line(9, (0.03, 0.0, 0.05)), line(9, (0.0, 0.02, 0.01)))
    for scene in (straight, turning, both):
        assert motion_smoothness(scene, floor=floor) == pytest.approx(1.0, abs=2e-4)


def test_a_zigzag_scores_what_it_scores_by_hand():
    """Steps +x, -x, +x, ...: |a| = 2 |v| and |v| + |v'| = 2 |v|, so e_trans = 1; no turning, so e_rot = 0."""
    x = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])
    zigzag = walk(torch.stack([x, 0 * x, 0 * x], -1))
    assert motion_smoothness(zigzag, floor=0.0) == pytest.approx(0.5 * (1 / 2 + 1))
    shaking = walk(0 * line(5, (1, 1, 1)), torch.stack([0.1 * x, 0 * x, 0 * x], -1))
    assert motion_smoothness(shaking, floor=0.0) == pytest.approx(0.5 * (1 + 1 / 2))
    corner = walk(torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0]]))  # |a| = sqrt(2), |v| + |v'| = 2
    assert motion_smoothness(corner, floor=0.0) == pytest.approx(0.5 * (1 / (1 + 2**0.5 / 2) + 1))
    assert motion_errors(corner, floor=0.0).translation.tolist() == pytest.approx([2**0.5 / 2])


def test_the_rotation_acceleration_is_a_difference_of_vectors():
    """A constant turn about an axis off the coordinate axes; flattening (T, 3) into one track would give e_rot > 0."""
    scene = walk(line(9, (0, 0, 0), torch.float64), line(9, (0.03, 0.05, 0.02), torch.float64))
    assert motion_errors(scene, floor=0.0).rotation.max() < 1e-9
    naive = torch.diff(scene.c2w[:, :3, :3], dim=0).flatten(1).diff(dim=0).norm(dim=1)
    assert naive.min() > 1e-4  # the control: second differences of the matrices do not vanish


def test_what_does_not_move_is_not_judged():
    """0/0 must not become 1/2 (which would score a resting or purely turning camera 0.83)."""
    still = walk(torch.zeros(6, 3))
    pan = walk(torch.zeros(6, 3), line(6, (0, 0.03, 0)))
    for floor in (0.0, 0.06):
        assert motion_smoothness(still, floor=floor) == 1.0
        assert motion_smoothness(pan, floor=floor) == pytest.approx(1.0, abs=2e-4)


def test_the_floor_changes_nothing_for_a_camera_above_it():
    rough = walk(torch.randn(9, 3, generator=torch.Generator().manual_seed(0)), depth=2.0)
    assert motion_smoothness(rough, floor=0.01) == motion_smoothness(rough, floor=0.0)
    assert motion_smoothness(rough, floor=50.0) > motion_smoothness(rough, floor=0.0)


def test_noise_on_a_still_camera_is_forgiven_with_the_floor_and_damned_without():
    noise = 1e-4 * torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    barely = walk(noise, 0.1 * noise)
    assert motion_smoothness(barely, floor=0.06) > 0.99
    assert motion_smoothness(barely, floor=0.0) < 0.7


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("floor", [0.0, 0.06])
def test_agrees_with_the_slow_reference(dynamic, floor):
    scene = make_clips(range(300, 306), size=(16, 16), dynamic=dynamic, jitter=0.3).geometry
    fast = motion_smoothness(scene, floor=floor)
    slow = [reference.motion_smoothness(scene.map(lambda x, i=i: x[i]), floor) for i in range(6)]
    torch.testing.assert_close(fast, torch.tensor(slow, dtype=fast.dtype), rtol=2e-3, atol=2e-3)


def test_smooth_world_cameras_are_within_half_a_percent_of_perfect():
    for motion in ("static", "pan", "tilt", "dolly_in", "dolly_out", "truck", "pedestal"):
        for dynamic in (False, True):
            scene = make_clips(range(40, 44), size=(16, 16), motion=motion, dynamic=dynamic).geometry
            assert (motion_smoothness(scene) > 0.995).all(), motion
    shaky = make_clips(range(40, 44), size=(16, 16), motion="pan", jitter=0.5).geometry
    assert (motion_smoothness(shaky) < 0.95).all()


@pytest.mark.parametrize("reward", [motion_smoothness, camera_motion_floor, camera_motion])
def test_invariances(reward):
    scene = make_clips(range(20, 26), size=(16, 16), jitter=0.4).geometry
    score = reward(scene)
    assert score.shape == (6,)
    torch.testing.assert_close(reward(moved(scene, POSE)), score, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(reward(scaled(scene, 7.0)), score, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(reward(backwards(scene)), score, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(reward(scene.map(lambda x: x.reshape(2, 3, *x.shape[1:]))), score.reshape(2, 3))
    torch.testing.assert_close(reward(scene.map(lambda x: x[4])), score[4])
    faster = replace(scene, c2w=rigid(scene.c2w[..., :3, :3], 4 * scene.c2w[..., :3, 3]))
    assert not torch.allclose(camera_motion(faster), camera_motion(scene), rtol=1e-2)  # the control: speed is no unit


def test_camera_motion_floor_is_a_hinge():
    for speed, expected in ((0.0, -1.0), (0.01, -0.5), (0.02, 0.0), (0.2, 0.0)):
        scene = walk(line(5, (speed, 0, 0)), depth=2.0)
        assert camera_motion(scene) == pytest.approx(speed / 2)
        assert camera_motion_floor(scene, floor=0.01) == pytest.approx(expected, abs=1e-4)
    turning = walk(torch.zeros(5, 3), line(5, (0, 0.005, 0)))
    assert camera_motion_floor(turning, floor=0.01) == pytest.approx(-0.5, abs=1e-3)


def test_over_several_frames_shake_is_no_motion():
    path, shake = line(17, (0.02, 0, 0)), 0.02 * torch.randn(17, 3, generator=torch.Generator().manual_seed(0))
    smooth, shaken, trembling = walk(path), walk(path + shake), walk(shake)
    assert camera_motion(shaken) > 1.8 * camera_motion(smooth)
    assert camera_motion(smooth, stride=8) == pytest.approx(8 * float(camera_motion(smooth)), rel=1e-4)
    assert camera_motion(shaken, stride=8) == pytest.approx(float(camera_motion(smooth, stride=8)), rel=0.15)
    assert camera_motion(trembling) > camera_motion(smooth), "the control: from frame to frame, shake wins"
    assert camera_motion(trembling, stride=8) < 0.5 * camera_motion(smooth, stride=8)
    assert camera_motion(walk(path[:5]), stride=8) == camera_motion(walk(path[:5]), stride=4)


def test_every_clip_can_have_a_floor_of_its_own():
    scene = walk(line(9, (0.02, 0, 0)), depth=2.0).map(lambda x: torch.stack([x, x]))
    floors = torch.tensor([0.005, 0.02])
    assert camera_motion_floor(scene, floor=floors).tolist() == pytest.approx([0.0, -0.5], abs=1e-3)


def test_the_motion_prior_is_a_gaussian_of_log_motion():
    scene = walk(line(9, (0.02, 0, 0)), depth=2.0)  # 0.08 median depths in eight frames
    for base, expected in ((0.08, 1.0), (0.16, 0.3826), (0.04, 0.3826), (0.08 * math.e, math.exp(-2))):
        assert motion_prior(scene, base) == pytest.approx(expected, abs=2e-3)
    assert motion_prior(scene, 0.16, width=1.0) == pytest.approx(0.3826**0.25, abs=2e-3)
    frozen = walk(torch.zeros(9, 3))
    assert motion_prior(frozen, 0.08) == pytest.approx(math.exp(-2 * math.log(8) ** 2), abs=1e-4)
    assert motion_prior(frozen, 0.0) == 1.0  # it was told to stand still
    assert motion_prior(frozen, 0.005) == 1.0
    both = scene.map(lambda x: torch.stack([x, x]))
    assert motion_prior(both, torch.tensor([0.08, 0.16])).tolist() == pytest.approx([1.0, 0.3826], abs=2e-3)


def test_the_motion_prior_has_gradients_and_names_bad_arguments():
    step = torch.tensor([0.03, 0.01, 0.0], dtype=torch.float64, requires_grad=True)

    def score(step):
        return motion_prior(walk(torch.arange(6, dtype=torch.float64)[:, None] * step), 0.2)

    assert torch.autograd.gradcheck(score, [step], eps=1e-7, atol=1e-6)
    still = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(score(still), still)[0].isfinite().all()
    scene = walk(line(5, (0.1, 0, 0)))
    for bad in ({"base": -1.0}, {"base": math.nan}, {"base": 1.0, "width": 0.0}, {"base": 1.0, "still": 0.0}):
        with pytest.raises(ValueError, match="base must be >= 0, width and still > 0"):
            motion_prior(scene, **bad)
    assert motion_prior(scene.map(lambda x: x[:1]), 0.1).isnan()


def test_gradients_agree_with_finite_differences():
    generator = torch.Generator().manual_seed(0)
    position = 0.1 * torch.randn(6, 3, dtype=torch.float64, generator=generator)
    rotation = 0.1 * torch.randn(6, 3, dtype=torch.float64, generator=generator)

    def score(position, rotation, depth):
        scene = walk(position, rotation)
        scene = replace(scene, depth=scene.depth * depth)
        return motion_smoothness(scene, floor=0.02) + camera_motion_floor(scene, floor=1.0)

    inputs = [x.requires_grad_() for x in (position, rotation, torch.tensor(1.0, dtype=torch.float64))]
    assert torch.autograd.gradcheck(score, inputs)


@pytest.mark.parametrize("floor", [0.0, 0.06])
def test_gradients_are_finite_where_the_motion_vanishes(floor):
    for position, rotation in (
        (torch.zeros(6, 3), torch.zeros(6, 3)),
        (line(6, (0.1, 0, 0)), torch.zeros(6, 3)),
        (torch.zeros(6, 3), line(6, (0, 0.1, 0))),
    ):
        inputs = [position.clone().requires_grad_(), rotation.clone().requires_grad_()]
        scene = walk(*inputs)
        (motion_smoothness(scene, floor=floor) + camera_motion_floor(scene)).backward()
        assert all(x.grad.isfinite().all() for x in inputs)


def test_what_cannot_be_scored_is_nan_and_nothing_else_is_touched():
    scene = make_clips(range(3), size=(16, 16)).geometry
    broken = scene.c2w.clone()
    broken[1, 4, 0, 3] = torch.nan
    for reward in (motion_smoothness, camera_motion_floor):
        score = reward(replace(scene, c2w=broken))
        assert score.isnan().tolist() == [False, True, False]
        assert torch.equal(score[[0, 2]], reward(scene)[[0, 2]])
    blind = replace(scene, valid=torch.zeros_like(scene.valid))
    assert motion_smoothness(blind).isnan().all()
    assert not motion_smoothness(blind, floor=0.0).isnan().any()  # the paper's form needs no unit of length
    assert motion_smoothness(walk(line(2, (1, 0, 0)))).isnan()
    assert camera_motion_floor(walk(line(1, (1, 0, 0)))).isnan()


def test_bad_arguments_are_named():
    scene = walk(line(5, (1, 0, 0)))
    with pytest.raises(ValueError, match="floor must be >= 0"):
        motion_smoothness(scene, floor=-1.0)
    with pytest.raises(ValueError, match="floor must be > 0"):
        camera_motion_floor(scene, floor=0.0)
    with pytest.raises(ValueError, match="floor must be > 0, got -1"):
        camera_motion_floor(scene, floor=torch.tensor(-1.0))
    with pytest.raises(ValueError, match="stride must be >= 1"):
        camera_motion(scene, stride=0)
