"""Muon for the matrices of a transformer's blocks, AdamW for everything else, as one optimiser.

Muon (https://kellerjordan.github.io/posts/muon/) makes each matrix's momentum orthogonal before it steps; scaled to the
length of AdamW's steps (arXiv 2502.16982, section 2.2) the two share a learning rate.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """Both optimisers behind the interface of one: their groups side by side, one state.

    Args:
        network: its trainable two-dimensional weights below `blocks` take Muon's steps.
        lr: of both.
        betas: of AdamW; Muon's momentum is .95.
        weight_decay: of both, decoupled.

    Raises:
        ValueError: this torch has no Muon (2.9 is the first), or the network no such matrix.
    """

    def __init__(self, network: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"Muon needs torch >= 2.9 and this is {torch.__version__}: upgrade, or use adamw")
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, weight in network.named_parameters():
            if weight.requires_grad:
                (matrices if weight.ndim == 2 and "blocks." in name else others).append(weight)
        if not matrices:
            raise ValueError("Muon is for the matrices of a transformer's blocks, and there are none: use adamw here")
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr, weight_decay, adjust_lr_fn="match_rms_adamw")
        ]
        if others:  # not with LoRA, where all is in blocks
            self._parts.append(torch.optim.AdamW(others, lr, betas, weight_decay=weight_decay))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of each."""
        loss = None if closure is None else closure()
        for part in self._parts:
            part.step()
        return loss
