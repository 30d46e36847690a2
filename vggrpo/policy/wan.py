"""diffusers' Wan, tiny and real alike: its velocity at flow times, and the encoders of its folder.

Timesteps of 0 to 1000 exist only here.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from jaxtyping import Float
from torch import Tensor
from transformers import AutoTokenizer, UMT5EncoderModel

from vggrpo.bootstrap.assets import sha256
from vggrpo.bootstrap.text import TextStage, encode_prompts
from vggrpo.bootstrap.vae import encode, normalise
from vggrpo.data import Encoders

TIMESTEPS = 1000.0
AT_ONCE = 4
"""Clips that the VAE encodes together."""


def wan_velocity(
    transformer: WanTransformer3DModel,
    z_t: Float[Tensor, "B C L h w"],
    t: Float[Tensor, " B"],
    text: Float[Tensor, "B tokens channels"],
) -> Float[Tensor, "B C L h w"]:
    """v = eps - z0 as the network predicts it, at flow times t in [0, 1] of each latent; 1 is noise."""
    v: Tensor = transformer(z_t, (TIMESTEPS * t).to(z_t), text, return_dict=False)[0]
    return v


def load_encoders(folder: Path, max_len: int, device: str) -> Encoders:
    """VAE and text encoder of a Wan folder in diffusers layout, in fp32, for prompts of `max_len` tokens.

    Raises:
        ValueError: the folder lacks one of them.
    """
    parts = ("vae", "text_encoder", "tokenizer")
    for part in parts:
        if not (folder / part).is_dir():
            raise ValueError(f"{folder} has no {part}/: it must be a Wan model in diffusers layout")
    vae = AutoencoderKLWan.from_pretrained(folder / "vae", local_files_only=True, torch_dtype=torch.float32)
    encoder = UMT5EncoderModel.from_pretrained(
        folder / "text_encoder", local_files_only=True, torch_dtype=torch.float32
    )
    stage = TextStage(
        AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True), encoder.eval().to(device)
    )
    vae.eval().to(device)

    @torch.no_grad()
    def video(clips: Float[Tensor, "B T 3 H W"]) -> Float[Tensor, "B C L h w"]:
        return torch.cat([normalise(vae, encode(vae, some.to(device))) for some in clips.split(AT_ONCE)])

    def text(prompts: list[str]) -> Float[Tensor, "B tokens channels"]:
        return encode_prompts(stage, prompts, max_len)[0]

    files = [path for part in parts for path in sorted((folder / part).iterdir())]
    digests = {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in files
        if path.suffix in (".json", ".safetensors", ".model") and path.name != "card.json"
    }
    return Encoders(video, text, {"files": digests, "max_len": max_len})
