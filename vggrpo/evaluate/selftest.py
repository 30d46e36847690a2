"""Do the judges see what is wrong? They are asked about the world's perturbation catalogue, whose truth is known.

A clip is judged as it is and spoilt by each fault at several magnitudes. A judge sees a fault if it ranks these
versions by magnitude: Spearman's correlation within a clip, mean over clips, of at least `BAR` in size. Below it is
listed as blind to the fault. `EXPECTED` is what must be seen, and in which direction; anything else is reported and
not demanded.
"""

import json
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float
from torch import Tensor

from geometry.world import PERTURBATIONS, Clip, Motion, make_clip
from vggrpo.evaluate.panel import ask, load_panel
from vggrpo.evaluate.sfm import START_FOV
from vggrpo.evaluate.value import Value

BAR = 0.6
"""Least |Spearman|. Numbers that know nothing reach it, of four versions of three clips, in one case of eleven, and
with the right sign in one of twenty-two."""
LEVELS = (1, 2, 3)
"""Which of a fault's five magnitudes are tried, beside none."""
MOTIONS: tuple[Motion, ...] = ("orbit", "truck", "dolly_in", "arc")
"""Clips take them in turn; all of them travel, so that no judge is excused."""
EXPECTED: dict[str, tuple[str, ...]] = {
    "frozen": ("-displacement", "-travel"),
    "pose_jitter": ("jitter", "referee/path_jerk"),
    "local_warp": ("sampson/stride_1", "sampson/stride_4", "-inliers/stride_1", "-survival", "referee/reprojection"),
    "slow_drift": ("sampson/stride_4",),
    "blur": ("-sharpness",),
    "identity_change": ("flicker", "referee/reprojection"),
    "shuffled_frames": ("-survival", "referee/reprojection"),
}
"""Judges that must rise, or with "-" fall, with a fault; a name that was not asked (no referee) is not missed.

Survival sees a body change in most clips, and not where that body has few of the first frame's corners."""


@dataclass(frozen=True, kw_only=True)
class SelfTestConfig:
    """What the judges are tried on."""

    clips: int = 3
    """Of the world; with the whole catalogue, 28 videos for each."""
    seed: int | None = None
    """Of the first clip; drawn and printed by default."""
    size: int = 64
    """Pixels; from 256 on SIFT and structure from motion are tried, too, and minutes become hours."""
    referee: str | None = "assets/tiny-referee"
    """Folder of the referee; None does without."""
    out: str | None = None
    """Folder for self_test.md and self_test.json."""

    def check(self) -> None:
        """Raises ValueError for what cannot be."""
        if self.clips < 1 or self.size < 32:
            raise ValueError(f"clips must be >= 1 and size >= 32, got {self.clips} and {self.size}")


NOTE = (
    f"Spearman's correlation with the magnitude, mean over clips; below {BAR} in size a judge is blind to the fault. "
    "Positive: the judge's number rises with the fault. N/A: share of spoilt versions without a number."
)
Answers = dict[str, Value]
Asked = Callable[[Float[Tensor, "T 3 H W"], str], Answers]
"""Video and prompt to verdicts."""


@dataclass(frozen=True)
class Version:
    """One version of one clip, and what was said of it."""

    clip: int
    fault: str
    """Empty for the clip as it is."""
    magnitude: float
    told: Answers


@dataclass(frozen=True)
class Sight:
    """One judge's view of one fault."""

    spearman: float
    """With the magnitude, mean over the clips that allow it; NaN if none does."""
    absent: float
    """Share of the spoilt versions that the judge had no number for."""

    def blind(self) -> bool:
        """Whether the magnitude cannot be told from what the judge says."""
        return not abs(self.spearman) >= BAR


def examine(asked: Asked, clips: Sequence[Clip], faults: Sequence[str], say: Callable[[str], None]) -> list[Version]:
    """Have every version of every clip judged."""
    found, total = [], len(clips) * (1 + len(LEVELS) * len(faults))
    for number, clip in enumerate(clips):
        prompt = clip.caption if isinstance(clip.caption, str) else clip.caption[0]
        found.append(Version(number, "", 0.0, asked(clip.video, prompt)))
        for name in faults:
            fault = PERTURBATIONS[name]
            for magnitude in (fault.magnitudes[level] for level in LEVELS):
                told = asked(fault.apply(clip, magnitude, number).video, prompt)
                found.append(Version(number, name, magnitude, told))
                say(f"{len(found)} of {total} versions judged")
    return found


def self_test(cfg: SelfTestConfig, say: Callable[[str], None]) -> tuple[str, list[str]]:
    """The whole catalogue: a table, and what was missed.

    Raises:
        ValueError: a config that cannot be; a referee that is not what its card says.
    """
    cfg.check()
    seed = 60_000_000 + secrets.randbelow(10**6) if cfg.seed is None else cfg.seed
    panel = load_panel(cfg.referee, START_FOV)
    faults = [name for name in PERTURBATIONS if name != "depth_flicker"]  # which no pixel shows
    versions = examine(partial(ask, panel), draw_clips(seed, cfg.clips, size=cfg.size), faults, say)
    found = sights(versions)
    wrong = missed(found)
    verdict = "\n".join(f"- MISSED: {line}" for line in wrong) if wrong else "Every fault is seen by those who must."
    title = f"# Judges on {cfg.clips} clips of {cfg.size} x {cfg.size}, seeds from {seed}"
    text = "\n\n".join([title, verdict, table(found), NOTE]) + "\n"
    if cfg.out is not None:
        folder = Path(cfg.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "self_test.md").write_text(text)
        rows = {
            name: {
                fault: {"spearman": None if math.isnan(x.spearman) else x.spearman, "absent": x.absent}
                for fault, x in row.items()
            }
            for name, row in found.items()
        }
        content = {"config": asdict(cfg) | {"seed": seed}, "missed": wrong, "judges": rows}
        (folder / "self_test.json").write_text(json.dumps(content, indent=2) + "\n")
    return text, wrong


def draw_clips(seed: int, count: int, frames: int = 17, size: int = 64) -> list[Clip]:
    """Travelling cameras in a world that stands still; at 256 pixels and more with a texture that SIFT can hold."""
    fine = 0.25 if size >= 256 else 1.0
    samples = 1 if size >= 256 else 2
    return [
        make_clip(
            seed + k,
            motion=MOTIONS[k % len(MOTIONS)],
            frames=frames,
            size=(size, size),
            texture_scale=fine,
            supersample=samples,
        )
        for k in range(count)
    ]


def sights(versions: Sequence[Version]) -> dict[str, dict[str, Sight]]:
    """By judge, then by fault."""
    judges = list(versions[0].told)
    faults = list(dict.fromkeys(version.fault for version in versions if version.fault))
    return {name: {fault: _sight(versions, name, fault) for fault in faults} for name in judges}


def missed(found: Mapping[str, Mapping[str, Sight]]) -> list[str]:
    """What was expected to be seen and was not, one sentence each."""
    wrong = []
    for fault, names in EXPECTED.items():
        for signed in names:
            name, sign = signed.removeprefix("-"), -1 if signed.startswith("-") else 1
            if name not in found or fault not in found[name]:
                continue
            seen = found[name][fault]
            if not sign * seen.spearman >= BAR:
                way = "fall" if sign < 0 else "rise"
                wrong.append(f"{name} must {way} with {fault}, and its rank correlation is {seen.spearman:+.2f}")
    return wrong


def table(found: Mapping[str, Mapping[str, Sight]]) -> str:
    """Judge by fault, Markdown: the correlation, "blind" below the bar, N/A where most versions have no number."""
    faults = list(next(iter(found.values())))
    head = " | ".join(fault.replace("_", " ") for fault in faults)
    lines = [f"| judge | {head} |", "|---|" + "---|" * len(faults)]
    for name, row in found.items():
        lines.append(f"| {name} | " + " | ".join(_cell(row[fault]) for fault in faults) + " |")
    return "\n".join(lines)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; 0 if one of them is constant, for then nothing can be told from it."""
    x, y = (_ranks(np.asarray(values, float)) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / size if size > 0 else 0.0


def _sight(versions: Sequence[Version], name: str, fault: str) -> Sight:
    correlations, absent, spoilt = [], 0, 0
    for clip in dict.fromkeys(version.clip for version in versions):
        mine = [v for v in versions if v.clip == clip and v.fault in ("", fault)]
        numbers = [(v.magnitude, v.told[name].value) for v in mine]
        judged = [(x, y) for x, y in numbers if math.isfinite(y)]
        spoilt += len(mine) - 1
        absent += sum(not math.isfinite(v.told[name].value) for v in mine if v.fault)
        if len(judged) >= 3:
            correlations.append(spearman(*zip(*judged, strict=True)))
    return Sight(float(np.mean(correlations)) if correlations else math.nan, absent / max(spoilt, 1))


def _cell(seen: Sight) -> str:
    if math.isnan(seen.spearman):
        return "N/A"
    shown = f"blind ({seen.spearman:+.2f})" if seen.blind() else f"{seen.spearman:+.2f}"
    return f"{shown}, {seen.absent:.0%} N/A" if seen.absent else shown


def _ranks(values: np.ndarray) -> np.ndarray:
    """Equals share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: np.ndarray = (last - (counts - 1) / 2)[inverse]
    return ranks
