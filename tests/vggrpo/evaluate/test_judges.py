"""Judges on the world, where it is known who is right: exact on exact matches, ordered by faults, silent when blind."""

import math

import numpy as np
import pytest
import torch

from geometry.cameras import inverse
from geometry.world import PERTURBATIONS, make_clip, make_clips
from vggrpo.evaluate.correspond import Matches, match, prepare
from vggrpo.evaluate.judges import judge, parallax, sampson, sampson_distance
from vggrpo.evaluate.motion import displacement, jitter


@pytest.fixture(scope="module")
def clip():
    return make_clip(70_000_001, motion="truck")


@pytest.fixture(scope="module")
def orbit():
    return make_clip(70_000_000, motion="orbit")


def exact(clip, i: int, j: int, count: int = 400) -> Matches:
    """Where points of frame i truly are in frame j: projected, not sought."""
    scene, rng = clip.geometry, np.random.default_rng(0)
    rows, columns = rng.integers(4, 60, count), rng.integers(4, 60, count)
    points = scene.points[i, rows, columns]
    seen = (points - scene.c2w[j, :3, 3]) @ scene.c2w[j, :3, :3]
    K = scene.intrinsics[j]
    there = seen[:, :2] / seen[:, 2:] * K.diagonal()[:2] + K[:2, 2]
    here = np.stack([columns + 0.5, rows + 0.5], axis=1)
    valid = scene.valid[i, rows, columns].numpy()
    return Matches(here[valid].astype(float), there.numpy()[valid].astype(float), 1.0, int(valid.sum()))


def fundamental(clip, i: int, j: int) -> np.ndarray:
    """From the true cameras: K^-T [t]x R K^-1."""
    scene = clip.geometry
    move = (inverse(scene.c2w[j]) @ scene.c2w[i]).double()
    t, K = move[:3, 3], scene.intrinsics[i].double()
    cross = torch.tensor([[0, -t[2], t[1]], [t[2], 0, -t[0]], [-t[1], t[0], 0]], dtype=torch.float64)
    return (torch.linalg.inv(K).T @ cross @ move[:3, :3] @ torch.linalg.inv(K)).numpy()


def test_true_matches_have_no_distance_to_the_true_cameras_and_moved_ones_as_much_as_they_moved(orbit):
    matches, F = exact(orbit, 0, 8), fundamental(orbit, 0, 8)
    assert sampson_distance(F, matches.here, matches.there).max() < 1e-2
    lines = np.hstack([matches.here, np.ones((len(matches.here), 1))]) @ F.T
    normal = lines[:, :2] / np.linalg.norm(lines[:, :2], axis=1, keepdims=True)
    off = sampson_distance(F, matches.here, matches.there + 0.4 * normal)
    # A distance to first order, shared between the two pictures: about 0.4 / sqrt(2).
    assert np.median(off) == pytest.approx(0.4 / math.sqrt(2), rel=0.1)


def test_true_matches_are_judged_consistent_and_scattered_ones_are_not(orbit):
    matches = exact(orbit, 0, 8)
    assert sampson(matches).value < 0.01
    noise = np.random.default_rng(1).normal(0, 1, matches.there.shape)
    scattered = matches._replace(there=matches.there + noise)
    assert 0.3 < sampson(scattered).value <= 2
    assert sampson(matches) == sampson(matches)  # seeded


def test_matches_that_a_matrix_was_fitted_to_are_not_asked_about_it():
    """Thirty matches of pure noise can be fitted (to 0.4 pixels, if they are asked); the other thirty do not agree."""
    told = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        here = rng.uniform(0, 64, (60, 2))
        told.append(sampson(Matches(here, here + rng.normal(0, 1, (60, 2)) + [2, 0], 1.0, 60)).value)
    assert np.mean(told) > 0.55


def test_a_camera_that_only_turns_has_no_parallax_and_no_verdict():
    matches = exact(make_clip(70_000_002, motion="pan"), 0, 4)
    assert parallax(matches).value < 0.05
    told = sampson(matches)
    assert math.isnan(told.value)
    assert "any epipolar geometry fits" in told.reason


@pytest.mark.parametrize("move", [(1.0, 0.0), (-0.6, 1.7)])
def test_flow_finds_what_was_shifted(move):
    rng = torch.Generator().manual_seed(0)
    big = torch.nn.functional.interpolate(torch.rand(1, 3, 24, 24, generator=rng), size=(96, 96), mode="bicubic")
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")

    def seen(u, v):
        at = torch.stack([columns + 16.5 - u, rows + 16.5 - v], -1)[None] / 48 - 1
        cut = torch.nn.functional.grid_sample(big, at, mode="bilinear", align_corners=False)
        return prepare((255 * cut[0].clamp(0, 1)).byte().movedim(0, -1).numpy())

    matches = match(seen(0, 0), seen(*move))
    assert len(matches.here) > 0.5 * matches.sought > 300
    assert np.median(np.linalg.norm(matches.there - matches.here - np.array(move), axis=1)) < 0.1
    assert displacement(matches).value == pytest.approx(np.hypot(*move), abs=0.1)


def test_a_flat_picture_has_nothing_to_match():
    flat = prepare(np.full((64, 64, 3), 128, np.uint8))
    matches = match(flat, flat)
    assert len(matches.here) == 0
    assert "0 matches" in displacement(matches).reason
    assert math.isnan(jitter([matches] * 4).value)


def versions(clip, fault, magnitudes):
    return [judge(clip.video), *(judge(PERTURBATIONS[fault].apply(clip, m, 0).video) for m in magnitudes)]


def test_bent_pictures_are_told_at_every_magnitude(orbit):
    told = versions(orbit, "local_warp", [0.5, 1.0])
    for name in ("sampson/stride_1", "sampson/stride_4"):
        values = [verdict[name].value for verdict in told]
        assert values == sorted(values)
        assert values[2] > 2 * values[0]


def test_a_shaken_camera_is_jittery_and_geometrically_sound(clip):
    told = versions(clip, "pose_jitter", [0.3, 0.8])
    values = [verdict["jitter"].value for verdict in told]
    assert values == sorted(values)
    assert values[2] > 2 * values[0]
    assert told[2]["sampson/stride_4"].value < 2 * told[0]["sampson/stride_4"].value


def test_travel_does_not_count_what_leads_nowhere():
    """A judge of motion that counted shake would take its absence for a freeze; `displacement`, the control, does."""
    steady, swaying = ([judge(v) for v in make_clips(range(3), motion="pan", sway=a).video] for a in (0.0, 2.0))
    for before, after in zip(steady, swaying, strict=True):
        assert after["travel"].value == pytest.approx(before["travel"].value, rel=0.1)
        assert after["displacement"].value > 1.2 * before["displacement"].value
    told = [judge(make_clips([5], motion="orbit", sway=amount).video[0]) for amount in (0.0, 2.0)]
    assert told[1]["displacement"].value > 2 * told[0]["displacement"].value
    assert told[1]["travel"].value < 1.3 * told[0]["travel"].value


def test_stillness_wins_nothing(clip):
    frozen = judge(PERTURBATIONS["frozen"].apply(clip, 1.0, 0).video)
    assert all(math.isnan(value.value) and value.reason for name, value in frozen.items() if name.startswith("sampson"))
    assert frozen["displacement"].value == frozen["travel"].value == 0
    assert "nothing moves" in frozen["jitter"].reason


def test_blur_is_seen_as_blur_and_not_as_consistency(orbit):
    sharp, blurred = versions(orbit, "blur", [4.0])
    assert blurred["sharpness"].value < 0.5 * sharp["sharpness"].value
    assert not blurred["sampson/stride_4"].value < sharp["sampson/stride_4"].value


def test_a_video_of_one_frame_is_refused():
    with pytest.raises(ValueError, match="the video has 1: give at least 2"):
        judge(torch.rand(1, 3, 64, 64))
