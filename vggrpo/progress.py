"""How far a run is, in a line; and where its time went."""

from collections.abc import Mapping, Sequence
from statistics import median

WIDTH = 20
"""Characters of the bar."""


def bar(done: int, total: int, history: Sequence[Mapping[str, float]], numbers: Mapping[str, int | float]) -> str:
    """A bar, the time of an iteration and of what is left, and the mean of every reward.

    Args:
        history: seconds/PHASE of the iterations of this process.
    """
    each = median(sum(seconds.values()) for seconds in history[-20:])
    left = each * (total - done)
    filled = WIDTH * done // total
    rewards = [
        f"{name.split('/')[1]} {value:.3g}"
        for name, value in numbers.items()
        if name.startswith("reward/") and name.endswith("/mean")
    ]
    return (
        f"[{'#' * filled}{' ' * (WIDTH - filled)}] {done}/{total}  {each:.2f} s  {left / 60:.0f} min left  "
        + "  ".join(rewards)
    )


def shares(history: Sequence[Mapping[str, float]]) -> str:
    """One line: iterations a minute, and the share of each phase; medians without the first iteration, a warm-up."""
    warm = history[1:] or history
    phases = {name: median(seconds[name] for seconds in warm) for name in warm[0]}
    total = sum(phases.values())
    each = "  ".join(f"{name.split('/')[1]} {100 * x / total:.0f} %" for name, x in phases.items())
    return f"{60 / total:.1f} iterations/min  {each}"
