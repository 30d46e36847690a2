"""Weights and moments that an engine has cut into parts, as a checkpoint has them: whole, by name, whatever the engine.

Reading them is collective: every rank must, also those that write nothing.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vggrpo.checkpoint import optimizer_tensors, restore_optimizer, trained_weights


def whole_weights(network: nn.Module, engine: str) -> dict[str, Tensor]:
    """The trained weights of an unwrapped network. Where nothing is cut up they are the weights themselves, no copies.

    Args:
        engine: as `launch.engine_of` names it.
    """
    if engine != "zero3":
        return {name: _whole(weight) for name, weight in trained_weights(network).items()}
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(p) for name, p in network.named_parameters() if p.requires_grad}


def whole_moments(
    network: nn.Module, optimizer: torch.optim.Optimizer, engine: str, num_updates: int
) -> dict[str, Tensor]:
    """`checkpoint.optimizer_tensors` of any engine.

    Args:
        num_updates: steps that the optimiser has made; DeepSpeed does not tell.
    """
    if not engine.startswith("zero"):
        return {label: _whole(value) for label, value in optimizer_tensors(network, optimizer).items()}
    if num_updates == 0:
        return {}
    from deepspeed.utils import safe_get_full_optimizer_state

    found: dict[str, Tensor] = {}
    for name, weight in network.named_parameters():
        if weight.requires_grad:
            moments = {key: safe_get_full_optimizer_state(weight, key) for key in ("exp_avg", "exp_avg_sq")}
            found |= {f"{key}.{name}": value for key, value in moments.items()}
            found[f"step.{name}"] = torch.tensor(float(num_updates))
    return found


def restore_moments(
    network: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], engine: str
) -> None:
    """The inverse of `whole_moments`.

    Raises:
        ValueError: DeepSpeed, which does not take them; moments of a weight that the network does not have.
    """
    if engine.startswith("zero"):
        raise ValueError(
            f"a run cannot be resumed under {engine}, which takes no moments by name: resume it under ddp or fsdp2"
        )
    restore_optimizer(network, optimizer, tensors)
    for weight in network.parameters():
        if isinstance(weight, DTensor):
            moments = optimizer.state.get(weight, {})
            for key, value in moments.items():
                if value.shape == weight.shape:
                    moments[key] = distribute_tensor(value, weight.device_mesh, weight.placements)


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x
