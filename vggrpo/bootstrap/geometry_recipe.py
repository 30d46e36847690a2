"""All that decides the geometry model's training, read from `launch/recipes/bootstrap/geometry.yaml`."""

from dataclasses import dataclass, field

from geometry.models.tiny import TinyConfig

MAY_CHANGE = ("out", "asset", "notes", "num_steps", "device", "checkpoint_every")
"""Fields in which a resumed run may differ from what it was started with."""


@dataclass(frozen=True)
class Batch:
    """Windows that one step sees."""

    until: float
    """Share of the steps up to which batches are of this kind."""
    clips: int
    """Clips in a batch."""
    frames: int
    """Neighbouring frames of each."""


@dataclass(frozen=True)
class GeometryRecipe:
    """All of a geometry model's training."""

    out: str = "runs/bootstrap/geometry"
    """Folder of the checkpoint and of the rendered clips."""
    asset: str = "assets/tiny-geometry"
    """Folder that the finished model is written to, with its card."""
    notes: str | None = None
    """Markdown that ends the model's card: what people have found out that no command measures."""
    start: str | None = None
    """Folder of a geometry model to start from; what its file lacks, and without one everything, starts untrained."""
    frozen: list[str] = field(default_factory=list)
    """Parts that keep the weights that they start with, as `encoder`: what is stitched to its tokens stays true."""
    seed: int = 0
    """Of every random stream."""
    model: TinyConfig = field(default_factory=TinyConfig)
    """Widths and depths of the network."""
    num_clips: int = 1200
    """Training clips; half of them have moving bodies."""
    first_clip: int = 1_000_000
    """Their first seed."""
    num_steps: int = 2400
    """Optimiser steps. A run can be resumed with another number: learning rate and batches go by the share done."""
    batches: list[Batch] = field(default_factory=lambda: [Batch(0.65, 5, 3), Batch(1.0, 2, 8)])
    """Many scenes of few frames first (depth is learnt from scenes), then longer windows."""
    without_focal: float = 0.2
    """Share of the steps in which the focal length is not given but estimated."""
    lr: float = 1.5e-3
    """Highest learning rate of AdamW (betas .9, .95)."""
    warmup: int = 50
    """Steps over which the learning rate rises."""
    hold: float = 0.3
    """Share of the steps after which it falls, as a cosine."""
    weight_decay: float = 0.02
    """Of AdamW."""
    average: float = 0.995
    """Decay of the weights' running average, which is what is evaluated and shipped."""
    max_grad_norm: float = 1.0
    """Longer gradients are shortened to it."""
    device: str = "cpu"
    """Or cuda."""
    checkpoint_every: int = 250
    """Steps between checkpoints, each with a point of the curve."""

    def __post_init__(self) -> None:
        for name in ("num_clips", "num_steps", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0 <= self.without_focal <= 1 or not 0 <= self.average < 1 or not 0 <= self.hold < 1:
            raise ValueError("without_focal must be in [0, 1], average and hold in [0, 1)")
        shares = [batch.until for batch in self.batches]
        if not shares or shares != sorted(shares) or shares[-1] != 1:
            raise ValueError(f"batches must have rising `until` that ends with 1.0, got {shares}")
        if any(not 2 <= batch.frames <= 17 or batch.clips < 1 for batch in self.batches):
            raise ValueError("batches must have 2 to 17 frames and at least one clip")
