"""The report's pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vggrpo.bootstrap.geometry_publish import BARS
from vggrpo.stitch.judge import RATIO_BAR, ratios
from vggrpo.stitch.noise import SHOWN

WAYS = {"latent": "latent geometry model", "decoded": "decode, then the teacher"}
SCATTERED = ("motion_smoothness", "reprojection_consistency")
NO_NOISE = 3e-4
"""Where no noise at all is drawn on a logarithmic axis."""
DISTANCE = "distance of outputs from the teacher"
SOURCES = ("latent model", "teacher", "barely trained")


def draw_all(found: dict[str, Any], curve: Sequence[dict[str, Any]], folder: Path) -> list[str]:
    """Write `made.png`, `noise.png` and `fidelity.png`; their names."""
    figures = {"made": made(found, curve), "noise": noise(found["noise"]), "fidelity": fidelity(found["fidelity"])}
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=80)
    return [f"{name}.png" for name in figures]


def made(found: dict[str, Any], curve: Sequence[dict[str, Any]]) -> Figure:
    """The ranking, the distillation, and every error in those of the teacher."""
    figure = Figure(figsize=(14, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for layer in found["ranking"]:
        block = int(layer["point"].split(".")[-1])
        name = f"{layer['mode']} {'x'.join(map(str, layer['kernel']))}, block {block}"
        left.plot(layer["r2"], layer["total"], "ox"[block % 2])
        left.annotate(
            name, (layer["r2"], layer["total"]), fontsize=7, xytext=(5, 3 - 10 * block), textcoords="offset points"
        )
    left.margins(x=0.3, y=0.15)
    left.set(title="closed forms, held out", xlabel="$R^2$ of the tokens", ylabel=DISTANCE)
    middle.plot([p["step"] for p in curve], [p["total"] for p in curve], "o-")
    middle.set(title="distillation, held out", xlabel="step", ylabel=DISTANCE, ylim=(0, None))
    numbers = found["held_out"]["all"]
    shown = [name for name in ("teacher on decoded latents", "closed form", "refined", "distilled") if name in numbers]
    width = 0.8 / len(shown)
    for shift, model in enumerate(shown):
        values = ratios(numbers[model], numbers["teacher"])
        right.bar(
            [x + width * (shift - (len(shown) - 1) / 2) for x in range(len(values))],
            list(values.values()),
            width,
            label=model,
        )
    right.axhline(1, color="black", linewidth=0.8)
    right.axhline(RATIO_BAR, color="grey", linestyle="--", linewidth=0.8, label=f"bar {RATIO_BAR}")
    right.set_xticks(range(len(BARS)), list(BARS), rotation=30, ha="right")
    right.set(title="errors to the truth, in the teacher's", ylim=(0, None))
    right.legend(fontsize=7)
    return figure


def noise(rows: dict[str, list[dict[str, float]]]) -> Figure:
    """Errors to the truth above, movement from the unperturbed output below, against the size of the noise."""
    figure = Figure(figsize=(14, 6.4), layout="constrained")
    above, below = figure.subplots(2, 4)
    words = {name: BARS[name][0] for name in SHOWN}
    moved = {
        "moved: rotation": "rotation moved, radians",
        "moved: translation": "translation moved, median depths",
        "moved: log_depth": "log depth moved",
    }
    for axes, names in ((above, words), (below, moved)):
        for axis, (name, title) in zip(axes, names.items(), strict=False):
            for way, label in WAYS.items():
                shown = rows[way] if axes is above else rows[way][1:]  # what has not moved has no logarithm
                points = [(max(row["level"], NO_NOISE), row[name]) for row in shown]
                axis.plot(*zip(*points, strict=True), "o-", label=label)
            axis.set(title=title, xscale="log", xlabel="noise / norm of the latents")
            axis.set_yscale("linear" if axes is above else "log")
    for axis in above:
        axis.set(xlabel="noise / norm of the latents; left end: none", ylim=(0, None))
    below[3].axis("off")
    below[3].legend(*above[0].get_legend_handles_labels(), loc="center")
    return figure


def fidelity(found: dict[str, Any]) -> Figure:
    """Each reward on estimated geometry against the same on the true one; a colour a fault."""
    figure = Figure(figsize=(14, 8.4), layout="constrained")
    names = list(dict.fromkeys(name for name, _ in found["versions"]))
    colors = dict(zip(names, ["black", *matplotlib.colormaps["tab10"].colors], strict=False))  # type: ignore[attr-defined]
    for row, reward in zip(figure.subplots(len(SCATTERED), len(SOURCES)), SCATTERED, strict=True):
        for axis, source in zip(row, SOURCES, strict=True):
            _scatter(axis, found, source, reward, colors)
    figure.axes[0].legend(fontsize=7, ncols=2)
    return figure


def _scatter(axis: Axes, found: dict[str, Any], source: str, reward: str, colors: dict[str, Any]) -> None:
    truth, mine = found["values"]["truth"][reward], found["values"][source][reward]
    for name, color in colors.items():
        rows = [i for i, (fault, _) in enumerate(found["versions"]) if fault == name]
        x, y = ([value for i in rows for value in values[i]] for values in (truth, mine))
        axis.scatter(x, y, s=10, color=color, alpha=0.8, label=name)
    rank = found["spearman"][source][reward]["all"]
    title = f"{reward}\n{source}: Spearman {rank:.2f}"
    axis.set(title=title, xlabel="on the true geometry", ylabel="on the model's")
    if reward == "reprojection_consistency":
        axis.set_xscale("symlog", linthresh=1e-4)
        axis.set_yscale("symlog", linthresh=1e-2)
