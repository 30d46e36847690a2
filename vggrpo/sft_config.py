"""All that decides an ordinary finetuning, read from `launch/recipes/sft/lora.yaml`."""

from dataclasses import dataclass, field
from typing import Literal

from vggrpo.config import LoraSize
from vggrpo.data import DataConfig

MAY_CHANGE = ("out", "num_steps", "device", "checkpoint_every", "gradient_checkpointing")
"""Fields in which a resumed run may differ from what it was started with."""


@dataclass(frozen=True)
class WanSize:
    """A video transformer that starts from nothing."""

    layers: int = 6
    """Blocks."""
    heads: int = 6
    """Attention heads."""
    head_dim: int = 32
    """Channels of each."""
    ffn_dim: int = 768
    """Channels of the feed-forward part."""


@dataclass(frozen=True)
class SftRecipe:
    """All of a finetuning."""

    out: str = "runs/sft"
    """Folder of the checkpoint and of what comes out: transformer/, or the LoRA's safetensors."""
    model: str = "assets/tiny-wan"
    """Wan folder in diffusers layout, for its VAE, text stage and, unless `new` is given, its transformer."""
    new: WanSize | None = None
    """Train a new transformer of this size instead."""
    lora: LoraSize | None = None
    """Train low-rank updates; None trains every weight."""
    side: Literal["high", "low"] | None = None
    """Of two transformers (Wan2.2-A14B): which is trained, at the flow times of its side of the boundary alone."""
    tell_first_frame: bool | None = None
    """Tell the model of each clip's first frame, as in image to video; by default where it cannot go without
    (Wan2.1-I2V, 2.2 I2V-A14B), and not where it can (2.2 TI2V-5B)."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training clips."""
    held_out: DataConfig = field(default_factory=lambda: DataConfig(first_seed=40_000_000, num_clips=64))
    """Clips that the curve is measured on."""
    max_len: int = 96
    """Tokens of a prompt, `</s>` included; Wan's own is 512."""
    seed: int = 0
    """Of every random stream."""
    num_steps: int = 3000
    """Optimiser steps. A run can be resumed with another number, best before it cools down."""
    batch: int = 16
    """Clips in a step."""
    shift: float = 3.0
    """Of the times: t = shift u / (1 + (shift - 1) u), u uniform; Wan samples with 3 (480p) or 5 (720p)."""
    channel_weights: list[float] | None = None
    """Of the latents' channels in the loss; equal by default. The best velocity is the same whatever they are."""
    first_weight: float = 1.0
    """Of the first latent frame in the loss, which is one video frame; the others, of four frames each, have 1."""
    drop_caption: float = 0.1
    """Share of clips that are told the negative prompt, for classifier-free guidance."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Muon, for the matrices of the blocks (`vggrpo/muon.py`), trains from nothing in fewer steps."""
    lr: float = 5e-4
    """Of the optimiser (AdamW's betas are .9 and .95), between warm-up and cool-down."""
    warmup: int = 100
    """Steps over which the learning rate rises."""
    cooldown: float = 0.0
    """Share of the steps, the last ones, over which it falls to 0 in a line."""
    weight_decay: float = 0.0
    """Decoupled."""
    average: float = 0.999
    """Decay of the weights' running average, which is what is measured and saved."""
    max_grad_norm: float = 1.0
    """Longer gradients are shortened to it."""
    bf16: bool = False
    """bfloat16 autocast of the transformer; beside a LoRA its weights, which are frozen, are held in bfloat16, too."""
    gradient_checkpointing: bool = False
    """Recompute the network in the backward pass: less memory, more time."""
    device: str = "cpu"
    """Or cuda."""
    checkpoint_every: int = 250
    """Steps between checkpoints, each with a point of the curve."""

    def __post_init__(self) -> None:
        if self.new is not None and (self.side is not None or self.tell_first_frame):
            raise ValueError("side and tell_first_frame are of a model that is there: leave them out beside `new`")
        for name in ("num_steps", "batch", "warmup", "checkpoint_every", "max_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not self.shift > 0 or not self.lr > 0 or not self.max_grad_norm > 0:
            raise ValueError("shift, lr and max_grad_norm must be > 0")
        if not self.first_weight > 0:
            raise ValueError(f"first_weight must be > 0, got {self.first_weight:g}")
        if not 0 <= self.drop_caption < 1 or not 0 <= self.average < 1:
            raise ValueError("drop_caption and average must be in [0, 1)")
        if not 0 <= self.cooldown <= 1:
            raise ValueError(f"cooldown must be in [0, 1], got {self.cooldown:g}")
        if self.channel_weights is not None and not all(weight > 0 for weight in self.channel_weights):
            raise ValueError(f"channel_weights must be > 0, got {self.channel_weights}")
        if self.new is not None and self.lora is not None:
            raise ValueError("a new transformer is trained whole: give `new` or `lora`, not both")
        if self.held_out.negative_prompt != self.data.negative_prompt:
            raise ValueError("data and held_out must have one negative_prompt")
