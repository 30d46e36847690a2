"""The encoders of a Wan folder: what clips and captions become before a finetuning, and prompts before sampling."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from jaxtyping import Float
from torch import Tensor
from transformers import AutoTokenizer, UMT5EncoderModel

from vggrpo.bootstrap.assets import sha256
from vggrpo.bootstrap.text import TextStage, encode_prompts
from vggrpo.bootstrap.vae import encode, normalise
from vggrpo.data import Encoders
from vggrpo.policy.first_frame import channels, load_sight, seen
from vggrpo.policy.wan import check_there

AT_ONCE = 4
"""Clips that the VAE encodes together."""


def load_encoders(
    folder: Path, max_len: int, device: str, *, first_frames: bool = False, sight: bool = False
) -> Encoders:
    """VAE and text encoder of a Wan folder in diffusers layout, in fp32, for prompts of `max_len` tokens.

    Args:
        first_frames: also encode the first frame of every clip, as further channels of the input.
        sight: and what CLIP sees in it.

    Raises:
        ValueError: the folder lacks one of them.
    """
    check_there(folder)
    parts = ["vae", "text_encoder", "tokenizer", *(["image_encoder", "image_processor"] if sight else [])]
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
    eye = load_sight(folder, device) if sight else None

    @torch.no_grad()
    def video(clips: Float[Tensor, "B T 3 H W"]) -> Float[Tensor, "B C L h w"]:
        return torch.cat([normalise(vae, encode(vae, some.to(device))) for some in clips.split(AT_ONCE)])

    def text(prompts: list[str]) -> Float[Tensor, "B tokens channels"]:
        return encode_prompts(stage, prompts, max_len)[0]

    def first(clips: Float[Tensor, "B T 3 H W"]) -> tuple[Tensor, ...]:
        told = []
        for frame in clips[:, 0].to(device):
            told.append([channels(vae, frame, clips.shape[1]), *([] if eye is None else [seen(eye, frame)])])
        return tuple(torch.cat(parts) for parts in zip(*told, strict=True))

    files = [path for part in parts for path in sorted((folder / part).iterdir())]
    digests = {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in files
        if path.suffix in (".json", ".safetensors", ".model") and path.name != "card.json"
    }
    identity = {"files": digests, "max_len": max_len}
    if not first_frames:
        return Encoders(video, text, identity)
    return Encoders(video, text, identity | {"first_frames": True}, first)
