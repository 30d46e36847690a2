"""All that decides what `vggrpo sample` draws: its flags, and their help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vggrpo.animate import check_animation
from vggrpo.sampler import time_grid

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
"""`policy.lora.WEIGHTS`, without the libraries that it needs."""
LORA_PARTS = ("", "transformer_2")
"""Folders in a LoRA's: of the only or first transformer, and of the second."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How videos are drawn, from whatever model."""

    geometry: str = "assets/tiny-geometry"
    """The geometry model whose tail the latent geometry model uses: a folder, or family:weights (`geometry_model`)."""
    allow_import: bool = False
    """Run the code that builds a geometry model (any4d)."""
    lgm: str = "assets/tiny-lgm"
    """The latent geometry model."""
    frames: int = 17
    """4 n + 1."""
    height: int = 64
    """A multiple of the VAE's stride times the transformer's patch: of 16, or of 32 for Wan2.2-TI2V-5B."""
    width: int = 64
    """See `height`."""
    max_len: int = 96
    """Tokens of a prompt; Wan's own is 512."""
    text_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which the text encoder computes."""
    prompt_cache: str | None = "runs/prompts"
    """Folder where embeddings of prompts are kept, as those of training are; None: nowhere."""
    num_steps: int = 20
    """Steps from noise to data."""
    shift: float | None = None
    """Of the time grid; by default what the model's own scheduler says."""
    guidance_scale: float = 2.5
    """Classifier-free guidance; 1 is none."""
    negative_prompt: str = ""
    """What it moves away from."""
    guide_every: int = 4
    """Steps between two that are guided by geometry."""
    first_frames: str | None = None
    """The first frame of each prompt's video, for a model that is told of one: a folder of pictures, in the order of
    their names, or safetensors with "frames" [N 3 height width], RGB in [0, 1]."""
    rewards: Literal["default", "paper"] = "default"
    """Which rewards choose and guide."""
    seed: int = 0
    """Of the noise: candidate k of prompt b is the same whatever else is sampled."""
    device: str = "cpu"
    """Or cuda."""

    def check(self) -> None:
        """Raises ValueError for what cannot be; not when built, so that the command line can say it in one line."""
        time_grid(self.num_steps, 1.0 if self.shift is None else self.shift)
        if self.guide_every < 1:
            raise ValueError(f"guide_every must be >= 1, got {self.guide_every}")


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Drawing):
    """What is sampled, and how."""

    prompts: str
    """Text file, one prompt on each line."""
    out: str
    """Folder of the videos."""
    model: str = "assets/tiny-wan"
    """Wan folder in diffusers layout."""
    lora: str | None = None
    """Folder of a LoRA, as `vggrpo train` and `vggrpo sft` write it."""
    guidance_geometry: float = 0.0
    """Scale of the reward's gradient; 0 is none."""
    best_of: int = 1
    """Candidates for each prompt; the one whose rewards are best is kept."""
    tiny_random: bool = False
    """With narrow stand-ins for a published model, by the name of its folder, which need not be here; at most 9 frames
    of 32 x 64. What comes out is worth nothing."""
    animate: str | None = None
    """Also all videos side by side, moving: a .gif, .webp or .png."""

    def check(self) -> None:
        """Raises ValueError, as `Drawing.check`."""
        super().check()
        if self.best_of < 1 or self.guidance_geometry < 0:
            raise ValueError("best_of must be >= 1, and guidance_geometry >= 0")
        if self.lora is not None and not any((Path(self.lora) / part / LORA_WEIGHTS).is_file() for part in LORA_PARTS):
            raise ValueError(f"{self.lora} has no {LORA_WEIGHTS}: it is not the folder of a LoRA")
        check_animation(self.animate)
