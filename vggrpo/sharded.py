"""Weights and moments that an engine has cut into parts, as a checkpoint has them: whole, by name, whatever the engine.

Reading them is collective: every rank must, also those that write nothing.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vggrpo.checkpoint import optimizer_tensors, restore_optimizer, trained_weights

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of a weight, beside the number of its steps."""


def whole_weights(network: nn.Module, engine: str) -> dict[str, Tensor]:
    """The trained weights of an unwrapped network. Where nothing is cut up they are the weights themselves, no copies.

    Args:
        engine: as `launch.engine_of` names it.
    """
    if engine != "zero3":
        return {name: _whole(weight) for name, weight in trained_weights(network).items()}
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(p) for name, p in network.named_parameters() if p.requires_grad}


def whole_moments(network: nn.Module, optimizer: torch.optim.Optimizer, engine: str) -> dict[str, Tensor]:
    """`checkpoint.optimizer_tensors` of any engine."""
    if not engine.startswith("zero"):
        return {label: _whole(value) for label, value in optimizer_tensors(network, optimizer).items()}
    counted = [state["step"] for state in optimizer.state.values() if state]
    if not counted:
        return {}
    from deepspeed.utils import safe_get_full_optimizer_state

    found: dict[str, Tensor] = {}
    for name, weight in network.named_parameters():
        if weight.requires_grad:
            found |= {f"{key}.{name}": safe_get_full_optimizer_state(weight, key) for key in MOMENTS}
            found[f"step.{name}"] = torch.tensor(float(counted[0]))
    return found


def restore_moments(
    network: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], engine: str
) -> None:
    """The inverse of `whole_moments`: of the same engine it brings back every bit, and of another one the same moments.

    Raises:
        ValueError: moments of a weight that the network does not have; or, for DeepSpeed, weights that were not all
            updated equally often.
    """
    if engine.startswith("zero"):
        if tensors:
            _restore_zero(network, optimizer, tensors, engine)
        return
    restore_optimizer(network, optimizer, tensors)
    for weight in network.parameters():
        if isinstance(weight, DTensor):
            moments = optimizer.state.get(weight, {})
            for key, value in moments.items():
                if value.shape == weight.shape:
                    moments[key] = distribute_tensor(value, weight.device_mesh, weight.placements)


def _restore_zero(network: nn.Module, optimizer: Any, tensors: Mapping[str, Tensor], engine: str) -> None:
    """DeepSpeed keeps moments of flat parts, which hold many weights, and makes them in its first step: here they are
    made before it, and each rank fills in what it has of every weight."""
    trained: dict[str, Any] = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    steps = {name: float(tensors[f"step.{name}"]) for name in trained if f"step.{name}" in tensors}
    if steps.keys() != trained.keys() or len(set(steps.values())) != 1:
        raise ValueError(
            f"the weights of the checkpoint were not all updated equally often, and {engine} counts for all of them "
            "together: resume it under ddp"
        )
    from deepspeed.utils import (
        lazy_init_hp_params_optimizer_state,
        safe_set_full_optimizer_state,
        safe_set_local_optimizer_state,
    )

    zero = optimizer.optimizer  # accelerate's wrapper is around it
    for part in zero.fp32_partitioned_groups_flat if engine == "zero3" else zero.single_partition_of_fp32_groups:
        step = torch.tensor(next(iter(steps.values())))
        zero.state[part] = {"step": step} | {key: torch.zeros_like(part) for key in MOMENTS}
    if engine != "zero3":
        for weights, part in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            lazy_init_hp_params_optimizer_state(weights, part, zero.state)
    for name, weight in trained.items():
        for key in MOMENTS:
            whole = tensors[f"{key}.{name}"].to(weight.device)
            if engine == "zero3":  # by ranks, the last one's filled up; its setter of whole tensors knows of no filling
                size, rank = weight.partition_numel(), torch.distributed.get_rank()
                mine = whole.new_zeros(size)
                some = whole.flatten()[rank * size : (rank + 1) * size]
                mine[: len(some)] = some
                safe_set_local_optimizer_state(weight, mine, key)
            else:
                safe_set_full_optimizer_state(weight, whole, key)


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x
