"""Geometry and rewards of any video: through the RGB geometry model, or through the VAE and the latent one.

out/NAME.json   rewards, judges         out/NAME.png   camera path, depth, what moves, errors frame by frame
out/NAME.ply    the cloud               out/NAME.rrd   for rerun
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro
from jaxtyping import Bool, Float
from torch import Tensor

from geometry.reproject import dynamic_mask
from geometry.types import Geometry, GeometryModel
from rewards import ESTIMATED, ESTIMATED_FLOW, motion_errors, reprojection_errors
from vggrpo.data import SUFFIXES, DataConfig, read_frames, read_video

if TYPE_CHECKING:  # judges bring OpenCV and pycolmap, which rewards do without
    from vggrpo.evaluate.panel import Panel

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
SHOWN = 6
"""Frames in the strips of a plot."""
MOVING = (1.0, 0.43, 0.08)
"""Orange, in the mask of what moves."""


@dataclass(frozen=True)
class ScoreConfig:
    """What is scored, and with what."""

    videos: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Video files, folders of videos, or folders of one video's frames."""
    through: Literal["rgb", "latent"] = "rgb"
    """"rgb": the geometry model sees the frames. "latent": the latent one sees what the VAE makes of them."""
    out: str | None = None
    """Folder for what is written; without it everything is printed."""
    model: str = "assets/tiny-wan"
    """Wan folder, for its VAE."""
    geometry: str = "assets/tiny-geometry"
    """The geometry model: a folder, or family:weights (`geometry_model`)."""
    allow_import: bool = False
    """Run the code that builds a geometry model (any4d)."""
    lgm: str = "assets/tiny-lgm"
    """The latent geometry model."""
    frames: int = 17
    """4 n + 1, from a video's beginning."""
    every: int = 1
    """Take one in so many frames."""
    height: int = 64
    """A video is scaled until it covers height x width, and its middle is kept."""
    width: int = 64
    """See `height`."""
    judges: bool = False
    """Also what the judges say, which no reward knows."""
    referee: str | None = None
    """Folder of a second geometry model for them, such as assets/tiny-referee for videos of the embedded world."""
    plot: bool = False
    """Write a picture."""
    ply: bool = False
    """Write the cloud."""
    rerun: bool = False
    """Write a recording for rerun."""

    def check(self) -> None:
        """Raises ValueError for what cannot be; not when built, so that the command line can say it in one line."""
        DataConfig(videos="", frames=self.frames, every=self.every, height=self.height, width=self.width)
        if self.frames < 5:
            raise ValueError(f"one frame has no motion to score: frames must be >= 5, got {self.frames}")
        if self.through == "latent":
            from vggrpo.policy.wan import latent_shape

            latent_shape(Path(self.model), self.frames, self.height, self.width)
        if not self.videos:
            raise ValueError("name at least one video, or a folder of them")
        if self.out is None and (self.plot or self.ply or self.rerun):
            raise ValueError("plot, ply and rerun need a folder to write to: give --out")


def load_model(cfg: ScoreConfig) -> GeometryModel:
    """Video [*batch T 3 H W] to geometry, by the way that the config names.

    Raises:
        ValueError: a file that is missing or not the one that its card speaks of.
    """
    cfg.check()
    if cfg.through == "rgb":
        from vggrpo.geometry_model import load_geometry_model

        return load_geometry_model(cfg.geometry, cfg.allow_import)
    from diffusers import AutoencoderKLWan

    from vggrpo.bootstrap.vae import encode, normalise
    from vggrpo.stitch.load import load_lgm

    folder = Path(cfg.model) / "vae"
    lgm = load_lgm(cfg.lgm, cfg.geometry, folder, cfg.allow_import)  # it has compared the VAE's files
    vae = AutoencoderKLWan.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32).eval()
    return lambda video: lgm(normalise(vae, encode(vae, video)))


def found_videos(cfg: ScoreConfig) -> Iterator[tuple[str, Float[Tensor, "T 3 H W"]]]:
    """Name and frames of every video that the config means.

    Raises:
        ValueError: nothing there, or nothing that can be read.
    """
    how = DataConfig(videos="", frames=cfg.frames, every=cfg.every, height=cfg.height, width=cfg.width)
    for given in cfg.videos:
        path = Path(given)
        if path.is_dir():
            inside = sorted(path.iterdir())
            films = [one for one in inside if one.suffix.lower() in SUFFIXES]
            frames = [one for one in inside if one.suffix.lower() in PICTURES]
            if not films and not frames:
                raise ValueError(
                    f"{path} holds neither videos ({', '.join(SUFFIXES)}) nor frames ({', '.join(PICTURES)})"
                )
            for film in films:
                yield film.stem, read_video(film, how).float() / 255
            if not films:
                yield path.name, read_frames(frames, how).float() / 255
        elif path.is_file():
            yield path.stem, read_video(path, how).float() / 255
        else:
            raise ValueError(f"no video at {path}")


@torch.no_grad()
def score(
    video: Float[Tensor, "T 3 H W"], model: GeometryModel, panel: "Panel | None" = None
) -> tuple[Geometry, dict[str, Any]]:
    """Its geometry, and what is said of it; JSON has no NaN, so what cannot be scored is None, or why."""
    scene = model(video[None]).map(lambda x: x[0])
    said: dict[str, Any] = {"rewards": {name: _plain(float(fn(scene))) for name, fn in ESTIMATED.items()}}
    said["moving_pixels"] = float(dynamic_mask(scene, ESTIMATED_FLOW * float(scene.depth.median())).float().mean())
    if panel is not None:
        from vggrpo.evaluate.panel import ask

        said["judges"] = {name: x.reason or _plain(x.value) for name, x in ask(panel, video).items()}
    return scene, said


def write(cfg: ScoreConfig, name: str, video: Float[Tensor, "T 3 H W"], scene: Geometry, said: dict[str, Any]) -> None:
    """All files that the config asks for."""
    from geometry.export import save_ply, save_rerun

    folder = Path(cfg.out or ".")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(said, indent=2) + "\n")
    if cfg.ply:
        save_ply(folder / f"{name}.ply", scene, video)
    if cfg.rerun:
        save_rerun(folder / f"{name}.rrd", scene, video)
    if cfg.plot:
        plot(folder / f"{name}.png", name, video, scene, said)


def plot(path: Path, name: str, video: Float[Tensor, "T 3 H W"], scene: Geometry, said: dict[str, Any]) -> None:
    """Frames, depth and what moves; the camera's path from above, and the errors that rewards are made of."""
    from matplotlib.figure import Figure

    T = len(video)
    at = torch.linspace(0, T - 1, min(SHOWN, T)).round().long()
    figure = Figure(figsize=(11, 8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[3, 2]).flat  # type: ignore[union-attr]
    rewards = "   ".join(f"{key} {'-' if x is None else f'{x:.3f}'}" for key, x in said["rewards"].items())
    figure.suptitle(f"{name}\n{rewards}", fontsize=10)
    unit = float(scene.depth.median())
    moving = dynamic_mask(scene, ESTIMATED_FLOW * unit)
    rows = above.subplots(3, len(at), squeeze=False)
    for column, i in enumerate(at.tolist()):
        rows[0][column].imshow(video[i].movedim(0, -1).clamp(0, 1).numpy())
        rows[0][column].set_title(f"frame {i}", fontsize=8)
        rows[1][column].imshow((unit / scene.depth[i]).clamp(0, 3).numpy(), cmap="magma", vmin=0, vmax=2.5)
        grey = 0.25 + 0.6 * video[i].mean(0, keepdim=True).clamp(0, 1).expand(3, -1, -1)
        tint = moving[i] if moving.shape[-2:] == video.shape[-2:] else _enlarged(moving[i], video)
        marked = torch.where(tint, 0.35 * grey + 0.65 * grey.new_tensor(MOVING)[:, None, None], grey)
        rows[2][column].imshow(marked.movedim(0, -1).numpy())
    for axis, words in zip(rows[:, 0], ("video", "nearness", "moves by itself"), strict=True):
        axis.set_ylabel(words, fontsize=8)
    for axis in rows.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    left, right = below.subplots(1, 2, width_ratios=[2, 3])
    centres, ahead = (scene.c2w[:, :3, 3] / unit)[:, [0, 2]], scene.c2w[:, [0, 2], 2]
    low, high = centres.amin(0), centres.amax(0)
    middle, half = (low + high) / 2, max(float((high - low).max()), 0.05)
    x, z = centres.unbind(-1)
    left.quiver(x, z, *ahead.unbind(-1), color="lightgrey", width=0.004, scale=9)
    left.plot(x, z, color="grey", linewidth=1)
    left.scatter(x, z, c=range(T), cmap="viridis", s=18, zorder=3)
    (x_low, z_low), (x_high, z_high) = (middle - 0.8 * half).tolist(), (middle + 0.8 * half).tolist()
    left.set(xlim=(x_low, x_high), ylim=(z_low, z_high), aspect="equal")
    left.set(title="camera from above, dark to bright", xlabel="right (median depths)", ylabel="forward")
    inner = range(1, T - 1)
    errors = motion_errors(scene)
    right.plot(inner, errors.translation.numpy(), label="jolt, translation")
    right.plot(inner, errors.rotation.numpy(), label="jolt, rotation")
    again = reprojection_errors(scene, dynamic_threshold=ESTIMATED_FLOW)
    right.plot(range(T), again.numpy(), label="reprojection error")
    right.set(title="errors frame by frame: 0 is a steady camera in one solid world", xlabel="frame", ylim=(0, None))
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=90)


def _enlarged(mask: Bool[Tensor, "h w"], video: Float[Tensor, "T 3 H W"]) -> Bool[Tensor, "H W"]:
    """On the video's pixels."""
    grown = torch.nn.functional.interpolate(mask[None, None].float(), video.shape[-2:], mode="nearest")
    return grown[0, 0] > 0.5


def _plain(x: float) -> float | None:
    return None if math.isnan(x) else x
