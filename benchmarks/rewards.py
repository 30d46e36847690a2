"""What do the rewards cost in time and memory, and how does it grow with frames and pixels?

    python -m benchmarks.rewards        # about two minutes on two cores; OMP_NUM_THREADS says how many are used

A batch of 8 clips. Memory is the peak of what torch allocates during the call, above its inputs (torch's profiler; the
process's own size would hide it behind what was freed before). Ratios are to 17 frames of 64 x 64, of the fastest runs:
a busy neighbour slows the others.
"""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.world import machine, seconds
from geometry import Geometry
from geometry.world import make_clips
from rewards import RewardFn, motion_smoothness, reprojection_consistency

BATCH = 8
BASE = (17, 64)
SIZES = ((9, 64), BASE, (33, 64), (17, 32), (17, 128))
"""(frames, height and width)."""


def scene_of(frames: int, side: int) -> Geometry:
    """Dynamic clips whose depth, points and poses take gradients."""
    scene = make_clips(range(BATCH), frames=frames, size=(side, side), dynamic=True, supersample=1).geometry
    return replace(scene, **{name: getattr(scene, name).requires_grad_() for name in ("c2w", "depth", "points")})


def calls(reward: RewardFn, scene: Geometry) -> dict[str, Callable[[], None]]:
    """The reward alone, and with its gradient."""

    def forward() -> None:
        with torch.no_grad():
            reward(scene)

    def backward() -> None:
        leaves = [scene.c2w, scene.depth, scene.points]
        torch.autograd.grad(reward(scene).sum(), leaves, allow_unused=True)

    return {"forward": forward, "forward + backward": backward}


def peak_megabytes(run: Callable[[], None]) -> float:
    """The most that is allocated at once during a call, of what it allocated itself."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler of torch 2.13 announces itself on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak / 2**20


def main() -> None:
    print(f"{machine()}\nbatch {BATCH}; median (fastest) of 7; x: the fastest, and memory, over the second row's\n")
    for reward in (reprojection_consistency, motion_smoothness):
        base: dict[str, tuple[float, float, float]] = {}
        rows: dict[tuple[int, int], dict[str, tuple[float, float, float]]] = {}
        for size in (BASE, *(s for s in SIZES if s != BASE)):
            scene = scene_of(*size)
            rows[size] = {
                name: (*seconds(run, repeats=7), peak_megabytes(run)) for name, run in calls(reward, scene).items()
            }
        base = rows[BASE]
        print(f"{reward.__name__:26}" + "   ".join(f"{name:37}" for name in base))
        for size in SIZES:
            row = f"  T {size[0]:2}, {size[1]:3} x {size[1]:3}      "
            for name, (middle, best, memory) in rows[size].items():
                more = f"x{best / base[name][1]:.1f}", f"x{memory / base[name][2]:.1f}"
                row += f"{middle * 1000:7.0f} ({best * 1000:4.0f}) ms {more[0]:6}{memory:6.0f} MiB {more[1]:5}"
            print(row)
        print()


if __name__ == "__main__":
    main()
