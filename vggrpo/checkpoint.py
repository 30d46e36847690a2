"""Checkpoints that are whole or not there: a folder is written beside its place, checked, and moved in one stroke.

    root/latest                      name of the newest folder
    root/step-000120/state.json      how far the run is, and the recipe that it follows
    root/step-000120/*.safetensors   weights, optimiser, average
    root/step-000120/manifest.json   sha256 of every file

Random streams are named by seed and iteration (`types.Streams`), and prompts and windows go by the iteration, so that
the iteration is all that a run has to remember of them.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

POINTER, STATE, MANIFEST = "latest", "state.json", "manifest.json"
UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Checkpoint:
    """What a run is between two iterations."""

    state: dict[str, Any]
    """JSON: the iteration, the recipe, counters."""
    tensors: dict[str, dict[str, Tensor]]
    """By file, then by name: {"weights": {...}, "optimizer": {...}}."""


def save_checkpoint(root: Path, step: int, checkpoint: Checkpoint, keep: int = 2) -> Path:
    """Write `root/step-NNNNNN`, point to it, and delete all but the newest `keep`. Returns the folder.

    Whatever goes wrong before the move - no space, a kill - leaves the checkpoints before as they were.

    Raises:
        ValueError: keep < 1.
        OSError: it cannot be written (one line that says where and why).
    """
    if keep < 1:
        raise ValueError(f"keep must be >= 1 checkpoint, got {keep}")
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(f"*{UNFINISHED}"):
        shutil.rmtree(left)
    folder = root / f"step-{step:06d}"
    part = root / f"{folder.name}{UNFINISHED}"
    try:
        part.mkdir()
        for name, tensors in checkpoint.tensors.items():
            save_file({key: x.detach().contiguous().cpu() for key, x in tensors.items()}, part / f"{name}.safetensors")
        _write(part / STATE, json.dumps(checkpoint.state, indent=2) + "\n")
        digests = {path.name: _sha256(path) for path in sorted(part.iterdir())}
        _write(part / MANIFEST, json.dumps(digests, indent=2) + "\n")
        for path in (*part.iterdir(), part):
            _sync(path)
        if folder.exists():  # the same iteration again, after a resume that found it damaged
            shutil.rmtree(folder)
        os.replace(part, folder)
        pointer = root / f"{POINTER}.part"
        _write(pointer, folder.name + "\n")
        _sync(pointer)
        os.replace(pointer, root / POINTER)
        _sync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"cannot write the checkpoint {folder} ({error}): those before it are untouched") from None
    for old in sorted(path for path in root.glob("step-*") if path.is_dir())[:-keep]:
        if old != folder:
            shutil.rmtree(old)
    return folder


def load_checkpoint(root: Path) -> Checkpoint | None:
    """The checkpoint that `root` points to, its files compared with the manifest; None if there is none.

    Raises:
        ValueError: the pointer leads nowhere, or a file is missing, damaged or not the one that was written.
    """
    pointer = root / POINTER
    if not pointer.is_file():
        return None
    name = pointer.read_text().strip()
    folder = root / name
    others = sorted(path.name for path in root.glob("step-*") if path.name != name)
    remedy = f"write {others[-1]} into {pointer} to go on from there" if others else "start again in another folder"
    if Path(name).name != name or not (folder / MANIFEST).is_file():
        raise ValueError(f"{pointer} names {name!r}, which is no checkpoint: {remedy}")
    try:
        digests: dict[str, str] = json.loads((folder / MANIFEST).read_text())
        for file, digest in digests.items():
            if _sha256(folder / file) != digest:
                raise ValueError(f"{file} is not what was written")
        state = json.loads((folder / STATE).read_text())
        tensors = {Path(file).stem: load_file(folder / file) for file in digests if file.endswith(".safetensors")}
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"the checkpoint {folder} is damaged ({error}): {remedy}") from None
    return Checkpoint(state, tensors)


def optimizer_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's moments by the names of the network's weights, `exp_avg.NAME` and so on."""
    return {
        f"{key}.{name}": torch.as_tensor(value)
        for name, weight in network.named_parameters()
        for key, value in optimizer.state.get(weight, {}).items()
    }


def restore_optimizer(network: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`.

    Raises:
        ValueError: a moment of a weight that the network does not have.
    """
    weights = dict(network.named_parameters())
    moments: dict[str, dict[str, Tensor]] = {}
    for label, value in tensors.items():
        key, _, name = label.partition(".")
        if name not in weights:
            raise ValueError(f"the checkpoint has moments of {name}, which this network does not have")
        # Adam counts its steps on the CPU, whatever the device.
        moment = value.clone() if key == "step" else value.to(weights[name].device, weights[name].dtype, copy=True)
        moments.setdefault(name, {})[key] = moment
    for name, found in moments.items():
        optimizer.state[weights[name]] = found


def trained_weights(network: nn.Module) -> dict[str, Tensor]:
    """The weights that require a gradient, by name."""
    return {name: weight.detach() for name, weight in network.named_parameters() if weight.requires_grad}


@torch.no_grad()
def restore_weights(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `trained_weights`.

    Raises:
        ValueError: other weights than the ones that this network trains, or other shapes.
    """
    wanted = trained_weights(network)
    ours, theirs = ({name: tuple(x.shape) for name, x in each.items()} for each in (wanted, tensors))
    if ours != theirs:
        name = min(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise ValueError(
            f"the checkpoint is of another network: {name} is {theirs.get(name)} there, {ours.get(name)} here; "
            "go on with the model and LoRA that it was made with, or start in another folder"
        )
    for name, weight in wanted.items():
        weight.copy_(tensors[name])


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
