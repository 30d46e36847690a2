"""Every reward falls with the faults that it is there to see, and no shipped set likes stillness."""

import pytest
import torch
from scipy.stats import spearmanr

from geometry.world import PERTURBATIONS, make_clips
from geometry.world.perturb import frozen
from rewards import DEFAULT, PAPER, REWARDS, camera_motion

SEEDS = range(31_000, 31_016)
SEES = {
    "motion_smoothness": ["pose_jitter"],
    "reprojection_consistency": ["depth_flicker", "local_warp", "slow_drift", "sliding_object"],
}


@pytest.fixture(scope="module")
def clips():
    return make_clips(SEEDS, size=(40, 40), motion="random", supersample=1)


def scores(clips, name, reward):
    """`[5 B]`: the score at each magnitude."""
    fault = PERTURBATIONS[name]
    return torch.stack([reward(fault.apply(clips, m, 1).geometry) for m in fault.magnitudes])


@pytest.mark.parametrize(("reward", "fault"), [(r, f) for r, faults in SEES.items() for f in faults])
def test_the_score_falls_with_the_magnitude(clips, reward, fault):
    truth, score = REWARDS[reward](clips.geometry), scores(clips, fault, REWARDS[reward])
    rank = [spearmanr(range(5), -score[:, i]).statistic for i in range(len(clips))]
    print(reward, fault, "seeds", SEEDS, "mean Spearman", sum(rank) / len(rank))
    assert sum(rank) / len(rank) > 0.95
    assert (score[-1] < truth).all()


def test_a_shuffled_label_breaks_the_correlation(clips):
    """The control of the test above: the same scores against magnitudes in the wrong order."""
    score = scores(clips, "depth_flicker", REWARDS["reprojection_consistency"])
    rank = [spearmanr([3, 0, 4, 1, 2], -score[:, i]).statistic for i in range(len(clips))]
    assert sum(rank) / len(rank) < 0.5


def test_shuffled_frames_are_rough_and_reversed_ones_are_not(clips):
    smooth = REWARDS["motion_smoothness"]
    score = scores(clips, "shuffled_frames", smooth).mean(1)
    assert spearmanr(range(5), -score).statistic > 0.95
    backwards = PERTURBATIONS["time_reversal"].apply(clips, 1.0, 0)
    torch.testing.assert_close(smooth(backwards.geometry), smooth(clips.geometry), rtol=1e-3, atol=1e-3)


def test_the_motion_floor_falls_with_the_frozen_share():
    clips = make_clips(SEEDS, size=(16, 16), motion="truck", supersample=1)
    motion = scores(clips, "frozen", camera_motion)
    assert (motion.diff(dim=0) < 0).all()
    hinge = scores(clips, "frozen", REWARDS["camera_motion_floor"])
    assert (hinge.diff(dim=0) <= 0).all()
    assert (hinge[0] == 0).all()
    assert (hinge[-1] == -1).all()


@pytest.mark.parametrize("fault", ["blur", "identity_change"])
def test_geometry_rewards_are_blind_to_appearance(clips, fault):
    wrong = PERTURBATIONS[fault].apply(clips, PERTURBATIONS[fault].magnitudes[-1], 0)
    assert (wrong.video - clips.video).abs().mean() > 0.005
    for reward in REWARDS.values():
        torch.testing.assert_close(reward(wrong.geometry), reward(clips.geometry))


def advantage(weights, *videos):
    """The paper's: each reward z-scored within the group of videos, then the weighted mean. `[len(videos) B]`."""
    total = torch.zeros(len(videos), len(videos[0].c2w))
    for name, weight in weights.items():
        score = torch.stack([REWARDS[name](scene) for scene in videos])
        total += weight * (score - score.mean(0)) / (score.std(0, unbiased=False) + 1e-6)
    return total / sum(weights.values())


@pytest.fixture(scope="module")
def moving():
    fresh = make_clips(range(32_000, 32_048), size=(32, 32), supersample=1)
    keep = [i for i, motion in enumerate(fresh.command.motion) if motion != "static"][:32]
    assert len(keep) == 32
    still = frozen(fresh, 1.0)
    return fresh.geometry.map(lambda x: x[keep]), still.geometry.map(lambda x: x[keep])


def test_freeze_gate_the_default_set_ranks_the_truth_above_stillness(moving):
    truth, still = advantage(DEFAULT, *moving)
    assert (still < truth).all()
    plain = [sum(w * REWARDS[name](scene) for name, w in DEFAULT.items()) for scene in moving]
    assert (plain[1] < plain[0]).all()  # and without the z-score, as a plain weighted sum


def test_freeze_gate_the_papers_two_rewards_do_not_pass(moving):
    truth, still = advantage(PAPER, *moving)
    assert (still > truth).all()


def test_freeze_gate_holds_in_a_larger_group(moving):
    """The truth, two shaken versions and a frozen one: the frozen one is the worst of the four."""
    shaken = [make_clips(range(32_000, 32_048), size=(32, 32), supersample=1, jitter=j) for j in (0.2, 0.8)]
    keep = [i for i, motion in enumerate(shaken[0].command.motion) if motion != "static"][:32]
    group = [moving[0], *(clip.geometry.map(lambda x: x[keep]) for clip in shaken), moving[1]]
    ranks = advantage(DEFAULT, *group)
    assert (ranks[-1] < ranks[:-1].amin(0)).float().mean() > 0.9
    assert (ranks[-1] < ranks[0]).all()
