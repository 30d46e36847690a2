"""LoRA on a Wan transformer: injected, and written so that others load it at the right scale.

`pytorch_lora_weights.safetensors` is diffusers' own form (prefix `transformer.`, rank and alpha in the header), for
`pipe.load_lora_weights(folder)`. `comfyui.safetensors` has the names of Wan's first release and an alpha for each map.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vggrpo.config import LoraSize

WEIGHTS, COMFYUI = "pytorch_lora_weights.safetensors", "comfyui.safetensors"
NATIVE = {
    "attn1.to_q": "self_attn.q", "attn1.to_k": "self_attn.k", "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o", "attn2.to_q": "cross_attn.q", "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v", "attn2.to_out.0": "cross_attn.o", "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
}  # fmt: skip
"""diffusers' names within a block, and Wan's own."""


def lora_targets(transformer: nn.Module) -> list[str]:
    """What LoRA updates: the linear maps of self- and cross-attention that are there, those to an image included.

    Raises:
        ValueError: there are none.
    """
    found = {
        name
        for attention in transformer.modules()
        if isinstance(attention, WanAttention)
        for name, part in attention.named_modules()
        if isinstance(part, nn.Linear)
    }
    if not found:
        raise ValueError(f"{type(transformer).__name__} has no attention of Wan's to give LoRA to: is it a Wan?")
    return sorted(found)


def add_lora(transformer: WanTransformer3DModel, size: LoraSize) -> None:
    """Freeze a transformer and give its attention low-rank updates, which start at 0 and are fp32 in bf16 models, too.

    Raises:
        ValueError: from `lora_targets`.
    """
    targets = lora_targets(transformer)
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=size.rank, lora_alpha=size.alpha, target_modules=targets))
    for weight in transformer.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def save_lora(transformer: WanTransformer3DModel, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write both files.

    Args:
        weights: in place of the transformer's own, by the names of its parameters: an average, or what was cut up.

    Raises:
        ValueError: the transformer has no adapters.
    """
    if not getattr(transformer, "peft_config", None):
        raise ValueError("the transformer has no LoRA to save: add_lora comes first")
    chosen = get_peft_model_state_dict(transformer, None if weights is None else dict(weights))
    WanPipeline.save_lora_weights(
        folder, transformer_lora_layers=chosen, **_collate_lora_metadata({"transformer": transformer})
    )
    (config,) = transformer.peft_config.values()
    save_file(native_names(chosen, float(config.lora_alpha)), folder / COMFYUI)


def check_lora(transformer: nn.Module, file: Path) -> None:
    """Compare a LoRA with the transformer that is to have it, of whatever rank it is.

    Raises:
        ValueError: a file that is damaged, or whose updates are of maps that this transformer has not.
    """
    try:
        with safe_open(file, "pt") as found:
            shapes = {key: found.get_slice(key).get_shape() for key in found.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {file}: {str(error).splitlines()[0]}") from None
    maps = {name: part for name, part in transformer.named_modules() if isinstance(part, nn.Linear)}
    for key, shape in shapes.items():
        path, _, side = key.removeprefix("transformer.").removesuffix(".weight").rpartition(".")
        if side not in ("lora_A", "lora_B") or not key.startswith("transformer."):
            raise ValueError(f"{file} holds {key}: it must be a Wan's LoRA in diffusers' form, as vggrpo train has it")
        part, axis = maps.get(path), 1 if side == "lora_A" else 0
        ours = None if part is None else part.weight.shape[axis]
        if ours != shape[axis]:
            there = "has no such map" if ours is None else f"has {ours} there"
            raise ValueError(
                f"{file} is a LoRA of another model: {path} has {shape[axis]} channels in it, and this transformer "
                f"{there}; give it to the model that it was trained on"
            )


def native_names(weights: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """`blocks.0.attn1.to_q.lora_A.weight` -> `diffusion_model.blocks.0.self_attn.q.lora_down.weight`, and an alpha.

    Raises:
        ValueError: a map that Wan's own code has no name for.
    """
    found: dict[str, Tensor] = {}
    for key, value in weights.items():
        _, number, rest = key.split(".", 2)
        inside, side = rest.removesuffix(".weight").rsplit(".", 1)
        if inside not in NATIVE:
            raise ValueError(f"{key} has no name in Wan's own code: it can only be used by diffusers")
        stem = f"diffusion_model.blocks.{number}.{NATIVE[inside]}"
        found[f"{stem}.{'lora_down' if side == 'lora_A' else 'lora_up'}.weight"] = value.detach().contiguous().cpu()
        found[f"{stem}.alpha"] = torch.tensor(float(alpha))
    return found
