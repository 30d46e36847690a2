"""The negative control of every claim: a reward that knows nothing. Whatever it improves, the judges imagine.

A recipe asks for it by `grpo.weights: {random: 1}`, and for nothing beside it, so that it is no part of a real reward.
"""

from typing import Any

import torch
from torch import Tensor

from vggrpo.runtime import Run
from vggrpo.trainer import RewardFn

RANDOM = "random"


def random_reward(run: Run) -> RewardFn:
    """Noise in [0, 1), from each sample's name - seed, iteration, prompt, member - and nothing else about it.

    So it is the same on any number of ranks and after a resume, and no sample can earn it.
    """

    def reward(scene: Any) -> Tensor:
        b, k = run.num_local_prompts, run.num_members
        streams = run.latest
        drawn = [torch.rand((), generator=streams.control(i, j)) for i in range(b) for j in range(k)]
        return torch.stack(drawn).view(b, k).to(run.accelerator.device)

    return reward


def is_control(weights: dict[str, float] | None) -> bool:
    """Whether a recipe's weights ask for the control.

    Raises:
        ValueError: they mix it with a reward.
    """
    if weights is None or RANDOM not in weights:
        return False
    if len(weights) > 1:
        raise ValueError(f"grpo.weights: {RANDOM!r} is the negative control and stands alone, got {sorted(weights)}")
    return True
