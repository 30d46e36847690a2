"""What each reward sees, and what it does not: a few clips, every way to spoil them, and the scores of both.

    python -m benchmarks.demo --out runs/rewards     # half a minute on one core

Leaves in the folder: an mp4 a fault (the true clips above, the spoilt ones and their depth below), contact_sheet.png
and scores.json.
"""

import argparse
import importlib.util
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geometry.world import PERTURBATIONS, Clip, Motion, make_clip
from rewards import DEFAULT, PAPER, REWARDS

CLIPS: tuple[tuple[int, Motion, bool], ...] = (
    (702, "orbit", False),
    (302, "dolly_in", False),
    (510, "truck", True),
    (111, "pan", True),
)
"""Seed, motion and whether something moves by itself. The camera moves in all of them."""
TRUTH = "truth"
HOW_MUCH = 3
"""Which of a fault's five magnitudes, from 0; the frozen clip is frozen all the way."""
FRAMES_PER_SECOND = 8


def versions(clips: list[Clip]) -> dict[str, list[Clip]]:
    """The clips as they are, and spoilt in every way that the catalogue knows."""
    spoilt = {
        name: [fault.apply(clip, magnitude(name), number) for number, clip in enumerate(clips)]
        for name, fault in PERTURBATIONS.items()
    }
    return {TRUTH: clips, **spoilt}


def magnitude(name: str) -> float:
    return PERTURBATIONS[name].magnitudes[4 if name == "frozen" else HOW_MUCH]


def scored(clips: list[Clip]) -> dict[str, Tensor]:
    """Each reward of each clip, `[clips]`."""
    return {name: torch.stack([reward(clip.geometry) for clip in clips]) for name, reward in REWARDS.items()}


def advantages(scores: dict[str, dict[str, Tensor]], weights: dict[str, float]) -> dict[str, float]:
    """Mean advantage of each version if the versions of a clip were a group of GRPO's: z-scores, weighted mean."""
    total = torch.zeros(len(scores), len(CLIPS))
    for name, weight in weights.items():
        reward = torch.stack([score[name] for score in scores.values()])
        spread = reward.std(dim=0)
        total += weight * torch.where(spread > 0, (reward - reward.mean(dim=0)) / spread, 0.0)
    return dict(zip(scores, (total / sum(weights.values())).mean(dim=1).tolist(), strict=True))


def verdict(score: Tensor, truth: Tensor) -> str:
    """What a reward makes of a fault, over all clips; a change below 0.005 is none."""
    change = score - truth
    if (change.abs() < 0.005).all():
        return "blind"
    if (change > -0.005).all():
        return "likes it"
    return "sees it" if (change < -0.005).all() else "in some"


def table(scores: dict[str, dict[str, Tensor]]) -> str:
    paper, shipped = advantages(scores, PAPER), advantages(scores, DEFAULT)
    heads = [name.split("_", maxsplit=1) for name in REWARDS]
    lines = [
        f"{'':41}" + "".join(f"{first:20}" for first, _ in heads) + "advantage under the",
        f"{'':41}" + "".join(f"{rest.replace('_', ' '):20}" for _, rest in heads) + "paper's  shipped set",
    ]
    for version, score in scores.items():
        much = "" if version == TRUTH else f"{magnitude(version):g} {PERTURBATIONS[version].unit}"
        row = f"{version.replace('_', ' '):16} {much:24}"
        for name in REWARDS:
            said = "" if version == TRUTH else verdict(score[name], scores[TRUTH][name])
            row += f"{float(score[name].mean()) + 0.0:6.3f}  {said:12}"
        lines.append(row + f"{paper[version]:+7.2f}  {shipped[version]:+7.2f}")
    return "\n".join(lines)


READING = f"""
How to read it. The first row is the truth, the others are its faults. A reward sees a fault if its score falls in every
clip, and is blind if nothing changes.
- Motion smoothness sees only the camera: how unsteadily it moves, not what is filmed.
- Reprojection consistency sees only the world: whether all frames agree on one solid shape. What moves by itself
  is left out.
- Both are full for a frozen video, and together they prefer it to the truth. The motion floor is there to forbid that;
  it is 0 for any camera that moves, and so has no say among clips that do.
- Colours are nobody's business here: blur and an object that changes its colours pass. Judges look at those.
The advantage is what reinforcement learning would reward if the versions of a clip were one group; mean over clips.
The scores are for exact geometry. An estimated one adds its own errors (benchmarks/motion_floor.py).
Rewards: {", ".join(REWARDS)}. Weights of the shipped set: {", ".join(f"{w:g}" for w in DEFAULT.values())}.
"""


def save_video(path: Path, frames: list[Any]) -> None:
    """PIL images as an mp4."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=FRAMES_PER_SECOND)
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
        stream.options = {"crf": "16"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def side_by_side(true: list[Clip], spoilt: list[Clip]) -> list[Any]:
    """Frames of an mp4: the true clips, the spoilt ones and their depth, in three rows."""
    from launch.pictures import depth_limits, depth_tile, sheet, tile

    frames = []
    for t in range(len(true[0].video)):
        depths = [
            depth_tile(c.geometry.depth[t], c.geometry.valid[t], depth_limits(like), 3)
            for like, c in zip(true, spoilt, strict=True)
        ]
        frames.append(sheet([[tile(c.video[t], 3) for c in true], [tile(c.video[t], 3) for c in spoilt], depths]))
    return [frame.crop((0, 0, frame.width // 2 * 2, frame.height // 2 * 2)) for frame in frames]  # yuv420p: even sides


def contact_sheet(clips: dict[str, list[Clip]], scores: dict[str, dict[str, Tensor]]) -> Any:
    """A row a version: frames of the first clip and of the last, with the last frame's depth, and the mean scores."""
    from launch.pictures import depth_limits, depth_tile, framed, label, sheet, tile

    rows = []
    for version, some in clips.items():
        row = [label(version.replace("_", " ").split(), 84)]
        for k in (0, -1):
            clip, limits = some[k], depth_limits(clips[TRUTH][k])
            last = len(clip.video) - 1
            row += [tile(clip.video[t]) for t in (0, last // 3, 2 * last // 3, last)]
            row.append(depth_tile(clip.geometry.depth[last], clip.geometry.valid[last], limits))
        said = [f"{name.replace('_', ' ')} {float(x.mean()) + 0.0:.3f}" for name, x in scores[version].items()]
        rows.append([*row, label(said, 226)])
    return framed(sheet(rows), 10)


def save_scores(path: Path, clips: list[Clip], scores: dict[str, dict[str, Tensor]]) -> None:
    """Scores of every clip as JSON; null where a clip cannot be scored."""
    about = [
        {"seed": seed, "motion": motion, "dynamic": dynamic, "caption": clip.caption}
        for (seed, motion, dynamic), clip in zip(CLIPS, clips, strict=True)
    ]
    rows: dict[str, Any] = {}
    for version, score in scores.items():
        much = {} if version == TRUTH else {"magnitude": magnitude(version), "unit": PERTURBATIONS[version].unit}
        each = {name: [None if math.isnan(x) else x for x in value.tolist()] for name, value in score.items()}
        rows[version] = {**much, "scores": each}
    path.write_text(json.dumps({"clips": about, "versions": rows}, indent=2) + "\n")


def run(out: Path) -> None:
    """The whole demo, into a folder that exists."""
    start = time.perf_counter()
    true = [make_clip(seed, motion=motion, dynamic=dynamic) for seed, motion, dynamic in CLIPS]
    clips = versions(true)
    scores = {version: scored(some) for version, some in clips.items()}
    print(table(scores) + "\n" + READING)
    for version, some in clips.items():
        save_video(out / f"{version}.mp4", side_by_side(true, some))
    contact_sheet(clips, scores).save(out / "contact_sheet.png", optimize=True)
    save_scores(out / "scores.json", true, scores)
    print(f"{len(clips)} mp4s, contact_sheet.png and scores.json are in {out} ({time.perf_counter() - start:.0f} s)")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for videos, pictures and scores")
    out = parser.parse_args(arguments).out
    for module, extra in (("av", "train"), ("matplotlib", "viz")):
        if importlib.util.find_spec(module) is None:
            sys.exit(f"demo: needs {module}, which is not installed: pip install vggrpo[{extra}]")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"demo: --out must be a folder, and {out} cannot be one: {error.strerror}")
    if not os.access(out, os.W_OK):
        sys.exit(f"demo: --out must be a folder that can be written to, and {out} cannot")
    run(out)


if __name__ == "__main__":
    main()
