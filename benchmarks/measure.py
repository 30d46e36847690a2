"""Seconds and memory of a call, on a GPU or a CPU."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import diffusers
import torch
from torch import nn

from benchmarks.rewards import peak_megabytes
from benchmarks.world import machine

MIB = 2**20


@dataclass(frozen=True)
class Machine:
    """Where it runs, and how it is measured."""

    device: str
    dtype: torch.dtype
    repeats: int = 3

    def wait(self) -> None:
        """Until all that was asked for is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object]) -> float:
        """Median of some calls, after one that warms up."""
        found = []
        for _ in range(self.repeats + 1):
            self.wait()
            begin = time.perf_counter()
            call()
            self.wait()
            found.append(time.perf_counter() - begin)
        return median(found[1:])

    def peak(self, call: Callable[[], None], held: int = 0) -> float:
        """MiB that are allocated at most during a call: on a GPU of all, on a CPU the call's own above `held` bytes."""
        if self.device != "cuda":
            return held / MIB + peak_megabytes(call)
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        call()
        self.wait()
        return torch.cuda.max_memory_allocated() / MIB

    def free(self) -> None:
        """What nobody holds any more."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def __str__(self) -> str:
        about = f"{machine()}, diffusers {diffusers.__version__}, {str(self.dtype).removeprefix('torch.')}"
        if self.device != "cuda":
            return about
        card = torch.cuda.get_device_properties(0)
        return f"{card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}; {about}"


@contextmanager
def watched(module: nn.Module, names: Sequence[str], on: Machine) -> Iterator[dict[str, float]]:
    """Seconds that calls of these parts of a module take."""
    spent, begun, handles = dict.fromkeys(names, 0.0), dict[str, float](), []
    for name in names:

        def before(*_: Any, name: str = name) -> None:
            on.wait()
            begun[name] = time.perf_counter()

        def after(*_: Any, name: str = name) -> None:
            on.wait()
            spent[name] += time.perf_counter() - begun[name]

        part = module.get_submodule(name)
        handles += [part.register_forward_pre_hook(before), part.register_forward_hook(after)]
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()
