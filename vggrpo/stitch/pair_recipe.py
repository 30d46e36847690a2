"""All that decides the latent geometry model of a pretrained pair, a Wan's VAE and a geometry model, such as
`launch/recipes/stitch/wan21_vggt.yaml`. The recipe of the embedded stack, whose truth is known, is `recipe.py`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from geometry.distil import DistilConfig
from geometry.latent import TimeMode
from geometry.refine import RefineConfig
from vggrpo.config import LaunchConfig
from vggrpo.data import DataConfig
from vggrpo.recipe import read_recipe
from vggrpo.stitch.recipe import SamplingRecipe, StitchRecipe

MAY_CHANGE = ("out", "asset", "launch", "checkpoint_every", "at_once")
"""Fields in which a resumed run may differ from what it was started with."""


@dataclass(frozen=True)
class ClipsRecipe:
    """What both models look at; nothing in it is annotated."""

    videos: str | None = None
    """Folder of videos, which need no captions; None is none."""
    num_videos: int = 400
    """At most so many of them, by name."""
    every: int = 1
    """Take one in so many of a video's frames."""
    sampling: SamplingRecipe = field(default_factory=SamplingRecipe)
    """And videos that the Wan itself draws: what the model will be asked about in training."""
    frames: int = 81
    """4 n + 1."""
    height: int = 480
    """A video is scaled until it covers height x width, and its middle is kept."""
    width: int = 832
    """See `height`."""
    ranking: int = 16
    """Clips, spread over all, that layers are ranked and the curve is measured on, and that nothing is fitted on."""
    held_out: int = 16
    """Clips that the report's numbers come from, and nothing else."""

    def __post_init__(self) -> None:
        self.how()
        if self.frames < 5:
            raise ValueError(f"one frame has no motion: frames must be >= 5, got {self.frames}")
        if min(self.ranking, self.held_out) < 1:
            raise ValueError(f"ranking and held_out must be >= 1, got {self.ranking} and {self.held_out}")
        if self.videos is None and self.sampling.num_samples == 0:
            raise ValueError("there is nothing to stitch on: give videos, or sampling.num_samples, or both")

    def how(self) -> DataConfig:
        """How a video is read."""
        T, H, W = self.frames, self.height, self.width
        return DataConfig(videos="", num_clips=self.num_videos, every=self.every, frames=T, height=H, width=W)


@dataclass(frozen=True)
class PairRecipe:
    """All of a pair's latent geometry model."""

    clips: ClipsRecipe
    """What it is fitted, chosen, trained and measured on."""
    wan: str
    """Wan folder in diffusers layout: its VAE, and the rest of it where samples are wanted."""
    geometry: str
    """The teacher, whose tail becomes the model's: family:weights, as in `geometry_model`, or the embedded one's
    folder."""
    out: str = "runs/stitch"
    """Folder of the clips, the closed forms and the checkpoint."""
    asset: str = "runs/lgm"
    """Folder that the finished model is written to."""
    seed: int = 0
    """Of every random stream."""
    mode: TimeMode = "frames"
    """Of time; see `geometry/latent.py`. "latent" has 4 times fewer tokens."""
    kernel: list[int] | None = None
    """Of the connector: time, rows, columns; odd. By default 5 x 3 x 3 over video frames, 3 x 3 x 3 over latents."""
    stride: int | None = None
    """Latents per token side; by default what keeps tokens about as large as in the teacher: 2 for a VAE that is 8
    times smaller and patches of 14 or 16, 1 for one that is 16 times smaller."""
    points: list[int] | None = None
    """Which of the geometry model's stitch points to try, counted from 0; all by default. Early ones win (VIST3A)."""
    at_once: int = 4
    """Stitch points in one pass over the clips: their tokens of one clip are held together."""
    ridge: float = 1e-4
    """Of the closed form, in units of the latents' mean variance."""
    refine: RefineConfig = field(default_factory=lambda: RefineConfig(steps=0, warmup=0))
    """What is added to the best one's convolution before it is distilled; 0 steps add nothing."""
    distil: DistilConfig = field(default_factory=DistilConfig)
    """Of the best one."""
    batch: int = 12
    """Clips of a step, over all processes, one after the other on each."""
    lengths: list[int] = field(default_factory=list)
    """Numbers of frames, 4 n + 1, one of which is drawn for each step: a clip's first frames are its first latents. By
    default whole clips."""
    average: float = 0.98
    """Decay of the weights' running average, which is what is measured and kept."""
    bf16: bool = False
    """bfloat16 autocast of both models, and the Wan's transformer in bfloat16 where it draws samples."""
    recompute: bool = False
    """Recompute the tail's blocks in the backward pass: less memory, more time."""
    checkpoint_every: int = 100
    """Steps between checkpoints, each with a point of the curve."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """What the launch must turn out to be: one process, or several that share clips (ddp, multi_node)."""

    def __post_init__(self) -> None:
        for name in ("batch", "at_once", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0 <= self.average < 1 or self.ridge < 0:
            raise ValueError("average must be in [0, 1) and ridge >= 0")
        if self.kernel is not None and (len(self.kernel) != 3 or any(k % 2 == 0 for k in self.kernel)):
            raise ValueError(f"kernel must be three odd numbers (time, rows, columns), got {self.kernel}")
        if self.stride is not None and self.stride < 1:
            raise ValueError(f"stride must be >= 1, got {self.stride}")
        if self.points is not None and not self.points:
            raise ValueError("points must name at least one, or be left out for all")
        for frames in self.lengths:
            if frames % 4 != 1 or not 5 <= frames <= self.clips.frames:
                raise ValueError(f"lengths must be 4 n + 1, from 5 to the clips' {self.clips.frames}, got {frames}")
        if self.launch.engine not in (None, "single", "ddp"):
            raise ValueError(
                f"stitching is shared by clips, and launch.engine is {self.launch.engine}: use --accelerate ddp or "
                "multi_node"
            )


def read_stitch_recipe(path: str, overrides: Sequence[str]) -> StitchRecipe | PairRecipe:
    """The recipe of a pretrained pair, which has a section `clips`, or of the embedded stack, which has none.

    Raises:
        ValueError: as `read_recipe`.
    """
    try:
        known: Any = yaml.safe_load(Path(path).read_text()) if Path(path).is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError):
        known = {}  # `read_recipe` says it
    pair = (isinstance(known, dict) and "clips" in known) or any(one.startswith("clips.") for one in overrides)
    if pair and isinstance(known, dict):
        told = set(known) | {one.partition("=")[0].split(".")[0] for one in overrides}
        for name in ("wan", "geometry", "clips"):
            if name not in told:
                raise ValueError(f"{path}: the recipe of a pair needs {name}")
    return read_recipe(PairRecipe, path, overrides) if pair else read_recipe(StitchRecipe, path, overrides)
