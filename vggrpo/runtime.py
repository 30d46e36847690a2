"""One run on any number of ranks: who samples what, gathering, gradients, the clock. All of accelerate is behind it.

A global batch is B prompts x K members. Ranks share it prompts first; where they outnumber the prompts' common divisor,
the groups themselves are cut: 4 ranks and 2 prompts are 2 x 2, each rank with half a group. Random streams are named by
the global prompt and member (`types.Streams`) and advantages are computed on the gathered rewards, so that neither
depends on the number of ranks.
"""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Shaped
from torch import Tensor, nn

from vggrpo.launch import engine_of
from vggrpo.signals import Interrupted
from vggrpo.types import Condition, Streams


@dataclass(frozen=True)
class Share:
    """One rank's rectangle of the [B K] global batch."""

    prompts: slice
    members: slice
    shape: tuple[int, int]
    """(ranks along B, ranks along K); rank = i_B * ranks along K + i_K."""


def share_of(rank: int, num_ranks: int, num_prompts: int, group_size: int) -> Share:
    """The part of B = `num_prompts` x K = `group_size` that falls to `rank`. All parts have one size.

    Raises:
        ValueError: a group of one, or a batch that cannot be cut into equal rectangles.
    """
    if num_prompts < 1 or group_size < 2:
        raise ValueError(
            f"num_prompts must be >= 1 and group_size >= 2 (a group of 1 has nothing to compare), "
            f"got {num_prompts} and {group_size}"
        )
    along_b = math.gcd(num_ranks, num_prompts)
    along_k = num_ranks // along_b
    if group_size % along_k:
        raise ValueError(
            f"{num_prompts} prompts x groups of {group_size} cannot be shared by {num_ranks} ranks: "
            f"each group falls on {along_k} ranks, so group_size must be a multiple of {along_k}"
        )
    b, k = num_prompts // along_b, group_size // along_k
    i, j = divmod(rank, along_k)
    return Share(slice(i * b, (i + 1) * b), slice(j * k, (j + 1) * k), (along_b, along_k))


class Run:
    """This process's place among the ranks, and the steps in which they act together."""

    def __init__(self, accelerator: Accelerator, num_prompts: int, group_size: int, max_skipped: int = 0) -> None:
        """Raises ValueError where the batch cannot be shared by the ranks (see `share_of`)."""
        self.accelerator, self.engine = accelerator, engine_of(accelerator)
        self.num_prompts, self.max_skipped = num_prompts, max_skipped
        self.updates = self.skipped = 0  # made since the start of this process; left out in a row, up to now
        self.share = share_of(accelerator.process_index, accelerator.num_processes, num_prompts, group_size)
        self.boundary = 0  # updates made when this iteration began: only there can a run be left and taken up
        self.asked_to_stop: Callable[[], bool] = lambda: False
        self.latest = Streams(0, 0)  # of the rollout under way
        self.num_local_prompts = self.share.prompts.stop - self.share.prompts.start
        self.num_members = self.share.members.stop - self.share.members.start

    def prepare(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float = math.inf
    ) -> tuple[Any, Any]:
        """Network and optimiser as this launch needs them (DDP, ...). The trained network must be called through it.

        Args:
            max_grad_norm: what `clip_and_step` will be asked for; DeepSpeed must know it beforehand.
        """
        if self.engine.startswith("zero"):
            self.accelerator.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] = max_grad_norm
            self._trained = [weight for weight in network.parameters() if weight.requires_grad]
        wrapped, stepped = self.accelerator.prepare(network, optimizer)
        if isinstance(wrapped, nn.parallel.DistributedDataParallel):
            # Buffers are constants; to broadcast them at every forward pass would make ranks wait for each other.
            wrapped.broadcast_buffers = False
        return wrapped, stepped

    def mine(self, cond: Condition) -> Condition:
        """This rank's prompts of the global batch `cond`.

        Raises:
            ValueError: `cond` is not the global batch.
        """
        if len(cond) != self.num_prompts:
            raise ValueError(f"the run was set up for {self.num_prompts} prompts per batch, got {len(cond)}")
        return cond[self.share.prompts]

    def streams(self, seed: int, iteration: int, first_prompt: int = 0) -> Streams:
        """This rank's random streams; `first_prompt` is the index of the global batch's own first prompt."""
        share = self.share
        self.latest = Streams(seed, iteration, first_prompt + share.prompts.start, share.members.start)
        return self.latest

    def gather(self, values: dict[str, Shaped[Tensor, "b k ..."]]) -> dict[str, Shaped[Tensor, "B K ..."]]:
        """Every rank's part, put together: the same [B K ...] on every rank."""
        return {name: self._gather(value) for name, value in values.items()}

    def local(self, value: Shaped[Tensor, "B K ..."]) -> Shaped[Tensor, "b k ..."]:
        """This rank's part of a global tensor: the inverse of `gather`."""
        return value[self.share.prompts, self.share.members]

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add this micro-batch's gradient, averaged over the ranks; after the `last` one comes `clip_and_step`.

        A run that was asked to stop can be left here (`agree`).

        DDP sends at every call. To send once per update it would have to know the last chunk before its forward pass,
        and LoRA's gradients are small next to a video model's backward.
        """
        self.agree()
        if self.engine.startswith("zero"):  # accelerate's own backward would step at every call
            engine = self.accelerator.deepspeed_engine_wrapped.engine
            engine.set_gradient_accumulation_boundary(last)
            engine.backward(loss)
        else:
            self.accelerator.backward(loss)

    def any(self, happened: bool) -> bool:
        """Whether it happened on any rank: all of them must ask."""
        if self.accelerator.num_processes == 1:
            return happened
        told = self.accelerator.reduce(torch.tensor(float(happened), device=self.accelerator.device))
        return bool(told > 0)

    def agree(self, failed: bool = False) -> bool:
        """Whether anything failed, on any rank: all of them must ask, after every micro-batch.

        Raises:
            Interrupted: on all ranks, if any of them was asked to stop and the iteration has not changed the weights.
        """
        told = torch.tensor([failed, self.updates == self.boundary and self.asked_to_stop()], dtype=torch.float32)
        if self.accelerator.num_processes > 1:
            told = self.accelerator.reduce(told.to(self.accelerator.device))
        if told[1] > 0:
            raise Interrupted
        return bool(told[0] > 0)

    def clip_and_step(self, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> float:
        """One optimiser step on the gathered gradient, which is then cleared. Returns its norm before clipping.

        A gradient that is not finite, which all ranks see alike, is cleared and leaves the parameters as they were.

        Raises:
            FloatingPointError: that happened more than `max_skipped` times in a row; under DeepSpeed, which cannot be
                told to forget a gradient, at all.
        """
        if self.engine.startswith("zero"):
            return self._deepspeed_step()
        params = [p for group in optimizer.param_groups for p in group["params"]]
        norm = float(self.accelerator.clip_grad_norm_(params, max_grad_norm))
        if math.isfinite(norm):
            optimizer.step()
            self.updates, self.skipped = self.updates + 1, 0
        else:
            self.skipped += 1
        optimizer.zero_grad()
        if self.skipped > self.max_skipped:
            raise FloatingPointError(
                f"the gradient norm is {norm}, and no update could be made {self.skipped} times in a row: "
                "lower optimizer.lr, or look at the rewards that became infinite or NaN"
            )
        return norm

    def _deepspeed_step(self) -> float:
        """DeepSpeed clips and clears by itself, but in fp32 it would also step along a gradient that is not finite."""
        from deepspeed.utils import safe_get_full_grad

        gradients = [safe_get_full_grad(weight) for weight in self._trained]
        norm = float(torch.stack([gradient.float().norm() for gradient in gradients if gradient is not None]).norm())
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient norm is {norm}: go on from the newest checkpoint with a lower optimizer.lr, or under "
                "ddp, which leaves such updates out"
            )
        self.accelerator.deepspeed_engine_wrapped.engine.step()
        self.updates += 1
        return norm

    def _gather(self, value: Tensor) -> Tensor:
        # accelerate stacks ranks along axis 0: [(i_B i_K b) k ...] -> [(i_B b) (i_K k) ...]
        along_b, along_k = self.share.shape
        b, k, *rest = value.shape
        every = self.accelerator.gather(value.contiguous()).reshape(along_b, along_k, b, k, *rest)
        return every.transpose(1, 2).reshape(along_b * b, along_k * k, *rest)


class Clock:
    """Seconds and peak memory of each phase: `with clock("rollout"): ...`. A phase entered twice adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begin
        self.peak_bytes[phase] = max(self.peak_bytes.get(phase, 0), _peak_bytes())


def _peak_bytes() -> int:
    """On a GPU, of the phase; on a CPU the system remembers only the highest so far, of the whole process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
