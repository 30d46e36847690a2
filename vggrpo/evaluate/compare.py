"""Base against tuned on the same prompts and seeds: paired differences, their confidence, and a verdict.

Whether a video model became more consistent can only be said beside how much it still moves and how sharp it still is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vggrpo.evaluate.value import Value

CONSISTENCY = ("sampson/", "sfm/reprojection", "referee/reprojection")
"""Judges of geometry, by the beginning of their names: lower is better."""
STEADINESS = ("jitter", "referee/path_jerk", "sfm/path_jerk")
"""Judges of the camera's path: lower is better."""
MOTION, SHARPNESS = "travel", "sharpness"
"""Over half of a video: from frame to frame, a camera that shakes less would seem to move less."""
KEPT_MOTION, KEPT_SHARPNESS = 0.9, 0.95
"""Shares of the base's that the tuned model must keep."""
MATCHED = (0.8, 1.25)
"""Ratio of motion, tuned to base, within which a pair counts as motion-matched."""
MORE_NA = 0.05
"""Share of the videos that a judge may fall silent on, beyond those that it cannot judge of the base's."""
RESAMPLED = 4000
LEVEL = 0.05
"""Of significance; the verdict divides it by the number of judges of geometry that could have improved."""


@dataclass(frozen=True)
class Paired:
    """One judge on pairs of videos. Differences are tuned - base."""

    base: float
    tuned: float
    """Means over the pairs that both can be judged."""
    difference: float
    low: float
    high: float
    """95 % of bootstrap means over prompts."""
    pairs: int
    base_na: float
    tuned_na: float
    """Share of videos that the judge has no number for."""
    p: float
    """Two-sided, of the bootstrap: twice the share of means on the other side of 0; at least 2 / 2^prompts."""
    sign_p: float
    """Two-sided, of the sign test over prompts: whatever the differences' size."""

    def improved(self, level: float = LEVEL) -> bool:
        """Lower, and surely so."""
        return self.pairs > 0 and self.difference < 0 and self.p <= level

    def worsened(self, level: float = LEVEL) -> bool:
        """Higher, and surely so."""
        return self.pairs > 0 and self.difference > 0 and self.p <= level


Told = Sequence[dict[str, Value]]
"""The verdicts on N videos."""


def paired(base: Told, tuned: Told, prompts: Sequence[int], name: str, rows: Sequence[int] | None = None) -> Paired:
    """One judge's pairs; `prompts` says which prompt each video is of, `rows` chooses some of the videos.

    The bootstrap draws prompts, not videos: two seeds of one prompt are not two opinions.
    """
    rows = range(len(base)) if rows is None else rows
    a, b = (np.array([told[i][name].value for i in rows], dtype=float) for told in (base, tuned))
    of = np.array([prompts[i] for i in rows])
    both = np.isfinite(a) & np.isfinite(b)
    no_base, no_tuned = (float(1 - np.isfinite(x).mean()) if len(x) else math.nan for x in (a, b))
    if not both.any():
        nan = math.nan
        return Paired(nan, nan, nan, nan, nan, 0, no_base, no_tuned, nan, nan)
    difference, of = (b - a)[both], of[both]
    groups = [difference[of == prompt] for prompt in np.unique(of)]
    sums, counts = np.array([g.sum() for g in groups]), np.array([len(g) for g in groups])
    drawn = np.random.default_rng(0).integers(len(groups), size=(RESAMPLED, len(groups)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    beyond = min(int((means >= 0).sum()), int((means <= 0).sum()))
    # A bootstrap of three prompts that agree is sure of itself; n prompts say no more than n coins that fall alike.
    p = min(1.0, max(2 * (beyond + 1) / (RESAMPLED + 1), 2 / 2 ** len(groups)))
    return Paired(
        float(a[both].mean()), float(b[both].mean()), float(difference.mean()), float(low), float(high),
        int(both.sum()), no_base, no_tuned, p, sign_test([float(g.mean()) for g in groups]),
    )  # fmt: skip


def sign_test(differences: Sequence[float]) -> float:
    """Two-sided p-value of as many differences on one side of 0 as there are; 0 itself does not count."""
    up, down = sum(x > 0 for x in differences), sum(x < 0 for x in differences)
    n = up + down
    tail = sum(math.comb(n, k) for k in range(min(up, down) + 1)) / 2**n
    return min(1.0, 2 * tail)


def motion_matched(base: Told, tuned: Told) -> list[int]:
    """Videos that move about as much as the base's of the same prompt and seed."""
    chosen = []
    for i, (a, b) in enumerate(zip(base, tuned, strict=True)):
        ratio = b[MOTION].value / a[MOTION].value if a[MOTION].value else math.nan
        if MATCHED[0] <= ratio <= MATCHED[1]:
            chosen.append(i)
    return chosen


@dataclass(frozen=True)
class Verdict:
    """Whether the tuned model is better, and why not."""

    passed: bool
    reasons: list[str]
    motion: float
    sharpness: float
    """Tuned / base, of the means."""
    sounder: list[str]
    """Judges of geometry that improve surely, raw and motion-matched."""
    steadier: list[str]
    """Judges of the camera's path that improve, with 0 outside their 95 % interval."""
    taught: list[str]
    """Judges of geometry that do not count, for the tuned model was trained on much the same."""


def verdict(table: dict[str, Paired], matched: dict[str, Paired], taught: Sequence[str] = ()) -> Verdict:
    """PASS: a judge of geometry improves, raw and motion-matched, at kept motion, sharpness and N/A, and none worsens.

    A judge that can judge fewer of the videos than before does not count as improved, whatever it says of the others.
    Judges whose names begin with one of `taught` are not asked whether they improve, for that is what was trained; they
    may still worsen. "Surely" is at `LEVEL` over the number of judges of geometry that are asked (Bonferroni): the more
    are, the more one of them improves by chance.
    """
    motion, sharpness = (table[k].tuned / table[k].base if table[k].base else math.nan for k in (MOTION, SHARPNESS))
    heard = [name for name in table if name.startswith(CONSISTENCY) and table[name].pairs]
    asked = [name for name in heard if not name.startswith(tuple(taught))]
    level = LEVEL / max(len(asked), 1)
    better = [name for name in asked if table[name].improved(level)]
    silenced = [name for name in better if table[name].tuned_na > table[name].base_na + MORE_NA]
    judging = [name for name in better if name not in silenced]
    sounder = [name for name in judging if matched[name].improved()]
    reasons = []
    if not better:
        reasons.append(f"no judge of geometry improves surely (p <= {level:.3g} for each of {len(asked)})")
    elif not judging:
        reasons += [
            f"{name} cannot judge {table[name].tuned_na:.0%} of the videos, {table[name].base_na:.0%} before"
            for name in silenced
        ]
    elif not sounder:
        reasons.append(f"{', '.join(judging)} improve, but not among videos that move as much as before")
    if not motion >= KEPT_MOTION:
        reasons.append(f"motion is {motion:.2f} of the base's, less than {KEPT_MOTION}")
    if not sharpness >= KEPT_SHARPNESS:
        reasons.append(f"sharpness is {sharpness:.2f} of the base's, less than {KEPT_SHARPNESS}")
    reasons += [f"{name} worsens surely" for name in heard if table[name].worsened(level)]
    steadier = [name for name in STEADINESS if name in table and table[name].improved()]
    partial = [name for name in heard if name not in asked]
    return Verdict(not reasons, reasons, motion, sharpness, sounder, steadier, partial)


class Comparison(NamedTuple):
    """A candidate against the base."""

    table: dict[str, Paired]
    matched: dict[str, Paired]
    """Of the videos that move as much as the base's alone."""
    verdict: Verdict


def compare(base: Told, tuned: Told, prompts: Sequence[int], taught: Sequence[str] = ()) -> Comparison:
    """Every judge, raw and motion-matched, and the verdict, for which those in `taught` do not count.

    Raises:
        ValueError: the two lists are not of the same videos.
    """
    if not len(base) == len(tuned) == len(prompts) or not base:
        raise ValueError(f"videos must come in pairs, got {len(base)} and {len(tuned)} of {len(prompts)} prompts")
    names, rows = [name for name in base[0] if name in tuned[0]], motion_matched(base, tuned)
    table = {name: paired(base, tuned, prompts, name) for name in names}
    matched = {name: paired(base, tuned, prompts, name, rows) for name in names}
    return Comparison(table, matched, verdict(table, matched, taught))
