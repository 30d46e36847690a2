"""Where an iteration of the tiny recipe spends its time: sampling, geometry, rewards, update.

    python -m benchmarks.iteration [section.key=value ...]     # a minute; OMP_NUM_THREADS says how many threads

K = 8, 10 steps, 3 of them trained, as launch/recipes/tiny.yaml has them. Medians of warm iterations. A busy neighbour
makes wall time longer and CPU time hardly: both are printed.
"""

import itertools
import sys
import time
from statistics import median

import torch

from benchmarks.world import machine
from vggrpo.build import build
from vggrpo.recipe import load_recipe
from vggrpo.trainer import train

ITERATIONS = 6
"""The first of which warms up."""


def main(overrides: list[str]) -> None:
    """Print a line for each phase."""
    recipe = load_recipe("launch/recipes/tiny.yaml", overrides)
    parts = build(recipe)
    todo = itertools.islice(parts.conditions, ITERATIONS)
    found: list[dict[str, float]] = []
    begin = time.process_time()
    for numbers in train(parts.policy, parts.geometry, parts.rewards, todo, parts.optimizer, parts.run, recipe.grpo):
        phases = {name: x for name, x in numbers.items() if name.startswith("seconds/")}
        found.append(phases | {"cpu": time.process_time() - begin})
        begin = time.process_time()
    warm = found[1:]
    medians = {name: median(one[name] for one in warm) for name in warm[0]}
    cpu = medians.pop("cpu")
    total = sum(medians.values())
    print(machine())
    for name, seconds in medians.items():
        print(f"{name.removeprefix('seconds/'):<10} {1000 * seconds:8.0f} ms  {seconds / total:4.0%}")
    print(f"{'iteration':<10} {1000 * total:8.0f} ms  {60 / total:.1f} a minute")
    at_best = 60 * torch.get_num_threads() / cpu
    print(f"{'CPU time':<10} {1000 * cpu:8.0f} ms  {at_best:.1f} a minute at best")


if __name__ == "__main__":
    main(sys.argv[1:])
