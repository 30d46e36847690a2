"""Ten updates of the shipped recipe, as committed. If the maths is unchanged, `mixture.txt` is unchanged.

Changed on purpose? `python tests/golden/test_mixture.py` prints the new lines; the commit shows both.
"""

import itertools
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from vggrpo.build import build
from vggrpo.recipe import load_recipe
from vggrpo.trainer import train

HERE = Path(__file__).parent
# Two updates per rollout, guidance and a random window: what a change of the maths would have to go through.
OVERRIDES = [
    *("mixture.prompts=['east west', '']", "mixture.width=16", "grpo.num_prompts=2", "grpo.group_size=8"),
    *("grpo.num_updates=2", "grpo.clip=0.01", "grpo.beta=1.0", "optimizer.lr=0.02"),
    *("sampling.window.kind=random", "sampling.window.size=3", "sampling.guidance_scale=1.5"),
]


def golden_lines(*overrides: str) -> list[str]:
    """step, loss and mean reward of ten iterations."""
    recipe = load_recipe(HERE.parents[1] / "launch/recipes/mixture.yaml", [*OVERRIDES, *overrides])
    parts = build(recipe, Accelerator(cpu=True))
    conditions = itertools.islice(parts.conditions, 10)
    numbers = train(parts.policy, parts.geometry, parts.rewards, conditions, parts.optimizer, parts.run, recipe.grpo)
    return [f"{n['step']} {n['loss']:+.6f} {n['reward/nearness/mean']:.6f}" for n in numbers]


def as_numbers(lines: list[str]) -> np.ndarray:
    return np.array([[float(word) for word in line.split()] for line in lines])


def test_the_golden_run_is_unchanged_and_would_see_a_change():
    expected = as_numbers((HERE / "mixture.txt").read_text().splitlines())
    assert expected.shape == (10, 3)
    # Rounding differs between machines; the smallest of these changes is thirty times the tolerance.
    np.testing.assert_allclose(as_numbers(golden_lines()), expected, atol=3e-5)
    for change in ("sampling.noise=0.72", "grpo.beta=0.9", "grpo.clip=0.012"):
        difference = np.abs(as_numbers(golden_lines(change)) - expected).max()
        print(f"{change}: {difference:.1e}")
        assert difference > 5e-4, change


if __name__ == "__main__":
    print(*golden_lines(), sep="\n")
