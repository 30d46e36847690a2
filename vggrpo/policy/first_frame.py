"""Image to video: what a Wan model is told of a first frame, in each of the two ways that there are.

    kept       Wan2.2-TI2V-5B: its latents are the video's first, at time 0, and are not sampled
    channels   Wan2.1-I2V and Wan2.2-I2V-A14B: a mask and the latents of the frame before an empty video are further
               channels of the input; 2.1 also reads what CLIP sees in it

Everything is as in diffusers' WanImageToVideoPipeline, to the bit.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from diffusers import AutoencoderKLWan
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vggrpo.data import DataConfig, read_frames
from vggrpo.policy.flow_policy import Encoder, TextEncoder, Told
from vggrpo.types import Condition

Way = Literal["kept", "channels"]
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
WORDS = 512
"""Tokens of a prompt that diffusers' attention takes for granted where there is an image to attend to."""


def read_first_frames(file: str, prompts: Sequence[str], height: int, width: int) -> Float[Tensor, "N 3 H W"]:
    """The first frame of each prompt's video, RGB in [0, 1]: "frames" of a safetensors file, or a folder's pictures by
    name, each scaled until it covers height x width, its middle kept.

    Raises:
        ValueError: no such file, or not a picture (in a file: of this size) for every prompt.
    """
    if Path(file).is_dir():
        return _pictures(Path(file), len(prompts), height, width)
    try:
        found = load_file(Path(file))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read first frames from {file}: {error}") from None
    expected = [len(prompts), 3, height, width]
    if "frames" not in found or list(found["frames"].shape) != expected:
        shapes = {name: list(value.shape) for name, value in found.items()}
        raise ValueError(f"{file} must hold frames {expected}, one picture for each prompt, got {shapes}")
    frames = found["frames"]
    if not frames.is_floating_point() or not bool(((frames >= 0) & (frames <= 1)).all()):
        raise ValueError(f"{file}: frames must be floating point in [0, 1]: divide bytes by 255")
    return frames.float()


class Sight(NamedTuple):
    """CLIP's image tower, and what makes its input."""

    processor: object
    encoder: nn.Module


def load_sight(folder: Path, device: str = "cpu") -> Sight:
    """The image encoder of a Wan2.1-I2V folder.

    Raises:
        ValueError: the folder has none.
    """
    from transformers import CLIPImageProcessor, CLIPVisionModel

    for part in ("image_encoder", "image_processor"):
        if not (folder / part).is_dir():
            raise ValueError(f"{folder} has no {part}/, but its transformer reads image embeddings: download it whole")
    encoder = CLIPVisionModel.from_pretrained(folder / "image_encoder", local_files_only=True, dtype=torch.float32)
    processor = CLIPImageProcessor.from_pretrained(folder / "image_processor", local_files_only=True)
    return Sight(processor, encoder.eval().requires_grad_(False).to(device))


def num_seen(folder: Path) -> int:
    """Tokens of what the image encoder of a Wan2.1-I2V folder sees in a frame; its weights are not read.

    Raises:
        ValueError: the folder has none.
    """
    path = folder / "image_encoder" / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no image_encoder/config.json: download it whole")
    config = json.loads(path.read_text())
    patches: int = config["image_size"] // config["patch_size"]
    return patches**2 + 1


@torch.no_grad()
def kept_latents(vae: AutoencoderKLWan, frame: Float[Tensor, "3 H W"]) -> Float[Tensor, "1 C 1 h w"]:
    """Normalised latents of one frame, RGB in [0, 1]."""
    return _latents(vae, (2 * frame - 1)[None, :, None])


@torch.no_grad()
def channels(vae: AutoencoderKLWan, frame: Float[Tensor, "3 H W"], frames: int) -> Float[Tensor, "1 D L h w"]:
    """The mask, 1 at the first frame, and the latents of a video of that frame and grey ones: D = s + C.

    s is the VAE's stride in time: the mask has a channel for each frame that a latent frame stands for.
    """
    video = torch.cat([(2 * frame - 1)[:, None], frame.new_zeros(3, frames - 1, *frame.shape[1:])], dim=1)
    latents = _latents(vae, video[None])
    mask = torch.zeros_like(latents[:, :1]).repeat(1, vae.config.scale_factor_temporal, 1, 1, 1)
    mask[:, :, 0] = 1
    return torch.cat([mask, latents], dim=1)


@torch.no_grad()
def seen(sight: Sight, frame: Float[Tensor, "3 H W"]) -> Float[Tensor, "1 patches width"]:
    """CLIP's last hidden states but one, of one frame."""
    from PIL import Image

    picture = Image.fromarray((255 * frame).round().byte().permute(1, 2, 0).cpu().numpy())
    pixels = sight.processor(images=picture, return_tensors="pt").to(sight.encoder.device)  # type: ignore[operator]
    view: Tensor = sight.encoder(**pixels, output_hidden_states=True).hidden_states[-2]
    return view


def with_first_frames(
    texts: TextEncoder,
    way: Way,
    vae: AutoencoderKLWan,
    frames: int,
    sight: Sight | None,
    first_frames: Float[Tensor, "N 3 H W"],
) -> Encoder:
    """What `texts` tells of prompts, and one of these first frames, which are encoded now and kept on the CPU.

    The encoder raises ValueError for a condition without a first frame, or with one that is not among them.

    Raises:
        ValueError: first frames of a size that the VAE's strides do not divide.
    """
    stride, size = vae.config.scale_factor_spatial, first_frames.shape[2:]
    if any(side % stride for side in size):
        raise ValueError(f"first frames must have sides that are multiples of {stride}, got {size[0]} x {size[1]}")
    known: dict[str, tuple[Tensor, ...]] = {}
    for frame in first_frames.to(vae.device):
        found = [kept_latents(vae, frame) if way == "kept" else channels(vae, frame, frames)]
        known[_name(frame)] = tuple(x.cpu() for x in found + ([] if sight is None else [seen(sight, frame)]))
    sees = sight is not None

    def encode(cond: Condition) -> Told:
        if cond.first_frame is None:
            raise ValueError("an image-to-video model needs a first frame for each prompt, and got prompts alone")
        text = texts(cond)
        if sees:
            check_words(text.shape[1])
        names = [_name(frame) for frame in cond.first_frame]
        if not known.keys() >= set(names):
            raise ValueError("a first frame was not encoded beforehand")
        parts = [known[name] for name in names]
        return (text, *(torch.cat(some).to(text.device) for some in zip(*parts, strict=True)))

    return encode


def check_words(max_len: int) -> None:
    """Raises ValueError, one line, for prompts of a length that image embeddings cannot be read beside."""
    if max_len != WORDS:
        raise ValueError(
            f"a model that reads image embeddings needs prompts of {WORDS} tokens, got max_len {max_len}: "
            f"set max_len to {WORDS}"
        )


def free_shape(shape: tuple[int, int, int, int], way: Way | None) -> tuple[int, int, int, int]:
    """(C, L, h, w) of what is sampled of a video of that latent shape: all but a first frame that is kept."""
    C, L, h, w = shape
    return (C, L - (way == "kept"), h, w)


def put_first(told: Told, z0: Float[Tensor, "n C rest h w"]) -> Float[Tensor, "n C L h w"]:
    """The whole video where the first frame is kept: for `FlowPolicy(complete=)`."""
    return torch.cat([told[1].to(z0), z0], dim=2)


def _pictures(folder: Path, count: int, height: int, width: int) -> Float[Tensor, "N 3 H W"]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    if len(paths) != count:
        raise ValueError(
            f"{folder} must hold {count} pictures ({', '.join(PICTURES)}), one for each prompt in the order of their "
            f"names, got {len(paths)}"
        )
    how = DataConfig(videos="", frames=1, height=height, width=width)
    return torch.cat([read_frames([path], how) for path in paths]).float() / 255


def _name(frame: Float[Tensor, "3 H W"]) -> str:
    return hashlib.sha256(frame.cpu().contiguous().numpy().tobytes()).hexdigest()


def _latents(vae: AutoencoderKLWan, video: Float[Tensor, "1 3 T H W"]) -> Float[Tensor, "1 C L h w"]:
    z = vae.encode(video.to(vae.dtype)).latent_dist.mode().to(video.dtype)
    mean, std = (z.new_tensor(values).view(-1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    return (z - mean) * (1 / std)  # diffusers' form: a quotient would differ in the last bit
