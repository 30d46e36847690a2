"""What a tensor leaves is kept for the next one: handed back to the kernel, its pages are cleared anew at every use."""

import ctypes
import platform

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Of `mallopt` (man 3 mallopt), by their numbers in malloc.h."""
BLOCK, KEPT = 2**28, 2**30
"""Bytes: smaller blocks are kept when freed, up to so many at the heap's end; weights of large models are not."""


def keep_freed_memory() -> bool:
    """For the rest of this process; whether it could be done, which is on glibc alone.

    Of the tiny geometry model's time on a virtual CPU a fifth went to page faults without it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(MMAP_THRESHOLD, BLOCK)) and bool(libc.mallopt(TRIM_THRESHOLD, KEPT))
