"""Trained files on disk: written whole or not at all, with a card that names their sha256, and checked when loaded."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

CARD = "card.json"


def save_tensors(path: Path, tensors: dict[str, Tensor], notes: dict[str, Any] | None = None) -> None:
    """A safetensors file that is either complete or not there; `notes` go into its header as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    save_file(tensors, part, {"notes": json.dumps(notes or {})})
    os.replace(part, path)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote: tensors and notes.

    Raises:
        ValueError: no such file, or one that is damaged.
    """
    if not path.is_file():
        raise ValueError(f"no file at {path}")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["notes"])  # noqa: SIM118
    except (SafetensorError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it to start again from nothing") from None


def save_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON file that is either complete or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(part, path)


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_card(folder: Path) -> dict[str, Any]:
    """What is known about an asset, after its files have been found to be the ones that the card describes.

    Raises:
        ValueError: no card, a file that is missing, or one with other bytes than the card says.
    """
    path = folder / CARD
    if not path.is_file():
        raise ValueError(f"no {CARD} in {folder}: this is not an asset folder, or it was not fetched completely")
    try:
        card: dict[str, Any] = json.loads(path.read_text())
        files: dict[str, str] = card["sha256"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: it is not JSON with a sha256 for each file") from None
    for name, wanted in files.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing, and {CARD} names it: restore the folder, or build it again")
        found = sha256(folder / name)
        if found != wanted:
            raise ValueError(
                f"{folder / name} has sha256 {found[:12]}... but {CARD} says {wanted[:12]}...: "
                "it was changed or damaged; restore it, or build it again"
            )
    return card
