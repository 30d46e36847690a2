"""What a reward costs without and with a video: latents -> LGM -> rewards, or -> VAE decode -> teacher -> rewards.

    python -m benchmarks.reward_path        # a minute or two on one core; OMP_NUM_THREADS says how many are used

The same latents, the same process, the two ways in turn, so that a busy neighbour slows both: medians, and the median
of the ratios within a turn. Memory is stated twice: what torch allocates at most during a call, above its inputs
(torch's profiler), and the most that a process holds which loads and runs one way alone (a child's ru_maxrss), with
interpreter, libraries and weights. VGGRPO (arXiv 2603.26599) reports 1.32 x the time and 1.12 x the memory for the way
through the video, at full size.

The tiny stack, 8 videos of 17 frames of 64 x 64 (AMD EPYC, one thread of two cores that others kept busy, one run):
x1.12 the time, x1.01 the allocations (354 and 357 MiB), x1.05 the process (982 and 1028 MiB). Why so little: both ways
end in the same tail, the geometry model's correlation and pose solver on 17 frames. It is nine tenths of the short way,
and its peak is the peak of both. What latents save is the decoder, a fifth of the long way, whose memory is free again
before the tail asks for more; what reads them instead, a convolution and five more at the latents' grid, is half as
dear (without those five: x1.29, and 2.3 times the teacher's rotation error for 1.46).
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.rewards import peak_megabytes
from benchmarks.world import machine
from geometry.types import Geometry
from rewards import DEFAULT, REWARDS

ASSETS = Path("assets")
LATENT, RGB = "latents -> LGM -> rewards", "latents -> VAE decode -> RGB teacher -> rewards"
PAPER = {"time": 1.32, "memory": 1.12}

Phases = dict[str, Callable[[Tensor | Geometry], Tensor | Geometry]]
"""What is done, one after the other."""


def rewarded(scene: Tensor | Geometry) -> Tensor:
    """The shipped rewards' sum, weighted as in training."""
    assert isinstance(scene, Geometry)
    return torch.stack([weight * REWARDS[name](scene) for name, weight in DEFAULT.items()]).sum(0)


def load_way(way: str) -> Phases:
    """The phases of one way, with nothing loaded that it does not need.

    Raises:
        ValueError: an asset that is missing or not what its card says.
    """
    wan, geometry = ASSETS / "tiny-wan", ASSETS / "tiny-geometry"
    if way == LATENT:
        from vggrpo.stitch.load import load_lgm

        return {"geometry": load_lgm(ASSETS / "tiny-lgm", geometry, wan / "vae"), "rewards": rewarded}
    from vggrpo.bootstrap.geometry_publish import load_geometry
    from vggrpo.bootstrap.vae import decode, denormalise, load_vae

    vae, teacher = load_vae(wan / "vae"), load_geometry(geometry)
    return {
        "VAE decode": lambda z0: decode(vae, denormalise(vae, z0)).clamp(0, 1),
        "geometry": teacher,
        "rewards": rewarded,
    }


def latents(batch: int) -> Float[Tensor, "B C L h w"]:
    """Of clips of the world, 17 frames of 64 x 64; noise would have points everywhere, and cost other time."""
    from geometry.world import make_clips
    from vggrpo.bootstrap.vae import load_vae
    from vggrpo.stitch.clips import latents_of

    video = make_clips(range(80_000_000, 80_000_000 + batch), dynamic=True, supersample=1).video
    return latents_of(load_vae(ASSETS / "tiny-wan" / "vae"), video)


@torch.no_grad()
def walk(phases: Phases, z0: Float[Tensor, "B C L h w"]) -> dict[str, float]:
    """Seconds of every phase."""
    value: Tensor | Geometry = z0
    spent = {}
    for name, phase in phases.items():
        start = time.perf_counter()
        value = phase(value)
        spent[name] = time.perf_counter() - start
    return spent


def process_megabytes(way: str, batch: int) -> float:
    """The most memory that a process of its own holds, of which this is all that it does."""
    command = [sys.executable, "-m", "benchmarks.reward_path", "--alone", way, "--batch", str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["megabytes"])


def alone(way: str, batch: int) -> float:
    """Runs one way in this process, on latents that are noise; its peak so far comes back, in MiB."""
    phases = load_way(way)
    walk(phases, torch.randn(batch, 16, 5, 8, 8, generator=torch.Generator().manual_seed(0)))
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (2**20 if sys.platform == "darwin" else 2**10)


def run(batch: int, repeats: int) -> None:
    """Measure and print."""
    # First: Linux counts what the parent holds at the fork towards its child's peak.
    whole = {way: process_megabytes(way, batch) for way in (LATENT, RGB)}
    z0, ways = latents(batch), {way: load_way(way) for way in (LATENT, RGB)}
    turns: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for turn in range(repeats + 1):
        for way, phases in ways.items():
            spent = walk(phases, z0)
            if turn:  # the first warms up
                turns[way].append(spent)
    totals = {way: [sum(spent.values()) for spent in each] for way, each in turns.items()}
    ratio = statistics.median(b / a for a, b in zip(totals[LATENT], totals[RGB], strict=True))
    with torch.no_grad():
        peaks = {way: peak_megabytes(lambda phases=phases: walk(phases, z0)) for way, phases in ways.items()}
    print(f"{machine()}\n{batch} videos of 17 frames of 64 x 64, without gradients; medians of {repeats} turns\n")
    for way, each in turns.items():
        middle = {name: statistics.median(spent[name] for spent in each) for name in each[0]}
        total = sum(middle.values())
        print(f"{way}\n    {1000 * statistics.median(totals[way]):6.0f} ms", end="   ")
        print("   ".join(f"{name} {1000 * x:.0f} ms ({x / total:.0%})" for name, x in middle.items()))
        print(f"    {peaks[way]:6.0f} MiB allocated, {whole[way]:.0f} MiB in a process of its own")
    memory, process = (held[RGB] / held[LATENT] for held in (peaks, whole))
    print(f"\nthe second over the first: time x{ratio:.2f}, allocations x{memory:.2f}, process x{process:.2f}")
    print(f"the paper, at full size: time x{PAPER['time']}, memory x{PAPER['memory']}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reward_path", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8, help="videos, as many as a group has")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--alone", choices=(LATENT, RGB), help="one way, and what the process held at most")
    given = parser.parse_args(arguments)
    if min(given.batch, given.repeats) < 1:
        parser.error("--batch and --repeats must be at least 1")
    if given.alone is None:
        run(given.batch, given.repeats)
    else:
        print(json.dumps({"megabytes": alone(given.alone, given.batch)}))


if __name__ == "__main__":
    main()
