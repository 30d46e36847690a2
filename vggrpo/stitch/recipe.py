"""All that decides a latent geometry model, read from `launch/recipes/stitch/tiny.yaml`."""

from dataclasses import dataclass, field
from typing import Literal

from geometry.distil import DistilConfig
from geometry.latent import TimeMode
from geometry.refine import RefineConfig
from vggrpo.bootstrap.geometry_recipe import Batch

MAY_CHANGE = ("out", "asset", "notes", "checkpoint_every", "fidelity_clips", "noise_clips")
"""Fields in which a resumed run may differ from what it was started with."""


@dataclass(frozen=True)
class SamplingRecipe:
    """How the generator draws what the latent geometry model is calibrated on."""

    num_samples: int = 0
    """Videos from the generator, beside the clips of the world. 0 needs no generator."""
    prompts: str = "assets/prompts/train.txt"
    """One on each line; they are taken in turn, over and over."""
    first_seed: int = 35_000_000
    """Of the first video's noise."""
    num_steps: int = 20
    """From noise to data."""
    shift: float | None = None
    """Of the time grid; by default the model's own."""
    guidance_scale: float = 3.0
    """Classifier-free guidance; 1 is none."""
    max_len: int = 96
    """Tokens of a prompt."""

    def __post_init__(self) -> None:
        if self.num_samples < 0 or self.num_steps < 1 or self.max_len < 2:
            raise ValueError("num_samples must be >= 0, num_steps >= 1 and max_len >= 2")


@dataclass(frozen=True)
class ConnectorRecipe:
    """One way to build a connector."""

    mode: TimeMode = "frames"
    """Of time; see `geometry/latent.py`."""
    kernel: list[int] | None = None
    """Time, rows, columns; odd. By default 5 x 3 x 3 over video frames and 3 x 3 x 3 over latent frames."""

    def __post_init__(self) -> None:
        if self.kernel is not None and len(self.kernel) != 3:
            raise ValueError(f"kernel must be three odd numbers (time, rows, columns), got {self.kernel}")


@dataclass(frozen=True)
class StitchRecipe:
    """All of a latent geometry model."""

    out: str = "runs/stitch"
    """Folder of the clips, the closed forms and the checkpoints."""
    asset: str = "assets/tiny-lgm"
    """Folder that the finished model is written to, with its report."""
    geometry: str = "assets/tiny-geometry"
    """The teacher, whose tail becomes the model's."""
    wan: str = "assets/tiny-wan"
    """Wan folder in diffusers layout: its VAE, and its text stage and transformer where samples are wanted."""
    generator: str | None = None
    """Another Wan folder to draw samples with, whose VAE must be the same; by default that one."""
    notes: str | None = None
    """Markdown that ends the model's card: what people have found out that no command measures."""
    seed: int = 0
    """Of every random stream."""
    num_clips: int = 384
    """Clips of the world to fit and distil on; half of them have moving bodies."""
    first_clip: int = 30_000_000
    """Their first seed."""
    sway: float = 0.0
    """Degrees by which a third of them sway, as half of the generator's footage does; 0 for none."""
    sampling: SamplingRecipe = field(default_factory=SamplingRecipe)
    """And videos of the generator."""
    connectors: list[ConnectorRecipe] = field(
        default_factory=lambda: [ConnectorRecipe("frames"), ConnectorRecipe("phases"), ConnectorRecipe("latent")]
    )
    """Solved in closed form and ranked, at every stitch point."""
    ridge: float = 1e-4
    """Of the closed form, in units of the latents' mean variance."""
    ranking_clips: int = 24
    """Held-out clips that layers are ranked and the distillation's curve is measured on."""
    point: str | None = None
    """Where to stitch; by default where the outputs come closest to the teacher's."""
    mode: Literal["frames", "phases"] | None = None
    """Time mode to ship; by default the better one. "latent" is reported beside it, if there is a connector for it."""
    refine: RefineConfig = field(default_factory=lambda: RefineConfig(steps=0, warmup=0))
    """What is added to the closed form, of each time mode that is distilled; 0 steps add nothing."""
    refine_clips: int = 16
    """Clips of a step of it."""
    bf16: bool = False
    """Compute those steps in bfloat16: 1.8 times as fast on a CPU that has it."""
    distil: DistilConfig = field(default_factory=DistilConfig)
    """Of the model that ships."""
    latent_steps: int = 0
    """Steps of distillation for the time mode "latent", which is reported beside it; 0: closed form only."""
    batches: list[Batch] = field(default_factory=lambda: [Batch(0.6, 4, 9), Batch(1.0, 2, 17)])
    """Clips and frames of a step: the first 4 n + 1 frames of a clip are the first n + 1 latents."""
    without_focal: float = 0.5
    """Share of the steps that do not give the focal length; where the model scores samples nobody knows it."""
    average: float = 0.98
    """Decay of the weights' running average, which is what is measured and shipped."""
    checkpoint_every: int = 100
    """Steps between checkpoints, each with a point of the curve."""
    fidelity_clips: int = 4
    """Clips that are spoilt in every way of the catalogue."""
    noise_clips: int = 8
    """Clips whose latents are perturbed."""

    def __post_init__(self) -> None:
        for name in ("num_clips", "refine_clips", "ranking_clips", "checkpoint_every", "fidelity_clips", "noise_clips"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0 <= self.without_focal <= 1 or not 0 <= self.average < 1 or self.latent_steps < 0:
            raise ValueError("without_focal must be in [0, 1], average in [0, 1) and latent_steps >= 0")
        modes = [connector.mode for connector in self.connectors]
        if not {"frames", "phases"} & set(modes) or (self.mode is not None and self.mode not in modes):
            raise ValueError(
                f"connectors must have the mode that ships, {self.mode or 'frames or phases'}, got {modes}"
            )
        shares = [batch.until for batch in self.batches]
        if not shares or shares != sorted(shares) or shares[-1] != 1:
            raise ValueError(f"batches must have rising `until` that ends with 1.0, got {shares}")
        if any(batch.frames % 4 != 1 or batch.frames == 1 or batch.clips < 1 for batch in self.batches):
            raise ValueError("batches must have 4 n + 1 frames (5, 9, 13, 17) and at least one clip")
