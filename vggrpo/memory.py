"""Out of memory: the micro-batch is halved, on every rank alike, and the work is begun again."""

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch

T = TypeVar("T")
Agree = Callable[[bool], bool]
"""Whether it happened on any rank; all of them ask."""


class OutOfMemory(Exception):
    """Some rank has run out of memory, and all of them know."""


def agreed(work: Callable[[], T], agree: Agree) -> T:
    """`work()`.

    Raises:
        OutOfMemory: here or on another rank the memory was not enough.
    """
    done: list[T] = []
    with suppress(torch.OutOfMemoryError):  # left behind at once: its traceback holds what filled the memory
        done.append(work())
    if agree(not done):
        raise OutOfMemory
    return done[0]


def halved(size: int, setting: str) -> int:
    """The next micro-batch to try.

    Raises:
        ValueError: there is none below one video.
    """
    if size == 1:
        raise ValueError(
            f"out of memory with one video at a time ({setting} = 1): use fewer or smaller frames, a larger device, or "
            "an engine that shares the model out (zero3, fsdp2)"
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return size // 2
