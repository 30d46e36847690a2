"""Each fault does what it says, grows with its magnitude, and at magnitude 0 does nothing."""

import pytest
import torch

from geometry.types import check_geometry
from geometry.world import PERTURBATIONS, make_clip, make_clips
from geometry.world.perturb import (
    blur,
    frozen,
    pose_jitter,
    shuffled_frames,
    sliding_object,
    time_reversal,
)
from geometry.world.trajectory import SHAKE_UNITS

GEOMETRIC = {"depth_flicker"}


@pytest.fixture(scope="module")
def clips():
    return make_clips(range(50, 54), size=(32, 32), motion="truck", dynamic=True, supersample=1)


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_magnitude_zero_changes_nothing_and_more_changes_more(clips, name):
    fault = PERTURBATIONS[name]
    same = fault.apply(clips, 0.0, 3)
    assert torch.equal(same.video, clips.video)
    torch.testing.assert_close(same.geometry.points, clips.geometry.points, rtol=1e-5, atol=1e-5)
    changed = []
    for magnitude in (fault.magnitudes[0], fault.magnitudes[-1]):
        wrong = fault.apply(clips, magnitude, 3)
        check_geometry(wrong.geometry)
        a, b = (wrong.geometry.depth, clips.geometry.depth) if name in GEOMETRIC else (wrong.video, clips.video)
        changed.append((a - b).abs().mean().item())
    assert 0 < changed[0] < changed[1]


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_one_clip_and_a_batch_of_one_are_perturbed_alike(name):
    one, batch = make_clip(50, size=(24, 24), frames=5), make_clips([50], size=(24, 24), frames=5)
    fault = PERTURBATIONS[name]
    alone, inside = (fault.apply(clip, fault.magnitudes[2], 1) for clip in (one, batch))
    assert torch.equal(alone.video, inside.video[0])
    assert torch.equal(alone.geometry.depth, inside.geometry.depth[0])


def test_frozen_frames_are_the_same_frame(clips):
    half = frozen(clips, 0.5)
    assert torch.equal(half.video[:, :9], clips.video[:, :9])
    assert (half.video[:, 8:] == half.video[:, 8:9]).all()
    assert (half.geometry.scene_flow[:, 8:] == 0).all()
    assert (frozen(clips, 1.0).geometry.c2w == torch.eye(4)).all()


def test_reversed_clips_are_seen_from_their_new_first_frame(clips):
    back = time_reversal(clips, 1.0)
    assert torch.equal(back.video, clips.video.flip(1))
    assert torch.equal(back.geometry.c2w[:, 0], torch.eye(4).expand(4, 4, 4))
    twice = time_reversal(back, 1.0)
    torch.testing.assert_close(twice.geometry.points, clips.geometry.points, rtol=1e-4, atol=1e-4)
    moving = clips.geometry.scene_flow.norm(dim=-1) > 0
    assert torch.equal(back.geometry.scene_flow.norm(dim=-1) > 0, moving.flip(1))


def test_shuffled_frames_keep_every_frame(clips):
    mixed = shuffled_frames(clips, 1.0, seed=1)
    for a, b in zip(mixed.video, clips.video, strict=True):
        distance = (a[:, None] - b[None]).abs().amax((2, 3, 4))
        assert (distance.amin(1) == 0).all()
        assert (distance.amin(0) == 0).all()
        assert (distance.diagonal() > 0).float().mean() > 0.9


def test_pose_jitter_has_the_stated_size_and_keeps_the_world_solid():
    clips = make_clips(range(64), size=(8, 8), motion="static", supersample=1)
    shaky = pose_jitter(clips, 1.5, seed=0).geometry.c2w[:, 1:]
    angle = torch.rad2deg(torch.acos(((shaky[..., :3, :3].diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2).clamp(-1, 1)))
    assert angle.square().mean().sqrt() == pytest.approx(1.5 * 3**0.5, rel=0.05)
    assert shaky[..., :3, 3].std() == pytest.approx(1.5 * SHAKE_UNITS, rel=0.05)


def test_a_sliding_object_is_not_in_the_flow():
    clips = make_clips(range(50, 54), size=(32, 32), motion="static", supersample=1)
    slid = sliding_object(clips, 0.5)
    assert (slid.geometry.scene_flow == 0).all()
    assert ((slid.geometry.depth - clips.geometry.depth).abs().flatten(1).amax(1) > 0.05).all()


def test_blur_keeps_brightness_and_geometry(clips):
    soft = blur(clips, 2.0)
    assert soft.geometry is clips.geometry
    assert soft.video.mean() == pytest.approx(clips.video.mean().item(), abs=0.01)
    edges = [(v[..., 1:] - v[..., :-1]).abs().mean() for v in (soft.video, clips.video)]
    assert edges[0] < 0.6 * edges[1]


def test_what_slides_is_a_body_that_rests(clips):
    slid = sliding_object(clips, 0.5)
    moved = (slid.shot.pose != clips.shot.pose).flatten(3).any(-1).any(1)
    assert (moved.sum(1) == 1).all()
    assert (clips.shot.motion[moved[:, None].expand(-1, 17, -1)] == 0).all()
    assert (clips.shot.motion != 0).any()
