"""diffusers' Wan, tiny and real alike: its velocity at flow times, and the encoders of its folder.

Timesteps of 0 to 1000 exist only here.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoTokenizer, UMT5EncoderModel

from vggrpo.bootstrap.assets import sha256
from vggrpo.bootstrap.text import TextStage, encode_prompts
from vggrpo.bootstrap.vae import encode, normalise
from vggrpo.data import Encoders
from vggrpo.policy.flow_policy import Encoder
from vggrpo.types import Condition

TIMESTEPS = 1000.0
AT_ONCE = 4
"""Clips that the VAE encodes together."""


def wan_velocity(
    transformer: WanTransformer3DModel,
    z_t: Float[Tensor, "B C L h w"],
    t: Float[Tensor, " B"],
    text: Float[Tensor, "prompts tokens channels"],
) -> Float[Tensor, "B C L h w"]:
    """v = eps - z0 as the network predicts it, at flow times t in [0, 1] of each latent; 1 is noise.

    `text` has a row for each latent; with `PromptAttention` it may have one for each prompt.
    """
    v: Tensor = transformer(z_t, (TIMESTEPS * t).to(z_t), text, return_dict=False)[0]
    return v


class PromptAttention(WanAttnProcessor):
    """Cross-attention to one prompt of several videos: their tokens become one sequence of queries.

    Queries do not see each other, so this is the same attention; but keys and values are computed once for every
    prompt, and not once for every video.
    """

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Float[Tensor, "n N d"],
        encoder_hidden_states: Float[Tensor, "prompts tokens d"],
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Float[Tensor, "n N d"]:
        """n is a multiple of the number of prompts, and every n / prompts videos in a row have one."""
        queries = hidden_states.reshape(len(encoder_hidden_states), -1, hidden_states.shape[-1])
        found: Tensor = super().__call__(attn, queries, encoder_hidden_states, attention_mask, rotary_emb)
        return found.reshape(hidden_states.shape)


class WanVelocity(nn.Module):
    """A Wan transformer as a `flow_policy.Network`: what is prepared for a launch, and called through it."""

    def __init__(self, transformer: WanTransformer3DModel) -> None:
        super().__init__()
        self.transformer = transformer
        for block in transformer.blocks:
            block.attn2.set_processor(PromptAttention())

    def forward(
        self, z_t: Float[Tensor, "n C L h w"], t: Float[Tensor, " n"], text: Float[Tensor, "n tokens channels"]
    ) -> Float[Tensor, "n C L h w"]:
        """v at flow times t in [0, 1]."""
        return wan_velocity(self.transformer, z_t, t, prompts_in(text))


def prompts_in(text: Float[Tensor, "n tokens channels"]) -> Float[Tensor, "prompts tokens channels"]:
    """Each prompt once, where every prompt stands in equally many rows, one after the other; else all rows."""
    begins = torch.cat([text.new_ones(1, dtype=torch.bool), (text[1:] != text[:-1]).flatten(1).any(1)])
    first = begins.nonzero()[:, 0]
    rows = len(text) // len(first)
    return text[first] if torch.equal(first, rows * torch.arange(len(first), device=first.device)) else text


def latent_shape(folder: Path, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """(C, L, h, w) of a video of this size in the latents of a Wan folder's VAE.

    Raises:
        ValueError: no VAE there, or a size that its strides do not divide.
    """
    path = folder / "vae" / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no vae/config.json: it must be a Wan model in diffusers layout")
    config = json.loads(path.read_text())
    s, p = config.get("scale_factor_temporal", 4), config.get("scale_factor_spatial", 8)
    if frames % s != 1 or height % p or width % p:
        raise ValueError(
            f"{folder} takes {s} n + 1 frames with sides that are multiples of {p}, got {frames} of {height} x {width}"
        )
    return config["z_dim"], (frames - 1) // s + 1, height // p, width // p


def own_shift(folder: Path) -> float:
    """The shift of a Wan folder's own time grid, whichever of diffusers' schedulers it has.

    Raises:
        ValueError: no scheduler there, or one without a shift.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no scheduler/scheduler_config.json: give the time grid's shift yourself")
    config = json.loads(path.read_text())
    shift = config.get("flow_shift", config.get("shift"))
    if shift is None:
        raise ValueError(f"{path} says nothing of a shift: give the time grid's shift yourself")
    return float(shift)


def cached_prompts(encoders: Encoders, prompts: Sequence[str], device: torch.device | str = "cpu") -> Encoder:
    """The embeddings of these prompts, so that the encoder can go; no other can be asked for.

    They are kept on the CPU, and handed out on `device`.
    """
    known = {prompt: encoders.text([prompt])[0].float().cpu() for prompt in dict.fromkeys(prompts)}

    def encode(cond: Condition) -> Tensor:
        for prompt in cond.prompt:
            if prompt not in known:
                raise ValueError(f"the prompt {prompt!r} was not encoded beforehand")
        return torch.stack([known[prompt] for prompt in cond.prompt]).to(device)

    return encode


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
