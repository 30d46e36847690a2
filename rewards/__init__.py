"""Rewards: pure, differentiable functions of a `geometry.Geometry`. Needs torch and kornia only.

from rewards import motion_smoothness
r = motion_smoothness(scene)          # [*batch]; NaN: cannot be scored
"""

from functools import partial

from rewards.base import RewardFn
from rewards.epipolar import Matches, epipolar, sampson_errors
from rewards.following import camera_following
from rewards.motion import (
    MotionErrors,
    camera_motion,
    camera_motion_floor,
    motion_errors,
    motion_prior,
    motion_smoothness,
)
from rewards.reprojection import ESTIMATED_FLOW, reprojection_consistency, reprojection_errors
from rewards.smoothness import scene_smoothness

REWARDS: dict[str, RewardFn] = {
    "motion_smoothness": motion_smoothness,
    "reprojection_consistency": reprojection_consistency,
    "camera_motion_floor": camera_motion_floor,
    "scene_smoothness": scene_smoothness,
}
"""Every shipped reward of a geometry alone, by name, as it is for exact geometry. `camera_following`, `epipolar` and
`motion_prior` need to be told something beside it: a path, correspondences, a number."""

ESTIMATED: dict[str, RewardFn] = {
    **REWARDS,
    "reprojection_consistency": partial(reprojection_consistency, dynamic_threshold=ESTIMATED_FLOW),
    "scene_smoothness": partial(scene_smoothness, dynamic_threshold=ESTIMATED_FLOW),
}
"""The same for geometry that a model has estimated: in training, sampling, scoring and every report."""

PAPER: dict[str, float] = {"motion_smoothness": 1.0, "reprojection_consistency": 1.0}
"""The paper's set and weights. A frozen video wins it."""

DEFAULT: dict[str, float] = {**PAPER, "camera_motion_floor": 3.0}
"""The shipped set: the anti-freeze term weighs more than the other two together, so that even in a group of two, where
every z-score is +-1, stillness cannot win; a set with `scene_smoothness`, which likes stillness too, needs 4. While
every video of a group moves, it is constant and has no say."""

__all__ = [
    "DEFAULT",
    "ESTIMATED",
    "ESTIMATED_FLOW",
    "PAPER",
    "REWARDS",
    "Matches",
    "MotionErrors",
    "RewardFn",
    "camera_following",
    "camera_motion",
    "camera_motion_floor",
    "epipolar",
    "motion_errors",
    "motion_prior",
    "motion_smoothness",
    "reprojection_consistency",
    "reprojection_errors",
    "sampson_errors",
    "scene_smoothness",
]
