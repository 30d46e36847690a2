"""An exponential moving average (EMA) of trained weights: steadier than the last step, and what is often shipped."""

from collections.abc import Mapping

import torch
from torch import Tensor

AVERAGE = "average"
"""Folder of the averaged LoRA, in a run's, and file of a checkpoint."""


def start_average(weights: Mapping[str, Tensor], kept: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """An average that begins at `weights`, on their devices; or goes on from what a checkpoint `kept`."""
    return {
        name: (weight if kept is None else kept[name]).detach().to(weight, copy=True)
        for name, weight in weights.items()
    }


@torch.no_grad()
def follow(average: Mapping[str, Tensor], weights: Mapping[str, Tensor], decay: float) -> None:
    """average <- decay average + (1 - decay) weights, in place."""
    for name, weight in weights.items():
        average[name].lerp_(weight, 1 - decay)
