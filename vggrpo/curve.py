"""`vggrpo evaluate --run`: the checkpoints of a run on held-out prompts: does what the judges say follow the reward?

out/curve.json   differences from the start, by iteration, with their intervals; curve.png shows them
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from vggrpo.bootstrap.assets import save_json, sha256
from vggrpo.build import trainable_times
from vggrpo.checkpoint import MANIFEST, restore_weights
from vggrpo.config import Recipe
from vggrpo.evaluate.compare import CONSISTENCY, LEVEL, STEADINESS, Comparison, compare
from vggrpo.evaluate.panel import load_panel
from vggrpo.evaluate.value import Value
from vggrpo.evaluation import Judging, as_json, judged_videos, load_decoder, taught_judges
from vggrpo.recipe import load_recipe
from vggrpo.sample import Models, load_models

PLOTTED = (
    "sampson/stride_1", "sampson/stride_4", "jitter", "referee/path_jerk", "referee/reprojection", "travel",
)  # fmt: skip
"""Judges in the picture, beside the rewards."""
SMOOTHED = 16
"""Iterations of training that one point of the picture is the mean of."""


@dataclass(frozen=True, kw_only=True)
class CurveConfig(Judging):
    """Which run, and how its checkpoints are judged."""

    run: str
    """Folder of a training run, of which enough checkpoints were kept (`keep` in its recipe)."""
    num_prompts: int | None = 6
    """The first so many; three seconds of one CPU core for each of them and each checkpoint."""


def checkpoints(folder: Path) -> dict[int, Path]:
    """The weights of every checkpoint of a run, by iteration, compared with their manifests.

    Raises:
        ValueError: no run there, none of a video, no checkpoint, or one that is damaged.
    """
    if not (folder / "recipe.yaml").is_file():
        raise ValueError(f"{folder} has no recipe.yaml: it is not the folder of a run")
    found = {}
    for step in sorted((folder / "checkpoints").glob("step-*")):
        if not (step / MANIFEST).is_file():
            continue
        weights = step / "weights.safetensors"
        digests = json.loads((step / MANIFEST).read_text())
        if not weights.is_file() or digests.get(weights.name) != sha256(weights):
            raise ValueError(f"{weights} is not what its manifest says: delete {step}, or restore it")
        found[int(step.name.removeprefix("step-"))] = weights
    if not found:
        raise ValueError(f"{folder} has no checkpoint: train it first, and `keep` several")
    return found


def evaluate_run(cfg: CurveConfig, say: Callable[[str], None]) -> str:
    """Judge every checkpoint against the start, write and draw; the last lines of a report come back.

    Raises:
        ValueError: from loading and reading.
    """
    cfg.check()
    folder, out, prompts = Path(cfg.run), Path(cfg.out), cfg.chosen_prompts()
    steps = checkpoints(folder)
    recipe = load_recipe(str(folder / "recipe.yaml"), [])
    if recipe.video is None:
        raise ValueError(f"{folder} is no run of a video model: judges look at videos")
    how = cfg.how(recipe.video.model)
    panel, vae = load_panel(cfg.referee, cfg.fov, sfm=cfg.sfm), load_decoder(how.model, cfg.device)
    models = load_models(how, prompts)

    def told(tuned: Models, name: str) -> list[dict[str, Value]]:
        videos = []
        for one in judged_videos(tuned, vae, prompts, how, cfg.num_seeds, panel):
            videos.append(one.told)
            say(f"{name}: {len(videos)} of {len(prompts) * cfg.num_seeds} videos")
        return videos

    of = [number for _ in range(cfg.num_seeds) for number in range(len(prompts))]
    base = told(models, "the start")
    found = {}
    for step, weights in steps.items():
        tuned = told(_with_weights(models, weights, recipe, cfg.device), f"iteration {step}")
        found[step] = compare(base, tuned, of, taught_judges(cfg.run))
    out.mkdir(parents=True, exist_ok=True)
    warned = parting(found)
    save_json(
        out / "curve.json",
        {
            "config": asdict(cfg),
            "warning": warned,
            "iterations": {str(step): as_json(one) for step, one in found.items()},
        },
    )
    draw_curve(out / "curve.png", found, _proxy(folder))
    lines = [f"iterations {', '.join(map(str, found))}: {out / 'curve.png'}, {out / 'curve.json'}"]
    return "\n".join([*lines, f"warning: {warned}" if warned else "rewards and judges do not part"])


def parting(found: dict[int, Comparison]) -> str | None:
    """Where a reward has surely risen and a judge of geometry or of the path has surely got worse, if anywhere."""
    for step, one in found.items():
        risen = [name for name, row in one.table.items() if name.startswith("reward/") and row.pairs and row.low > 0]
        judges = [name for name in one.table if name.startswith(CONSISTENCY + STEADINESS)]
        worse = [name for name in judges if one.table[name].worsened(LEVEL / len(judges))]
        if risen and worse:
            return f"at iteration {step} {', '.join(risen)} has risen and {', '.join(worse)} has got worse: they part"
    return None


def draw_curve(path: Path, found: dict[int, Comparison], proxy: dict[str, list[tuple[int, float]]]) -> None:
    """Rewards in training and on held-out prompts; judges in per cent of the start, with 95 % bands."""
    from matplotlib.figure import Figure

    first = next(iter(found.values())).table
    rewards = [name for name in first if name.startswith("reward/")]
    judges = [name for name in PLOTTED if name in first and any(one.table[name].pairs for one in found.values())]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, name in enumerate(rewards):
        color = f"C{number}"
        short = name.removeprefix("reward/")
        if short in proxy:
            steps, means = running(proxy[short])
            left.plot(steps, [mean - means[0] for mean in means], color=color, alpha=0.4)
        _band(left, found, name, color, short, relative=False)
    for number, name in enumerate(judges):
        _band(right, found, name, f"C{number}", name, relative=True)
    left.set(title=f"rewards, less the start (pale: in training, mean of {SMOOTHED})", xlabel="iteration")
    right.set(title="judges, % of the start (lower is better; travel: 0 is kept)", xlabel="iteration")
    for axes in (left, right):
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def running(points: list[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Means over `SMOOTHED` iterations, each at the middle of its own: a batch is of few prompts, and those differ."""
    width = min(SMOOTHED, len(points))
    spans = [points[start : start + width] for start in range(len(points) - width + 1)]
    return [sum(x for x, _ in span) / width for span in spans], [sum(y for _, y in span) / width for span in spans]


def _band(axes: Any, found: dict[int, Comparison], name: str, color: str, label: str, *, relative: bool) -> None:
    rows = [(step, one.table[name]) for step, one in found.items() if one.table[name].pairs]
    if not rows:
        return
    scales = [100 / abs(row.base) if relative and row.base else 1.0 for _, row in rows]
    x = [0, *(step for step, _ in rows)]
    middle, low, high = (
        [0.0, *(scale * getattr(row, key) for (_, row), scale in zip(rows, scales, strict=True))]
        for key in ("difference", "low", "high")
    )
    axes.plot(x, middle, "o-", color=color, markersize=3, label=label)
    axes.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)


def _with_weights(models: Models, weights: Path, recipe: Recipe, device: str) -> Models:
    from vggrpo.policy.wan_folder import adapt, load_velocity

    video = recipe.video
    assert video is not None
    network = load_velocity(Path(video.model))
    adapt(network, video.lora, video.lora_on, trainable_times(recipe.sampling), 1)
    network = network.to(device)
    restore_weights(network, load_file(weights))
    return models._replace(network=network.requires_grad_(False).eval())


def _proxy(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Mean rewards of the training's own batches, by name: [(iteration, value)]."""
    path, found = folder / "metrics.jsonl", dict[str, list[tuple[int, float]]]()
    for line in path.read_text().splitlines() if path.is_file() else []:
        numbers = json.loads(line)
        for key, value in numbers.items():
            if key.startswith("reward/") and key.endswith("/mean") and value is not None:
                found.setdefault(key.split("/")[1], []).append((int(numbers["step"]), float(value)))
    return found
