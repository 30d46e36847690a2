"""The processes that stitch one model together: each has clips of its own, and all have the same numbers."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn


class Team:
    """This process's place among them."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.rank, self.size = accelerator.process_index, accelerator.num_processes
        self.main, self.device = accelerator.is_main_process, accelerator.device

    def mine(self, rows: list[int]) -> list[int]:
        """This process's share of some clips."""
        return rows[self.rank :: self.size]

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes, where x is."""
        if self.size == 1:
            return x
        summed: Tensor = self.accelerator.reduce(x.to(self.device, copy=True).contiguous())
        return summed.to(x.device)

    def join(self, weights: list[nn.Parameter]) -> None:
        """Add up the gradients of all processes, in one message; a weight without one has 0."""
        if self.size == 1:
            return
        grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        whole = self.total(torch.cat([grad.flatten() for grad in grads]))
        for weight, part in zip(weights, whole.split([w.numel() for w in weights]), strict=True):
            weight.grad = part.view_as(weight).clone()

    def wait(self) -> None:
        """Until all are here."""
        self.accelerator.wait_for_everyone()
