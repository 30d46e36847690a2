"""All that decides a video VAE's training, read from `launch/recipes/bootstrap/vae.yaml`."""

from dataclasses import dataclass
from typing import Literal

START_CLIPS = 32
"""Training clips that the linear start is solved on."""
MAY_CHANGE = ("out", "asset", "num_steps", "device", "checkpoint_every")
"""Fields in which a resumed run may differ from what it was started with."""


@dataclass(frozen=True)
class VaeRecipe:
    """All of a VAE's training."""

    out: str = "runs/bootstrap/vae"
    """Folder of the checkpoint and of the rendered clips."""
    asset: str = "assets/tiny-wan/vae"
    """Folder that the finished VAE is written to, in diffusers layout, with its card."""
    seed: int = 0
    """Of every random stream."""
    width: int = 32
    """Channels at half the size; 2 and 4 times as many below."""
    num_clips: int = 3072
    """Training clips; their seeds are 0 ... num_clips - 1."""
    num_steps: int = 3000
    """Optimiser steps. A run can be resumed with another number: learning rate and crops go by the share done."""
    start: Literal["linear", "ordinary"] = "linear"
    """"linear": the closed form of `vae_init`. "ordinary": PyTorch's own, the control."""
    lr: float = 1e-3
    """Highest learning rate of AdamW (betas .9, .99; no weight decay); 2.5e-3 falls below the start."""
    warmup: int = 100
    """Steps over which the learning rate rises."""
    latent_noise: float = 0.05
    """Standard deviation of what is added to the latents, which are kept near unit size."""
    size_weight: float = 0.01
    """Of the penalty that keeps each latent channel's mean square near 1."""
    average: float = 0.998
    """Decay of the weights' running average, which is what is evaluated and shipped."""
    max_grad_norm: float = 1.0
    """Longer gradients are shortened to it."""
    full_from: float = 0.7
    """Share of the steps after which whole clips replace crops."""
    bf16: bool = True
    """bfloat16 autocast."""
    device: str = "cpu"
    """Or cuda."""
    checkpoint_every: int = 200
    """Steps between checkpoints, each with a point of the curve."""

    def __post_init__(self) -> None:
        for name, least in (("num_clips", START_CLIPS), ("num_steps", 1), ("checkpoint_every", 1), ("width", 4)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if not 0 < self.latent_noise < 1 or not 0 <= self.average < 1 or not 0 <= self.full_from <= 1:
            raise ValueError("latent_noise must be in (0, 1), average in [0, 1) and full_from in [0, 1]")
