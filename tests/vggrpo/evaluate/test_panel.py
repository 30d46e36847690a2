"""Judges of the path, of one world for all frames, of what stays itself and of the verb: each against a known truth."""

import math

import numpy as np
import pytest
import torch

from geometry.cameras import so3_exp
from geometry.world import PERTURBATIONS, make_clip
from vggrpo.bootstrap.captions import draw_captions
from vggrpo.evaluate.correspond import match, prepare
from vggrpo.evaluate.judges import judge, open_video
from vggrpo.evaluate.panel import BY_REFEREE, ask, load_panel
from vggrpo.evaluate.path import path_jerk
from vggrpo.evaluate.referee import load_judge, read_command, referee_says, reprojection
from vggrpo.evaluate.sfm import NAMES, sfm
from vggrpo.evaluate.survival import survival


@pytest.fixture(scope="module")
def truck():
    return make_clip(70_000_001, motion="truck")


@pytest.fixture(scope="module")
def large():
    """Finely textured, so that SIFT has something to hold on to."""
    return make_clip(70_000_000, motion="orbit", size=(256, 256), frames=9, texture_scale=0.25, supersample=1)


def uint8(video):
    return open_video(video).frames


def fov_of(clip) -> float:
    return 2 * math.degrees(math.atan(clip.video.shape[-1] / 2 / float(clip.geometry.intrinsics[0, 0, 0])))


def test_a_steady_path_has_no_jerk_a_shaken_one_has_and_the_unit_does_not_count(truck):
    steady = path_jerk(truck.geometry.c2w, 1.0).value
    assert steady < 1e-4
    told = [
        path_jerk(PERTURBATIONS["pose_jitter"].apply(truck, much, 0).geometry.c2w, 1.0).value for much in (0.1, 0.4)
    ]
    assert steady < 0.1 < told[0] < told[1]
    larger = PERTURBATIONS["pose_jitter"].apply(truck, 0.4, 0).geometry.c2w.clone()
    larger[:, :3, 3] *= 7
    assert path_jerk(larger, 7.0).value == pytest.approx(told[1], rel=1e-4)


def test_jerk_is_the_third_derivative():
    """Position t^3: its third difference is 6 everywhere."""
    t = torch.arange(8, dtype=torch.float64)
    c2w = torch.eye(4, dtype=torch.float64).repeat(8, 1, 1)
    c2w[:, 2, 3] = t**3
    assert path_jerk(c2w, 1.0).value == pytest.approx(6 / float((t**3).diff().mean()))
    turning = torch.eye(4, dtype=torch.float64).repeat(8, 1, 1)
    turning[:, :3, :3] = so3_exp(torch.stack([0 * t, 0.002 * t**3, 0 * t], -1))
    assert path_jerk(turning, 1.0).value == pytest.approx(6 / float((t**3).diff().mean()), rel=1e-4)


def test_a_camera_that_stands_has_no_jerk_to_speak_of():
    still = path_jerk(torch.eye(4).repeat(9, 1, 1), 1.0)
    assert math.isnan(still.value)
    assert still.reason == "the camera stands still"


def test_exact_depth_is_one_world_and_wrong_depth_is_not(truck):
    exact = reprojection(truck.geometry).value
    assert exact < 0.01
    told = [reprojection(PERTURBATIONS["depth_flicker"].apply(truck, much, 0).geometry).value for much in (0.02, 0.08)]
    assert 2 * exact < told[0] < told[1]


def test_a_frozen_video_agrees_with_itself_and_is_not_praised_for_it(truck):
    told = reprojection(PERTURBATIONS["frozen"].apply(truck, 1.0, 0).geometry)
    assert math.isnan(told.value)
    assert "hardly travels" in told.reason


def test_the_command_in_every_caption_of_the_world_is_read():
    for caption in draw_captions(range(60)):
        assert read_command(caption.text) == (caption.facts["camera"], int(caption.facts["direction"]))
    for other in ("A dog runs along a beach.", "", "The camera pans.", "The camera pans leftish slowly."):
        assert read_command(other) is None


def test_a_verb_is_right_for_its_prompt_wrong_for_another_and_not_judged_for_a_foreign_one(truck):
    def knows(video):
        return truck.geometry.map(lambda x: x[None])

    def says(prompt):
        told = referee_says(truck.video, knows, prompt)
        return told["verb"].value, told["side"].value

    side = "right" if truck.command.relative_pose[0, 0] > 0 else "left"
    other = {"left": "right", "right": "left"}[side]
    assert says(truck.caption) == says(f"The camera trucks {side} slowly on a red ground.") == (1, 1)
    assert says(f"The camera trucks {other} slowly on a red ground.") == (1, 0)
    assert says("The camera pans left slowly on a red ground.") == (0, 0)
    for prompt, reason in ((None, "no prompt"), ("A dog runs.", "no camera verb of the world's grammar")):
        told = referee_says(truck.video, knows, prompt)
        assert math.isnan(told["verb"].value)
        assert math.isnan(told["side"].value)
        assert reason in told["side"].reason


def test_the_shipped_referee_reads_the_verb_and_sees_shake(truck):
    referee = load_judge("assets/tiny-referee")
    steady, shaky = (
        referee_says(video[::2], referee, truck.caption)
        for video in (truck.video, PERTURBATIONS["pose_jitter"].apply(truck, 0.4, 0).video)
    )
    assert steady["side"].value == 1
    assert shaky["referee/path_jerk"].value > 3 * steady["referee/path_jerk"].value


def test_structure_from_motion_finds_the_focal_length_and_a_wobble_spoils_it(large):
    truth = sfm(uint8(large.video), fov_of(large))
    assert truth["sfm/registered"].value == 1
    assert truth["sfm/focal_deviation"].value < 0.1
    assert truth["sfm/track_length"].value > 3
    assert truth == sfm(uint8(large.video), fov_of(large))  # seeded
    wobbling = sfm(uint8(PERTURBATIONS["local_warp"].apply(large, 3.0, 0).video), fov_of(large))
    assert not wobbling["sfm/reprojection"].value < 1.5 * truth["sfm/reprojection"].value
    small = uint8(torch.nn.functional.interpolate(large.video, (128, 128), mode="bilinear", antialias=True))
    enlarged = sfm(small, fov_of(large), enlarge=True)
    assert enlarged["sfm/registered"].value == 1
    assert enlarged["sfm/focal_deviation"].value < 0.1  # relative, and in the video's own field of view
    unasked = sfm(uint8(large.video))
    assert unasked["sfm/focal_deviation"].reason == "no field of view is expected"


def test_what_cannot_be_reconstructed_has_reasons_and_no_numbers(truck, large):
    small = sfm(uint8(truck.video), 60.0)
    assert all(math.isnan(v.value) and "64 x 64" in v.reason for v in small.values())
    still = sfm([uint8(large.video)[0]] * 5, 60.0)
    assert still["sfm/registered"].value == 0
    assert all(math.isnan(still[f"sfm/{name}"].value) for name in NAMES if name != "registered")
    assert still["sfm/path_jerk"].reason


def test_corners_survive_in_a_solid_world_and_not_when_the_picture_wobbles_or_changes(truck):
    def kept(clip):
        return survival(open_video(clip.video).ready).value

    truth = kept(truck)
    assert truth > 0.5
    assert kept(PERTURBATIONS["local_warp"].apply(truck, 2.0, 0)) < 0.5 * truth
    assert kept(PERTURBATIONS["identity_change"].apply(truck, 1.0, 0)) < truth - 0.05
    assert kept(PERTURBATIONS["frozen"].apply(truck, 1.0, 0)) == 1
    flat = survival([prepare(np.full((64, 64, 3), 128, np.uint8))] * 3)
    assert flat.reason == "0 corners, fewer than 20"


def test_large_frames_are_matched_by_sift_and_its_matches_are_true(large):
    ready = open_video(large.video).ready
    found = match(ready[0], ready[3])
    assert found.method == "sift"
    assert len(found.here) >= 60
    pixels = torch.from_numpy(found.here).float()
    truth = large.track(pixels).pixels[3].numpy()
    off = np.linalg.norm(found.there - truth, axis=1)
    assert np.median(off) < 1
    wrong = np.linalg.norm(found.there[::-1] - truth, axis=1)
    assert np.median(wrong) > 20  # the control
    small = open_video(torch.nn.functional.interpolate(large.video, (64, 64))).ready
    assert match(small[0], small[3]).method == "flow"


def test_sift_judges_too_are_ordered_by_faults(large):
    told = [judge(clip.video) for clip in (large, PERTURBATIONS["local_warp"].apply(large, 3.0, 0))]
    for name in ("sampson/stride_1", "sampson/stride_2"):
        assert told[1][name].value > 1.5 * told[0][name].value
    assert told[1]["inliers/stride_2"].value < told[0]["inliers/stride_2"].value


def test_a_panel_without_a_referee_says_so(truck):
    told = ask(load_panel(None, None, sfm="never"), truck.video[:5])
    assert all(told[name].reason == "no referee was named" for name in BY_REFEREE)
    assert not any(name.startswith("sfm/") for name in told)
    with pytest.raises(ValueError, match="fov must be between 0 and 180 degrees, got 190"):
        load_panel(None, 190.0)
    with pytest.raises(ValueError, match=r"nowhere"):
        load_panel("nowhere", None)
