"""How fast does the procedural world render, and where does the time go?

    python -m benchmarks.world        # a minute or two on two cores; OMP_NUM_THREADS says how many are used

`make_clips` at 17 frames of 64 x 64, a batch of 32 clips. The parts are timed in runs of their own (fastest of 3):
    draw    scenes, camera paths and captions (numpy, one clip after the other)
    cast    which surface each ray meets
    shade   the colours of what it met
    film    the rest: points, scene flow, antialiasing's bookkeeping, stacking
"""

import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from geometry.world import clips, make_clips, render

BATCH, FRAMES, SIZE = 32, 17, (64, 64)
REPEATS = 7
PARTS = {"draw": (clips, "draw_take"), "cast": (render, "cast"), "shade": (render, "shade")}


def machine() -> str:
    """CPU, threads, what else it is busy with, versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    threads, cores, load = torch.get_num_threads(), os.cpu_count(), os.getloadavg()[0]
    return f"{cpu}, {threads} threads on {cores} cores (load {load:.1f}), torch {torch.__version__}"


def seconds(run: Callable[[], Any], repeats: int = REPEATS) -> tuple[float, float]:
    """Median and fastest time of a call, after one that warms up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times), min(times)


@contextmanager
def timed(spent: Counter[str]) -> Iterator[None]:
    """Within it, the seconds spent in each of `PARTS` add up in `spent`."""
    before = {name: getattr(module, function) for name, (module, function) in PARTS.items()}
    for name, (module, function) in PARTS.items():
        setattr(module, function, _timed(before[name], name, spent))
    try:
        yield
    finally:
        for name, (module, function) in PARTS.items():
            setattr(module, function, before[name])


def split(run: Callable[[], Any]) -> tuple[float, Counter[str]]:
    """Time of one call, and of each of its parts."""
    spent: Counter[str] = Counter()
    start = time.perf_counter()
    with timed(spent):
        run()
    whole = time.perf_counter() - start
    spent["film"] = whole - spent.total()
    return whole, spent


def _timed(function: Callable[..., Any], name: str, spent: Counter[str]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        spent[name] += time.perf_counter() - start
        return result

    return wrapped


def main() -> None:
    print(machine())
    print(f"make_clips, {BATCH} clips of {FRAMES} x {SIZE[0]} x {SIZE[1]}, median (fastest) of {REPEATS} runs\n")
    print(f"{'':8} {'supersample':>11} {'clips/s':>16} {'s/batch':>9}  " + "".join(f"{x:>7}" for x in (*PARTS, "film")))
    for dynamic in (False, True):
        for supersample in (1, 2):

            def run(dynamic: bool = dynamic, supersample: int = supersample) -> None:
                make_clips(range(BATCH), frames=FRAMES, size=SIZE, dynamic=dynamic, supersample=supersample)

            middle, best = seconds(run)
            whole, spent = min((split(run) for _ in range(3)), key=lambda pair: pair[0])
            shares = "".join(f"{spent[name] / whole:7.0%}" for name in (*PARTS, "film"))
            speed = f"{BATCH / middle:.0f} ({BATCH / best:.0f})"
            print(f"{'dynamic' if dynamic else 'static':8} {supersample:11} {speed:>16} {middle:9.2f}  {shares}")


if __name__ == "__main__":
    main()
