"""Reprojection consistency: the truth, the slow reference, closed forms, invariances, gradients, and its NaNs."""

from dataclasses import replace

import pytest
import torch

from geometry.cameras import rigid, so3_exp, unproject
from geometry.world import make_clips
from rewards import reprojection_consistency, reprojection_errors
from tests.rewards import reference
from tests.rewards.helpers import backwards, line, moved, scaled, walk

POSE = rigid(so3_exp(torch.tensor([0.4, -1.1, 0.3])), torch.tensor([2.0, -1.0, 5.0]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_truth_is_within_half_a_percent_of_perfect(dynamic):
    score = reprojection_consistency(make_clips(range(6000, 6032), dynamic=dynamic).geometry)
    assert not score.isnan().any()
    assert score.max() <= 0
    assert score.min() > -0.005


def test_dynamic_bodies_that_no_flow_declares_are_seen():
    scene = make_clips(range(6000, 6016), dynamic=True).geometry
    silent = replace(scene, scene_flow=torch.zeros_like(scene.scene_flow))
    assert reprojection_consistency(silent).mean() < -0.02 < 5 * reprojection_consistency(scene).mean()


def test_a_wall_that_is_off_in_one_frame_is_off_by_that_much():
    """Frame 3 sees the wall 10 % too near: it is off by 0.1 median depths for the others, and they for it."""
    scene = walk(line(7, (0.02, 0, 0)), depth=2.0, size=16)
    depth = scene.depth.clone()
    depth[3] *= 0.9
    wrong = replace(scene, depth=depth, points=unproject(depth, scene.intrinsics, scene.c2w))
    errors = reprojection_errors(wrong, occlusion=0.5)
    assert errors[3] == pytest.approx(0.1, rel=1e-3)
    assert errors[[0, 1, 2, 4, 5, 6]].tolist() == pytest.approx([0.1] * 6, abs=0.02)  # its wall stands before theirs
    assert reprojection_errors(scene).max() < 1e-5
    absolute = reprojection_errors(wrong, scale="absolute", exclude_self=False)
    assert absolute[0] == pytest.approx(0.2, abs=0.04)
    assert absolute[3] == 0  # the paper's form: what is behind a view's own points cannot be seen from it


def test_points_behind_what_a_view_sees_are_hidden_not_wrong():
    """A near half-wall in frame 0 only: to the others it is in front (an error), to it the rest is behind (none)."""
    scene = walk(line(5, (0.001, 0, 0)), depth=2.0, size=16)
    depth = scene.depth.clone()
    depth[0, :, :8] = 1.0
    wrong = replace(scene, depth=depth, points=unproject(depth, scene.intrinsics, scene.c2w))
    errors = reprojection_errors(wrong)
    assert errors[0] < 1e-3
    assert errors[1:].min() > 0.2


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("scale", "exclude_self"), [("relative", True), ("absolute", False)])
def test_agrees_with_the_slow_reference(dynamic, scale, exclude_self):
    scene = make_clips([71, 72], frames=5, size=(16, 20), dynamic=dynamic).geometry
    bent = 1 + 0.05 * torch.randn(2, 5, 1, 1, generator=torch.Generator().manual_seed(0))
    depth = scene.depth * bent
    scene = replace(scene, depth=depth, points=unproject(depth, scene.intrinsics, scene.c2w))
    fast = reprojection_consistency(scene, scale=scale, exclude_self=exclude_self)
    for i in range(2):
        slow = reference.reprojection_consistency(scene.map(lambda x, i=i: x[i]), scale == "relative", exclude_self)
        assert fast[i] == pytest.approx(slow, rel=0.02, abs=1e-4)
        assert slow < -0.01


def test_invariances():
    scene = make_clips(range(20, 26), size=(32, 32)).geometry
    depth = scene.depth * (1 + 0.05 * torch.rand(6, 17, 1, 1, generator=torch.Generator().manual_seed(0)))
    scene = replace(scene, depth=depth, points=unproject(depth, scene.intrinsics, scene.c2w))
    score = reprojection_consistency(scene)
    torch.testing.assert_close(reprojection_consistency(moved(scene, POSE)), score, rtol=0.02, atol=1e-4)
    torch.testing.assert_close(reprojection_consistency(scaled(scene, 7.0)), score, rtol=0.02, atol=1e-4)
    torch.testing.assert_close(reprojection_consistency(backwards(scene)), score, rtol=0.02, atol=1e-4)
    two = scene.map(lambda x: x.reshape(2, 3, *x.shape[1:]))
    assert torch.equal(reprojection_consistency(two), score.reshape(2, 3))
    assert torch.equal(reprojection_consistency(scene.map(lambda x: x[4])), score[4])
    paper = {"scale": "absolute", "exclude_self": False}
    shrunk = reprojection_consistency(scaled(scene, 0.1), **paper)
    assert (
        shrunk > 0.2 * reprojection_consistency(scene, **paper)
    ).all()  # the control: the paper's is won by shrinking


def test_gradients_agree_with_finite_differences():
    scene = make_clips([5], frames=3, size=(10, 10), motion="random").geometry.map(
        lambda x: x[0].double() if x.is_floating_point() else x[0]
    )
    bend = torch.linspace(0.98, 1.03, 3, dtype=torch.float64)[:, None, None]

    def score(depth, c2w):
        points = unproject(depth, scene.intrinsics, c2w)
        return reprojection_consistency(replace(scene, depth=depth, points=points, c2w=c2w))

    c2w = scene.c2w.clone()
    twist = torch.zeros(3, 6, dtype=torch.float64, requires_grad=True)

    def moved_score(twist):
        return score(scene.depth * bend, c2w @ rigid(so3_exp(twist[:, :3]), twist[:, 3:]))

    depth = (scene.depth * bend).requires_grad_()
    assert torch.autograd.gradcheck(lambda depth: score(depth, c2w), [depth], eps=1e-7, atol=1e-5)
    assert torch.autograd.gradcheck(moved_score, [twist], eps=1e-7, atol=1e-5)
    (gradient,) = torch.autograd.grad(score(depth, c2w), depth)
    assert gradient.abs().max() > 1e-4


def test_following_the_gradient_of_a_wrong_scale_mends_it():
    scene = make_clips([9], size=(24, 24), frames=6).geometry
    wrong = torch.linspace(-0.05, 0.05, 6)
    log_scale = wrong.clone().requires_grad_()
    optimizer = torch.optim.Adam([log_scale], lr=0.005)
    before = None
    for _ in range(40):
        depth = scene.depth * log_scale.exp()[:, None, None]
        points = unproject(depth, scene.intrinsics, scene.c2w)
        score = reprojection_consistency(replace(scene, depth=depth, points=points), worst=6).sum()
        before = score.item() if before is None else before
        optimizer.zero_grad()
        (-score).backward()
        optimizer.step()
    assert score.item() > 0.4 * before  # both negative
    assert log_scale.std() < 0.6 * wrong.std()


def test_what_cannot_be_scored_is_nan_and_nothing_else_is_touched():
    scene = make_clips(range(4), size=(24, 24), dynamic=True).geometry
    truth = reprojection_consistency(scene)
    depth, flow, valid = scene.depth.clone(), scene.scene_flow.clone(), scene.valid.clone()
    depth[0, 3, 5, 5] = torch.inf
    valid[0, 3, 5, 5] = True
    flow[1] = 1.0
    valid[2] = False
    score = reprojection_consistency(replace(scene, depth=depth, scene_flow=flow, valid=valid))
    assert score.isnan().tolist() == [True, True, True, False]
    assert torch.equal(score[3], truth[3])
    assert reprojection_consistency(scene.map(lambda x: x[:, :1])).isnan().all()
    hole = replace(scene, depth=depth, valid=valid & depth.isfinite())
    assert not reprojection_consistency(hole)[0].isnan()  # not finite where nothing was seen: nobody looks there
    poses = scene.c2w.clone()
    poses[3, 2] = torch.nan
    assert reprojection_consistency(replace(scene, c2w=poses)).isnan().tolist() == [False, False, False, True]


def test_a_view_with_too_little_overlap_does_not_count():
    away = torch.zeros(5, 3)
    away[4, 1] = 3.1  # frame 4 looks the other way
    scene = walk(line(5, (0.02, 0, 0)), away, size=16)
    errors = reprojection_errors(scene)
    assert errors.isnan().tolist() == [False, False, False, False, True]
    assert reprojection_consistency(scene) > -1e-4
    everywhere = torch.tensor([[0, 0, 0], [0, 1.5, 0], [0, 3.0, 0], [1.5, 0, 0], [-1.5, 0, 0.0]])
    assert reprojection_consistency(walk(torch.zeros(5, 3), everywhere, size=16)).isnan()


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"scale": "metric"}, "scale must be"),
        ({"worst": 0}, "worst must be >= 1"),
        ({"occlusion": 0.0}, "occlusion > 0"),
        ({"min_overlap": 0.0}, "min_overlap"),
        ({"dynamic_threshold": -1.0}, "dynamic_threshold"),
    ],
)
def test_bad_arguments_are_named(bad, named, as_users_run):
    with pytest.raises(ValueError, match=named):
        reprojection_consistency(walk(line(5, (1, 0, 0))), **bad)
