"""Every reward falls with the faults that it is there to see, and no shipped set likes stillness."""

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from scipy.stats import spearmanr

from geometry.world import PERTURBATIONS, make_clips
from geometry.world.perturb import frozen
from rewards import DEFAULT, PAPER, REWARDS, camera_following, camera_motion, epipolar, motion_prior
from tests.rewards.test_epipolar import matches_of
from vggrpo.grpo import group_advantage

SEEDS = range(31_000, 31_016)
SEES = {
    "motion_smoothness": ["pose_jitter"],
    "reprojection_consistency": ["depth_flicker", "local_warp", "slow_drift", "sliding_object"],
    "scene_smoothness": ["depth_flicker", "local_warp"],
    "camera_following": ["pose_jitter", "frozen"],
    "motion_prior": ["frozen"],
    "epipolar": ["pose_jitter"],
}
TOLD = {
    "camera_following": lambda clips: partial(camera_following, commanded=clips.geometry.c2w),
    "motion_prior": lambda clips: partial(motion_prior, base=camera_motion(clips.geometry, stride=8)),
    "epipolar": lambda clips: partial(epipolar, matches=matches_of(clips)),
}
"""Rewards that are told something beside the geometry, told the truth of these clips."""


@pytest.fixture(scope="module")
def clips():
    return make_clips(SEEDS, size=(40, 40), motion="random", supersample=1)


@pytest.fixture(scope="module")
def spoilt(clips):
    """Geometries at each magnitude of a fault, by its name."""
    return cache(lambda name: versions(clips, name))


def versions(clips, name):
    fault = PERTURBATIONS[name]
    return [fault.apply(clips, magnitude, 1).geometry for magnitude in fault.magnitudes]


def scores(scenes, reward):
    """`[5 B]`: the score at each magnitude."""
    return torch.stack([reward(scene) for scene in scenes])


@pytest.mark.parametrize(("reward", "fault"), [(r, f) for r, faults in SEES.items() for f in faults])
def test_the_score_falls_with_the_magnitude(clips, spoilt, reward, fault):
    fn = TOLD[reward](clips) if reward in TOLD else REWARDS[reward]
    truth, score = fn(clips.geometry), scores(spoilt(fault), fn)
    rank = [spearmanr(range(5), -score[:, i]).statistic for i in range(len(clips))]
    print(reward, fault, "seeds", SEEDS, "mean Spearman", sum(rank) / len(rank))
    assert sum(rank) / len(rank) > 0.95
    assert (score[-1] < truth).all()


def test_a_shuffled_label_breaks_the_correlation(clips, spoilt):
    """The control of the test above: the same scores against magnitudes in the wrong order."""
    score = scores(spoilt("depth_flicker"), REWARDS["reprojection_consistency"])
    rank = [spearmanr([3, 0, 4, 1, 2], -score[:, i]).statistic for i in range(len(clips))]
    assert sum(rank) / len(rank) < 0.5


def test_shuffled_frames_are_rough_and_reversed_ones_are_not(clips, spoilt):
    smooth = REWARDS["motion_smoothness"]
    score = scores(spoilt("shuffled_frames"), smooth).mean(1)
    assert spearmanr(range(5), -score).statistic > 0.95
    backwards = PERTURBATIONS["time_reversal"].apply(clips, 1.0, 0)
    torch.testing.assert_close(smooth(backwards.geometry), smooth(clips.geometry), rtol=1e-3, atol=1e-3)


def test_the_motion_floor_falls_with_the_frozen_share():
    clips = make_clips(SEEDS, size=(16, 16), motion="truck", supersample=1)
    scenes = versions(clips, "frozen")
    motion = scores(scenes, camera_motion)
    assert (motion.diff(dim=0) < 0).all()
    hinge = scores(scenes, REWARDS["camera_motion_floor"])
    assert (hinge.diff(dim=0) <= 0).all()
    assert (hinge[0] == 0).all()
    assert (hinge[-1] == -1).all()


@pytest.mark.parametrize("fault", ["blur", "identity_change"])
def test_geometry_rewards_are_blind_to_appearance(clips, fault):
    wrong = PERTURBATIONS[fault].apply(clips, PERTURBATIONS[fault].magnitudes[-1], 0)
    assert (wrong.video - clips.video).abs().mean() > 0.005
    for reward in REWARDS.values():
        torch.testing.assert_close(reward(wrong.geometry), reward(clips.geometry))


def advantage(weights, *videos, rewards=REWARDS):
    """The paper's: each reward z-scored within the group of videos, then the weighted mean. `[len(videos) B]`.

    With two videos one of which has no score, the other has none to be compared with: no advantage for either.
    """
    total = torch.zeros(len(videos), len(videos[0].c2w))
    for name, weight in weights.items():
        score = torch.stack([rewards[name](scene) for scene in videos])
        total += weight * ((score - score.mean(0)) / (score.std(0, unbiased=False) + 1e-6)).nan_to_num(0.0)
    return total / sum(weights.values())


@pytest.fixture(scope="module")
def fresh():
    return make_clips(range(32_000, 32_048), size=(32, 32), supersample=1)


@pytest.fixture(scope="module")
def keep(fresh):
    keep = [i for i, motion in enumerate(fresh.command.motion) if motion != "static"][:32]
    assert len(keep) == 32
    return keep


@pytest.fixture(scope="module")
def moving(fresh, keep):
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


@pytest.mark.parametrize("name", [*TOLD, "scene_smoothness"])
def test_freeze_gate_each_further_reward_joins_the_default_set(moving, fresh, keep, name):
    """Told the truth, the others are no help to stillness; `scene_smoothness` is, and the floor must outweigh it."""
    truth, still = moving
    told = TOLD[name](fresh) if name in TOLD else REWARDS[name]
    if name in TOLD:
        (what, value), *_ = told.keywords.items()
        value = value[keep] if name != "epipolar" else replace(
            value, at=value.at[keep], there=value.there[keep], usable=value.usable[keep]
        )  # fmt: skip
        told = partial(told.func, **{what: value})
    weights = {**DEFAULT, name: 1.0, "camera_motion_floor": 3.0 if name in TOLD else 4.0}
    best, worst = advantage(weights, truth, still, rewards={**REWARDS, name: told})
    assert (worst < best).all()
    if name in ("camera_following", "motion_prior"):
        assert (told(still) < told(truth)).all()  # these two need no floor beside them
    elif name == "epipolar":
        assert told(still).isnan().all()
    else:  # the control
        best, worst = advantage({**weights, "camera_motion_floor": 2.0}, truth, still)
        assert (worst >= best).any()


def test_freeze_gate_holds_in_a_larger_group(moving):
    """The truth, two shaken versions and a frozen one: the frozen one is the worst of the four."""
    shaken = [make_clips(range(32_000, 32_048), size=(32, 32), supersample=1, jitter=j) for j in (0.2, 0.8)]
    keep = [i for i, motion in enumerate(shaken[0].command.motion) if motion != "static"][:32]
    group = [moving[0], *(clip.geometry.map(lambda x: x[keep]) for clip in shaken), moving[1]]
    ranks = advantage(DEFAULT, *group)
    assert (ranks[-1] < ranks[:-1].amin(0)).float().mean() > 0.9
    assert (ranks[-1] < ranks[0]).all()


def test_freeze_gate_the_papers_two_rewards_pass_where_the_motion_prior_gates_them(moving, fresh, keep):
    """No floor beside them: `grpo.gates: {motion_smoothness: motion_prior, reprojection_consistency: motion_prior}`."""
    prior = partial(motion_prior, base=camera_motion(fresh.geometry, stride=8)[keep])
    group = {name: torch.stack([REWARDS[name](scene) for scene in moving], -1) for name in PAPER}  # [prompts, 2]
    group["motion_prior"] = torch.stack([prior(scene) for scene in moving], -1)
    gates = dict.fromkeys(PAPER, "motion_prior")
    truth, still = group_advantage(group, PAPER | {"motion_prior": 0.0}, gates=gates).unbind(-1)
    assert (still < truth).all()
    truth, still = group_advantage(group, PAPER | {"motion_prior": 0.0}).unbind(-1)
    assert (still > truth).all()  # the control: computed, and gating nothing
    shuffled = group | {"motion_prior": group["motion_prior"].flip(-1)}
    truth, still = group_advantage(shuffled, PAPER | {"motion_prior": 0.0}, gates=gates).unbind(-1)
    assert (still > truth).all()  # the control: each other's gate
