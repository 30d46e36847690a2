"""Which floor keeps `motion_smoothness` meaningful on estimated poses? A table and assets/pictures/motion_floor.png.

    python -m benchmarks.motion_floor        # about a minute on one core

Poses of the world are given the noise of an estimator, and the reward of the noisy poses is compared with the truth:
    shake   rank correlation with the true amount of hand-held shake, over 6 versions of one clip that differ in nothing
            else (what a group of GRPO compares); mean over clips
    calm    rank correlation over unshaken clips with the paper's reward of the true poses
    slow    what a camera gains by doing the same path at half the speed, true poses; > 0 pulls towards standing still
"""

from dataclasses import replace
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor

from geometry import Geometry
from geometry.cameras import rigid, so3_exp, so3_log
from geometry.world import make_clips
from rewards import motion_smoothness

FLOORS = (0.0, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25)
NOISES = {"0.05 deg, 0.001": (0.05, 0.001), "0.15 deg, 0.003": (0.15, 0.003), "0.3 deg, 0.006": (0.3, 0.006)}
SHAKES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
SEEDS = range(70_000, 70_192)
DEFAULT = 0.06


def scenes(jitter: float) -> Geometry:
    """Poses and a coarse depth of the benchmark's clips."""
    return make_clips(SEEDS, size=(12, 12), supersample=1, jitter=jitter).geometry


def estimated(scene: Geometry, degrees: float, depths: float, generator: torch.Generator) -> Geometry:
    """The same clips with independent noise on every pose: `degrees` per axis, `depths` median depths per axis."""
    shape = scene.c2w.shape[:2]
    unit = scene.depth.flatten(1).median(dim=1).values[:, None, None]
    turn = torch.randn(*shape, 3, generator=generator) * torch.pi / 180 * degrees
    move = torch.randn(*shape, 3, generator=generator) * unit * depths
    return replace(scene, c2w=scene.c2w @ rigid(so3_exp(turn), move))


def slowed(scene: Geometry) -> Geometry:
    """Half the motion: half the way from frame 0, half the turn."""
    turn = so3_exp(0.5 * so3_log(scene.c2w[..., :3, :3]))
    return replace(scene, c2w=rigid(turn, 0.5 * scene.c2w[..., :3, 3]))


def measure() -> tuple[dict[str, list[float]], dict[str, list[float]], list[float]]:
    """(shake, calm) for each noise and the slow gain, one number a floor."""
    shaken = [scenes(jitter) for jitter in SHAKES]
    calm = shaken[0]
    moving = calm.c2w[:, -1, :3].sub(torch.eye(4)[:3]).flatten(1).norm(dim=1) > 0
    truth = motion_smoothness(calm, floor=0.0)
    shake: dict[str, list[float]] = {name: [] for name in NOISES}
    true: dict[str, list[float]] = {name: [] for name in NOISES}
    for name, noise in NOISES.items():
        generator = torch.Generator().manual_seed(0)
        noisy = [estimated(scene, *noise, generator) for scene in shaken]
        for floor in FLOORS:
            rewards = torch.stack([motion_smoothness(scene, floor=floor) for scene in noisy], dim=1)
            each = [_rank(-torch.tensor(SHAKES), group) for group in rewards]
            shake[name].append(sum(each) / len(each))
            true[name].append(_rank(truth, rewards[:, 0]))
    gain = [
        float((motion_smoothness(slowed(calm), floor=f) - motion_smoothness(calm, floor=f))[moving].mean())
        for f in FLOORS
    ]
    return shake, true, gain


def _rank(a: Tensor, b: Tensor) -> float:
    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def main() -> None:
    shake, true, gain = measure()
    print(f"{len(SEEDS)} clips; pose noise per axis in degrees and median depths; rank correlations")
    print("floor".ljust(28), *(f"{f:7g}" for f in FLOORS))
    for title, rows in (("shake", shake), ("calm", true), ("slow", {"true poses": gain})):
        for name, row in rows.items():
            print(f"{title:6} {name:21}", *(f"{value:7.3f}" for value in row))
    _draw(shake, true, gain)


def _draw(shake: dict[str, list[float]], true: dict[str, list[float]], gain: list[float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    titles = ("ranks shake within one clip", "ranks calm clips like the truth", "gain from half the speed")
    for axis, title, rows in zip(axes, titles, (shake, true, {"true poses": gain}), strict=True):
        for name, row in rows.items():
            axis.plot([max(f, 5e-4) for f in FLOORS], row, marker="o", label=name)
        axis.axvline(DEFAULT, color="grey", linestyle="--", label=f"default {DEFAULT:g}")
        axis.axhline(0, color="black", linewidth=0.5)
        axis.set(xscale="log", title=title, xlabel="floor (rad, median depths); left end: 0, the paper's")
        axis.legend(fontsize=8)
    axes[0].set_ylabel("Spearman")
    axes[2].set_ylabel("reward")
    path = Path(__file__).parent.parent / "assets" / "pictures" / "motion_floor.png"
    figure.savefig(path, dpi=90)
    print(f"drawn: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


if __name__ == "__main__":
    main()
