"""Freed memory is kept: the next tensor of the same size faults no page in."""

import subprocess
import sys

import pytest

from vggrpo.heap import keep_freed_memory

COUNT = """
import resource, sys, torch
from vggrpo.heap import keep_freed_memory
assert sys.argv[1] == "not" or keep_freed_memory()
for k in range(40):
    if k == 20:  # before it the heap grows to what it takes
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MB, 16384 pages
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how):
    done = subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not keep_freed_memory(), reason="mallopt is glibc's")
def test_a_tensor_takes_the_place_of_the_one_before():
    kept, handed_back = faults("kept"), faults("not")
    assert handed_back > 100  # the control; huge pages fault once for 512 small ones
    assert kept < handed_back / 10
