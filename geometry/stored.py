"""A latent geometry model on disk: what was trained in safetensors, and how it is built in JSON beside it.

The backbone itself is not stored: it has files of its own, and serves as the teacher too.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from geometry.backbone import HookedBackbone
from geometry.distil import add_lora, trained
from geometry.latent import Connector, LatentGeometryModel, LatentSpec

WEIGHTS, CARD = "lgm.safetensors", "lgm.json"


def save_latent_model(
    model: LatentGeometryModel, folder: str | Path, facts: dict[str, Any], dtype: torch.dtype | None = None
) -> None:
    """Write `lgm.safetensors` (connector, prefix, LoRA) and `lgm.json` (how to build it, its sha256, and `facts`).

    Args:
        dtype: of the file; by default the weights' own.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().to("cpu", dtype or p.dtype).contiguous() for name, p in trained(model).items()}
    save_file(weights, folder / WEIGHTS)
    net = model.connector
    card = {
        "point": model.point,
        "latent": asdict(net.latent),
        "connector": {
            "dim": net.dim,
            "mode": net.mode,
            "kernel": net.conv.kernel_size,
            "stride": net.stride,
            "split": net.split,
            "padding": net.conv.padding_mode,
            **({} if net.refiner is None else net.refiner.sizes()),
        },
        "lora": model.lora and {"rank": model.lora[0], "alpha": model.lora[1]},
        "sha256": _sha256(folder / WEIGHTS),
        "facts": facts,
    }
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n")


def load_latent_model(folder: str | Path, backbone: HookedBackbone) -> LatentGeometryModel:
    """The model that was saved, in eval mode and with nothing to train, around a backbone without adapters.

    Raises:
        ValueError: a file that is missing, damaged or not the one that the card speaks of; a backbone that it was not
            made for.
    """
    folder = Path(folder)
    for name in (WEIGHTS, CARD):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: it is not a latent geometry model, or only part of one")
    try:
        card = json.loads((folder / CARD).read_text())
        how = card["connector"] | {"kernel": tuple(card["connector"]["kernel"])}
        latent = card["latent"] | {key: tuple(card["latent"][key]) for key in ("mean", "std")}
        connector = Connector(LatentSpec(**latent), **how)
        point, lora, sha256 = card["point"], card["lora"], card["sha256"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CARD} is damaged ({error}); restore it") from error
    if _sha256(folder / WEIGHTS) != sha256:
        raise ValueError(f"{folder / WEIGHTS} is not the file that {CARD} speaks of (sha256 differs); restore it")
    model = LatentGeometryModel(backbone, point, connector)
    if lora is not None:
        add_lora(model, **lora)
    try:
        values, wanted = load_file(folder / WEIGHTS), trained(model)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged ({error}); restore it") from error
    ours, theirs = ({name: list(x.shape) for name, x in tensors.items()} for tensors in (wanted, values))
    if ours != theirs:
        name = min(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise ValueError(
            f"{folder / WEIGHTS} was made for another backbone: {name} is {theirs.get(name)} there, "
            f"{ours.get(name)} here"
        )
    model.load_state_dict(values, strict=False)
    return model.requires_grad_(False).eval()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
