"""How far the camera gets for each prompt before training: the floor that a tuned model is held to.

A steadier camera is easily had by moving less. A constant floor sees that for slow prompts only; the base model's own
motion under the same prompt sees it for all (the dead zone of the motion hinge in the field's guards).
"""

import math
from collections.abc import Mapping, Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor

from geometry.types import Geometry
from rewards import camera_motion, camera_motion_floor, motion_prior
from vggrpo.runtime import Run
from vggrpo.trainer import GeometryFn, OfCondition
from vggrpo.types import Condition, Policy, Streams

STRIDE = 8
"""Frames over which motion is measured: from frame to frame, shake would count."""
AT_ONCE = 4
"""Prompts in one rollout."""
STILL = 0.04
"""Motion below which a prompt's camera counts as standing still, in `camera_motion`'s units: nothing is asked of it.
Two degrees of sway alone have at most .026, and the slowest of the world's moving commands .08."""


@torch.no_grad()
def measure_base_motion(
    policy: Policy, geometry: GeometryFn, prompts: Sequence[str], samples: int, seed: int, run: Run
) -> dict[str, float]:
    """Mean of `camera_motion` over `samples` videos of each prompt, by the policy as it is now; ranks share the work.

    Raises:
        ValueError: a prompt none of whose videos has a finite motion.
    """
    accelerator, every = run.accelerator, list(dict.fromkeys(prompts))
    parts = [every[start : start + AT_ONCE] for start in range(0, len(every), AT_ONCE)]
    found: list[tuple[str, float]] = []
    for i in range(math.ceil(len(parts) / accelerator.num_processes)):  # as many rollouts on one rank as on another
        mine = parts[(i * accelerator.num_processes + accelerator.process_index) % len(parts)]
        rollout = policy.rollout(Condition(mine), samples, Streams(seed, i, first_prompt=10**6))
        found += zip(mine, camera_motion(geometry(rollout.z0), stride=STRIDE).nanmean(-1).tolist(), strict=True)
    motion = dict(gather_object(found))
    for prompt, value in motion.items():
        if not math.isfinite(value):
            raise ValueError(f"no video of {prompt!r} has a camera motion: check the geometry model on this prompt")
    return motion


def floor_of(motion: dict[str, float], share: float) -> OfCondition:
    """`camera_motion_floor` with a share of each prompt's own `motion` as the floor."""

    def reward(scene: Geometry, cond: Condition) -> Tensor:
        floor = scene.depth.new_tensor([share * motion[prompt] for prompt in cond.prompt])[:, None]
        enough = camera_motion_floor(scene, floor=floor.clamp(min=STILL), stride=STRIDE)
        return enough.where(floor > STILL, torch.zeros_like(enough))

    return OfCondition(reward)


def prior_of(motion: Mapping[str, float]) -> OfCondition:
    """`motion_prior` around each prompt's own `motion`."""

    def reward(scene: Geometry, cond: Condition) -> Tensor:
        base = scene.depth.new_tensor([motion[prompt] for prompt in cond.prompt])[:, None]
        return motion_prior(scene, base, stride=STRIDE)

    return OfCondition(reward)
