"""A run's folder: what was asked for, what happened, and where it can go on.

recipe.yaml     the recipe with every default in it
run.jsonl       versions, commit, hardware, ranks: one entry for every start
metrics.jsonl   one line for every iteration
tensorboard/    the same numbers
checkpoints/    `checkpoint.py`
videos/         samples of a video model, by iteration, if the recipe asks for them
average/        its LoRA's average, likewise
"""

import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from vggrpo.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from vggrpo.config import Recipe
from vggrpo.recipe import recipe_from

MAY_CHANGE = (
    *("out", "checkpoint_every", "keep", "max_minutes", "trackers", "grpo.num_iterations"),
    *("launch.num_processes", "launch.engine", "video.sample_every", "video.sample_prompts", "video.prompt_cache"),
)
"""Keys in which a resumed run may differ from its recipe before."""
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "deepspeed", "safetensors", "vggrpo")


class Session:
    """The folder of one run. On ranks other than the first it only reads."""

    def __init__(self, recipe: Recipe, *, writes: bool) -> None:
        self.recipe, self.writes = recipe, writes
        self.folder = Path(recipe.out)
        self._tensorboard: Any = None

    def find(self, *, resume: bool) -> Checkpoint | None:
        """What there is to go on from, before anything is built; None for a new run.

        Raises:
            ValueError: a run that is there already without `resume`, or none with it; a checkpoint that is damaged or
                was made by another recipe, and in which keys they differ.
        """
        found = load_checkpoint(self.folder / "checkpoints")
        if found is None and resume:
            raise ValueError(f"{self.folder} has no checkpoint to resume: start without --resume")
        if not resume and (found is not None or (self.folder / "metrics.jsonl").exists()):
            raise ValueError(f"{self.folder} holds a run already: --resume it, or give another `out`")
        if found is not None:
            # Through the dataclasses, so that a key that is newer than the checkpoint has its default.
            was = _plain(recipe_from(found.state["recipe"], f"the recipe in {self.folder}"))
            differing = _differences(was, _plain(self.recipe))
            if differing:
                raise ValueError(
                    f"{self.folder} was made by another recipe ({'; '.join(differing)}): "
                    "restore it, or give another `out`"
                )
        return found

    def begin(self, first: int, launched: Mapping[str, Any]) -> None:
        """Write down what starts here: the number of the first iteration, and what `launched` says of the processes."""
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(_plain(self.recipe), sort_keys=False))
        self._append("run.jsonl", _circumstances(first) | dict(launched))
        self._forget(first)

    def note(self, numbers: Mapping[str, int | float]) -> None:
        """One iteration's numbers."""
        if not self.writes:
            return
        self._append("metrics.jsonl", dict(numbers))
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self.folder / "tensorboard"))
        for name, value in numbers.items():
            self._tensorboard.add_scalar(name, value, int(numbers["step"]))

    def save(self, iteration: int, tensors: dict[str, dict[str, Tensor]]) -> None:
        """A checkpoint from which `iteration` is the next one.

        Raises:
            OSError: it cannot be written; the ones before it are as they were.
        """
        if not self.writes:
            return
        state = {"iteration": iteration, "recipe": _plain(self.recipe)}
        save_checkpoint(self.folder / "checkpoints", iteration, Checkpoint(state, tensors), self.recipe.keep)

    def close(self) -> None:
        """Nothing more will be noted."""
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _append(self, name: str, content: dict[str, Any]) -> None:
        with (self.folder / name).open("a") as file:
            file.write(json.dumps(content) + "\n")

    def _forget(self, first: int) -> None:
        """Iterations that are made again are noted again: their old lines go."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] < first]
            path.write_text("".join(f"{line}\n" for line in lines))


def _plain(recipe: Recipe) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    return plain


def _differences(was: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> list[str]:
    """ "key: was -> now" of all keys that may not differ and do."""
    found = []
    for key in sorted(was.keys() | now.keys()):
        name, old, new = f"{where}{key}", was.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{name}.")
        elif old != new and name not in MAY_CHANGE:
            found.append(f"{name}: {old!r} there, {new!r} here")
    return found


def _circumstances(first: int) -> dict[str, Any]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "first_iteration": first,
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
    }


def _commit() -> str | None:
    """Of the code that runs, with "+" if it was changed; None where it is not a git checkout."""
    here = Path(__file__).parent
    try:
        asked = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        return subprocess.run(asked, cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
