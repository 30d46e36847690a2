"""A Wan folder as diffusers writes it: which of the Wan models it holds, and its velocity.

Wan2.1-T2V          one transformer, text alone        Wan2.2-T2V-A14B    two, at high and at low noise
Wan2.1-I2V          and channels, and CLIP's view      Wan2.2-I2V-A14B    two, and channels
Wan2.2-TI2V-5B      a time for each token; with or without a first frame, which is kept
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from jaxtyping import Float
from torch import Tensor

from vggrpo.config import LoraSize
from vggrpo.policy.first_frame import Way, load_sight, with_first_frames
from vggrpo.policy.flow_policy import Encoder, TextEncoder
from vggrpo.policy.lora import WEIGHTS, add_lora, check_lora, save_lora
from vggrpo.policy.wan import WanVelocity, above, check_there

PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
LoraOn = Literal["high", "low", "both"]


class Layout(NamedTuple):
    """What model_index.json and the configurations of the parts say."""

    per_token: bool
    """Every token has a time of its own."""
    boundary: float | None
    """Flow time from which on `transformer` is asked, and below which `transformer_2`."""
    way: Way | None
    """How it is told of a first frame; None: not at all. One that keeps it also goes without."""
    sight: bool
    """It reads CLIP's view of the first frame."""
    patch: tuple[int, int, int]
    """Latents in a token: (time, down, across)."""

    def told(self, given: bool, key: str = "video.first_frames") -> Way | None:
        """How it is told of first frames, if they are given (by `key`).

        Raises:
            ValueError: the model cannot be told of them, or cannot go without.
        """
        if given and self.way is None:
            raise ValueError(f"{key} is given, but the model takes prompts alone: leave it out")
        if not given and self.way == "channels":
            raise ValueError(f"the model makes videos of a first frame: set {key}")
        return self.way if given else None


def read_layout(folder: Path) -> Layout:
    """Which Wan this is.

    Raises:
        ValueError: no such folder, one that is no Wan in diffusers layout, or parts that do not go together.
    """
    check_there(folder)
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{folder} has no model_index.json: it must be a Wan pipeline in diffusers layout, as the repositories are "
            "whose names end in -Diffusers"
        )
    index = _read(folder / "model_index.json")
    if index.get("_class_name") not in PIPELINES:
        raise ValueError(f"{folder} is a {index.get('_class_name')}: it must be one of {', '.join(PIPELINES)}")
    transformer, vae = (_read(folder / part / "config.json") for part in ("transformer", "vae"))
    given, latent = transformer["in_channels"], vae["z_dim"]
    per_token = bool(index.get("expand_timesteps"))
    made, channels = transformer.get("out_channels") or given, told_channels(latent)
    if made != latent or given not in (latent, channels):
        raise ValueError(
            f"{folder}: the VAE has latents of {latent} channels, the transformer takes {given} and gives {made}: it "
            f"must take {latent}, or {channels} with a first frame, and give {latent}; these are parts of two models"
        )
    boundary = index.get("boundary_ratio")
    if (boundary is not None) != (folder / "transformer_2").is_dir():
        raise ValueError(
            f"{folder}: model_index.json says boundary_ratio {boundary}, and there is "
            f"{'no' if boundary is not None else 'a'} transformer_2/: a model of two transformers needs both"
        )
    way: Way | None = "channels" if given == channels else "kept" if per_token else None
    time, down, across = transformer["patch_size"]
    return Layout(per_token, boundary, way, transformer.get("image_dim") is not None, (time, down, across))


def told_channels(latent: int) -> int:
    """Channels of the input where a first frame has some: latents, the frame's, and a mask of 4 frames."""
    return 4 + 2 * latent


def load_velocity(folder: Path, dtype: torch.dtype = torch.float32) -> WanVelocity:
    """The transformers of a Wan folder; in bf16, embeddings of time, norms and modulation stay in fp32.

    Raises:
        ValueError: from `read_layout`.
    """
    layout = read_layout(folder)
    high = _transformer(folder / "transformer", dtype)
    low = None if layout.boundary is None else _transformer(folder / "transformer_2", dtype)
    return WanVelocity(high, layout.per_token, low, layout.boundary)


def tell_first_frames(
    texts: TextEncoder,
    folder: Path,
    layout: Layout,
    first_frames: Float[Tensor, "N 3 H W"],
    frames: int,
    device: str,
) -> Encoder:
    """What `texts` tells and these first frames, encoded here, so that VAE and image encoder can go."""
    assert layout.way is not None
    vae = AutoencoderKLWan.from_pretrained(folder / "vae", local_files_only=True, torch_dtype=torch.float32)
    sight = load_sight(folder, device) if layout.sight else None
    return with_first_frames(texts, layout.way, vae.eval().to(device), frames, sight, first_frames)


def adapt(network: WanVelocity, size: LoraSize, on: LoraOn, times: Float[Tensor, " steps"], num_processes: int) -> None:
    """Freeze all transformers, and give LoRA to those that are `on`; `times` are the flow times of all steps that may
    be trained.

    Raises:
        ValueError: a step would be trained on a transformer without LoRA, or LoRA never be trained; or two are trained
            by several processes, whose gradients would not be complete in every backward pass.
    """
    parts = network.transformers()
    network.requires_grad_(False)
    if len(parts) == 1:
        add_lora(network.transformer, size)
        return
    assert network.boundary is not None
    check_lora_on(on, times, network.boundary, num_processes)
    for name, side in (("transformer", "high"), ("transformer_2", "low")):
        if on in (side, "both"):
            add_lora(parts[name], size)


def check_lora_on(on: LoraOn, times: Float[Tensor, " steps"], boundary: float, num_processes: int) -> None:
    """Compare the transformers that have LoRA with those that the trained steps ask.

    Raises:
        ValueError: as `adapt`.
    """
    high = above(times, boundary)
    needed = "high" if high.all() else "both" if high.any() else "low"
    if on != needed:
        raise ValueError(
            f"video.lora_on is {on}, but the steps of sampling.window lie on the side {needed} of the boundary "
            f"{boundary:g}: set video.lora_on={needed}, or move the window"
        )
    if on == "both" and num_processes > 1:
        raise ValueError(
            f"video.lora_on=both needs one process, got {num_processes}: a backward pass reaches one transformer; "
            "set sampling.window to one side of the boundary"
        )


def save_loras(network: WanVelocity, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the LoRA of each transformer that has one: the first's into `folder`, the second's into its transformer_2/.

    diffusers loads them by `pipe.load_lora_weights(folder)` and, for the second,
    `pipe.load_lora_weights(folder / "transformer_2", load_into_transformer_2=True)`.

    Args:
        weights: in place of the network's own, by the names of its parameters.
    """
    for part, transformer in network.transformers().items():
        if getattr(transformer, "peft_config", None):
            own = None if weights is None else _inside(weights, part)
            where = lora_folder(folder, part)
            where.mkdir(exist_ok=True, parents=True)
            save_lora(transformer, where, own)


def load_loras(network: WanVelocity, folder: Path) -> None:
    """Give each transformer the LoRA that `save_loras` wrote of it.

    Raises:
        ValueError: none there; one of a transformer that this model has not, or of another model.
    """
    parts = network.transformers()
    found = {part: lora_folder(folder, part) for part in ("transformer", "transformer_2")}
    found = {part: where for part, where in found.items() if (where / WEIGHTS).is_file()}
    if not found:
        raise ValueError(f"{folder} has no {WEIGHTS}: it is not the folder of a LoRA")
    for part, where in found.items():
        if part not in parts:
            raise ValueError(f"{where} is a LoRA of a second transformer, and the model has one: give it Wan2.2-A14B")
        check_lora(parts[part], where / WEIGHTS)
        parts[part].load_lora_adapter(str(where), prefix="transformer", weight_name=WEIGHTS)


def lora_folder(folder: Path, part: str) -> Path:
    """Where the LoRA of `transformer` or `transformer_2` lies."""
    return folder if part == "transformer" else folder / part


def _inside(weights: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): x for name, x in weights.items() if name.startswith(f"{part}.")}


def _transformer(folder: Path, dtype: torch.dtype) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(folder, local_files_only=True, torch_dtype=dtype)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent.parent} has no {path.parent.name}/{path.name}: it is not whole")
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    return found
