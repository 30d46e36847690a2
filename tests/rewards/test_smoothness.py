"""Scene smoothness: closed forms, the world, invariances, gradients, and its NaNs."""

import itertools
from dataclasses import replace

import pytest
import torch

from geometry.cameras import rigid, so3_exp, unproject
from geometry.world import make_clips
from rewards import scene_smoothness
from tests.rewards.helpers import line, moved, scaled, walk

POSE = rigid(so3_exp(torch.tensor([0.4, -1.1, 0.3])), torch.tensor([2.0, -1.0, 5.0]))


def bent(scene, factors):
    depth = scene.depth * factors[..., None, None]
    return replace(scene, depth=depth, points=unproject(depth, scene.intrinsics, scene.c2w))


def drifting(velocity, size=16):
    """A wall before a still camera that moves sideways by `velocity [T]` (scene units a frame), and its flow."""
    scene = walk(torch.zeros(len(velocity), 3), size=size)
    flow = torch.zeros_like(scene.points)
    flow[..., 0] = velocity[:, None, None]
    return replace(scene, scene_flow=flow, flow_grid="frame")


def test_a_still_world_is_perfectly_smooth_and_a_step_costs_its_share():
    scene = walk(line(5, (0.02, 0, 0)), depth=2.0, size=16)
    assert scene_smoothness(scene) == pytest.approx(1.0, abs=1e-4)
    one = bent(scene, torch.tensor([1, 1, 0.97, 0.97, 0.97]))  # one step of 3 % in four pairs: 0.3 / 4 / 2
    assert scene_smoothness(one) == pytest.approx(1 - 0.3 / 4 / 2, abs=3e-3)
    gone = bent(scene, torch.tensor([1, 1, 0.5, 0.5, 0.5]))  # what now stands far before it hides it
    assert scene_smoothness(gone) == pytest.approx(1.0, abs=1e-4)
    nearer = bent(scene, torch.tensor([0.5, 0.5, 1, 1, 1]))  # what was near is plainly gone: all of it
    assert scene_smoothness(nearer) == pytest.approx(1 - 1 / 4 / 2, abs=3e-3)


def test_a_slow_drift_costs_less_than_a_flicker_of_the_same_size():
    scene = walk(line(9, (0.02, 0, 0)), depth=2.0, size=16)
    drift, flicker = torch.linspace(1, 1.08, 9), 1 + 0.08 * (torch.arange(9) % 2)
    assert 1 - scene_smoothness(bent(scene, drift)) < 0.2 * (1 - scene_smoothness(bent(scene, flicker)))


def test_flow_of_constant_velocity_is_smooth_and_a_reversal_is_not():
    steady = drifting(torch.full((6,), 0.1))
    assert scene_smoothness(steady).isnan()  # everything moves: no structure to be smooth
    steady.scene_flow[:, :8] = 0
    assert scene_smoothness(steady) == pytest.approx(1.0, abs=1e-4)
    back = drifting(0.1 * (-1.0) ** torch.arange(6))
    back.scene_flow[:, :8] = 0
    assert scene_smoothness(back) == pytest.approx(0.5, abs=1e-3)  # |v' - v| = |v| + |v'|
    faster = drifting(0.1 * 1.5 ** torch.arange(6))  # |v' - v| / (|v| + |v'|) = 0.5 / 2.5
    faster.scene_flow[:, :8] = 0
    assert scene_smoothness(faster) == pytest.approx(0.9, abs=5e-3)


def test_the_two_grids_of_flow_agree():
    """The same motion told from frame to frame, and as paths of frame 0's points."""
    velocity = torch.tensor([0.05, 0.06, 0.04, 0.07, 0.05])
    scene = drifting(velocity)
    scene.scene_flow[:, :8] = 0
    paths = torch.cat([torch.zeros(1), velocity[:-1].cumsum(0)])
    flow = torch.zeros_like(scene.scene_flow)
    flow[:, 8:, :, 0] = paths[:, None, None]
    first = replace(scene, scene_flow=flow, flow_grid="first")
    expected = [abs(b - a) / (a + b) for a, b in itertools.pairwise(velocity[:-1])]
    assert scene_smoothness(first) == pytest.approx(1 - float(sum(expected) / 3) / 2, abs=3e-3)
    assert scene_smoothness(scene) == pytest.approx(float(scene_smoothness(first)), abs=0.02)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_truth_is_smooth_and_noise_on_its_flow_is_not(dynamic):
    scene = make_clips(range(6000, 6008), size=(32, 32), dynamic=dynamic, supersample=1).geometry
    score = scene_smoothness(scene)
    assert (score > 0.85).all()
    noise = torch.randn(scene.depth.shape[:-2], generator=torch.Generator().manual_seed(0))[..., None, None, None]
    rough = scene_smoothness(replace(scene, scene_flow=scene.scene_flow * (1 + noise)))
    assert (rough < score).any() == dynamic
    if dynamic:
        assert (rough <= score).all()
        assert rough.mean() < score.mean() - 0.1


def test_noise_below_the_floor_is_forgiven():
    scene = drifting(torch.full((6,), 0.1))
    scene.scene_flow[:] = 0.02 * torch.randn(scene.scene_flow.shape, generator=torch.Generator().manual_seed(0))
    scene.scene_flow[:, :8] = 0
    assert scene_smoothness(scene, floor=0.2) > 0.85
    assert scene_smoothness(scene, floor=0.0) < 0.8


def test_invariances():
    scene = make_clips(range(20, 24), size=(24, 24), dynamic=True, supersample=1).geometry
    scene = bent(scene, 1 + 0.03 * torch.rand(4, 17, generator=torch.Generator().manual_seed(0)))
    score = scene_smoothness(scene)
    assert (score < 0.98).all()
    torch.testing.assert_close(scene_smoothness(moved(scene, POSE)), score, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(scene_smoothness(scaled(scene, 7.0)), score, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(scene_smoothness(scene.map(lambda x: x.unflatten(0, (2, 2)))), score.view(2, 2))
    torch.testing.assert_close(scene_smoothness(scene.map(lambda x: x[2])), score[2])


def test_gradients_agree_with_finite_differences():
    scene = make_clips([5], frames=4, size=(10, 10), motion="random", dynamic=True).geometry.map(
        lambda x: x[0].double() if x.is_floating_point() else x[0]
    )

    def score(bend, swell, slip):
        depth = scene.depth * bend[:, None, None]
        flow = scene.scene_flow * swell[:, None, None, None] + slip * scene.scene_flow.norm(dim=-1, keepdim=True)
        points = unproject(depth, scene.intrinsics, scene.c2w)
        return scene_smoothness(replace(scene, depth=depth, points=points, scene_flow=flow))

    given = [torch.linspace(0.98, 1.03, 4), torch.linspace(1.1, 0.8, 4), torch.tensor([0.1, -0.2, 0.1])]
    given = [x.double().requires_grad_() for x in given]
    assert torch.autograd.gradcheck(score, given, eps=1e-7, atol=1e-5)
    for gradient in torch.autograd.grad(score(*given), given):
        assert gradient.abs().max() > 1e-4


def test_what_cannot_be_scored_is_nan_and_nothing_else_is_touched():
    scene = make_clips(range(3), size=(16, 16), dynamic=True, supersample=1).geometry
    truth = scene_smoothness(scene)
    depth, valid = scene.depth.clone(), scene.valid.clone()
    depth[0, 3, 5, 5], valid[0, 3, 5, 5] = torch.inf, True
    valid[1] = False
    score = scene_smoothness(replace(scene, depth=depth, valid=valid))
    assert score.isnan().tolist() == [True, True, False]
    assert torch.equal(score[2], truth[2])
    assert scene_smoothness(scene.map(lambda x: x[:, :1])).isnan().all()
    assert scene_smoothness(walk(line(2, (0.02, 0, 0)), size=16)) == pytest.approx(1.0, abs=1e-4)


def test_bad_arguments_are_named():
    for bad in ({"floor": -1.0}, {"dynamic_threshold": -1.0}, {"min_overlap": 0.0}):
        with pytest.raises(ValueError, match="floor and dynamic_threshold must be >= 0 and 0 < min_overlap <= 1"):
            scene_smoothness(walk(line(3, (0.1, 0, 0))), **bad)
