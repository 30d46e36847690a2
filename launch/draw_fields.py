"""The drawing half of fields.py: arrays in, picture out."""

import itertools
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap

Arrays = dict[str, np.ndarray]

INK, MUTED, ACCENT = "#1f2430", "#7b8494", "#d1495b"
DENSITY = LinearSegmentedColormap.from_list("density", ["#ffffff", "#d9e6f2", "#8fb8de", "#3a6ea5", "#16325c"])
TIME = LinearSegmentedColormap.from_list("time", ["#16325c", "#3a6ea5", "#a9bfd6", "#d5d9df"])
REWARD = LinearSegmentedColormap.from_list("reward", ["#3a6ea5", "#c9ccd3", "#d1495b"])


def draw(arrays: Arrays, out: Path) -> None:
    """Three rows: the flow, its samples, and what GRPO makes of it."""
    plt.rcParams.update({"font.size": 13, "axes.titlesize": 14, "text.color": INK, "axes.labelcolor": INK})
    figure, axes = plt.subplots(3, 4, figsize=(15.2, 12.2), layout="constrained")
    extent, east, times = float(arrays["extent"]), arrays["east"], arrays["times"]

    for i, panel in enumerate(axes[0]):
        density = arrays["forward_density"][i]
        show_density(panel, density, extent)
        show_arrows(panel, arrays["forward_arrows"][i], density, extent, scale=38)
        panel.set_title(f"t = {times[i]:.2g}" + {0: " (data)", 3: " (noise)"}.get(i, ""))

    show_paths(axes[1, 0], arrays["ode_paths"])
    axes[1, 0].set_title("ODE: noise (○) to data (●)")
    show_paths(axes[1, 1], arrays["sde_paths"])
    axes[1, 1].set_title("SDE: the same data, other paths")
    show_group(axes[1, 2], arrays)
    axes[1, 2].set_title("one group: red beats its mean")
    show_paths(axes[1, 3], arrays["guided_paths"])
    axes[1, 3].set_title(f"guidance, no training: reward {arrays['guided_reward']:.2f}")

    top = max(arrays["before_density"].max(), arrays["after_density"].max())
    for panel, name in zip(axes[2, [0, 2, 3]], ("before", "after", "without_kl"), strict=True):
        show_density(panel, arrays[f"{name}_density"], extent, top)
    axes[2, 0].set_title(f"before GRPO: reward {arrays['before_reward']:.2f}")
    density = arrays["added_density"]
    show_density(axes[2, 1], density, extent, 4 * density.max())
    show_arrows(axes[2, 1], arrays["added_arrows"], density, extent, scale=12, color=ACCENT)
    axes[2, 1].set_title(f"what GRPO adds, t = {arrays['added_at']:.2g}")
    axes[2, 2].set_title(f"after: reward {arrays['after_reward']:.2f}")
    axes[2, 3].set_title(f"after, without KL: reward {arrays['without_kl_reward']:.2f}")

    for panel in (*axes[1, 2:], *axes[2]):
        panel.scatter(*east, marker="*", s=190, color="white", edgecolors=ACCENT, linewidths=1.6, zorder=7)
    for panel in axes.flat:
        panel.set(xlim=(-extent, extent), ylim=(-extent, extent), xticks=[], yticks=[], aspect="equal")
        panel.spines[:].set_color("#c9ccd3")
    for row, label in zip(axes, ("forward process, learned field", "its samples", "GRPO"), strict=True):
        row[0].set_ylabel(label, fontsize=15, labelpad=10)
    figure.savefig(out, dpi=100)
    plt.close(figure)


def show_density(panel: Axes, density: np.ndarray, extent: float, top: float | None = None) -> None:
    # The power shows a mode of a tenth of the mass, too.
    values = (density / (top or density.max())) ** 0.45
    panel.imshow(
        values, origin="lower", extent=(-extent, extent) * 2, cmap=DENSITY, vmin=0, vmax=1.1, interpolation="bicubic"
    )


def show_arrows(
    panel: Axes, velocity: np.ndarray, density: np.ndarray, extent: float, scale: float, color: str = INK
) -> None:
    """[num num 2] on a lattice, faint where there is no data and the field was never learned."""
    num = len(velocity)
    centres = extent * ((np.arange(num) + 0.5) / num * 2 - 1)
    nearest = ((np.arange(num) + 0.5) / num * len(density)).astype(int)
    alpha = 0.12 + 0.78 * np.clip(density[np.ix_(nearest, nearest)] / density.max() * 20, 0, 1)
    x, y = velocity[..., 0], velocity[..., 1]
    panel.quiver(centres, centres, x, y, color=color, alpha=alpha.ravel(), scale=scale, width=0.0058)


def show_paths(panel: Axes, states: np.ndarray) -> None:
    """[S+1 n 2], light at the noise and dark at the data."""
    t = np.linspace(1, 0, len(states) - 1)
    for path in states.swapaxes(0, 1):
        panel.add_collection(LineCollection(list(itertools.pairwise(path)), array=t, cmap=TIME, linewidths=1.3))
    panel.scatter(*states[0].T, s=14, facecolors="white", edgecolors=MUTED, linewidths=0.9, zorder=3)
    panel.scatter(*states[-1].T, s=20, color="#16325c", zorder=4)


def show_group(panel: Axes, arrays: Arrays) -> None:
    """The shared steps in ink; then each member in the colour of its advantage."""
    states, (first, last) = arrays["group_paths"], arrays["group_window"].astype(int)
    advantage = (arrays["group_reward"] - arrays["group_reward"].mean()) / arrays["group_reward"].std()
    for path, score in sorted(zip(states.swapaxes(0, 1), advantage, strict=True), key=lambda pair: pair[1]):
        color = REWARD((np.clip(score, -1.5, 1.5) + 1.5) / 3)
        panel.plot(*path[first : last + 1].T, color=color, lw=1.2, alpha=0.8)
        panel.plot(*path[last:].T, color=color, lw=1.2, alpha=0.5, ls=(0, (2, 1.5)))
        panel.scatter(*path[-1], s=22, color=color, zorder=4)
    panel.plot(*states[: first + 1, 0].T, color=INK, lw=2.4, zorder=5)
    panel.scatter(*states[0, 0], s=40, facecolors="white", edgecolors=INK, linewidths=1.6, zorder=6)
