"""Experiment trackers beyond the run's own files: those of accelerate, by name."""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from vggrpo.config import Recipe

PROJECT = "vggrpo"


class Trackers:
    """All trackers of a recipe. Only the main process speaks to them."""

    def __init__(self, accelerator: Accelerator, recipe: Recipe) -> None:
        """Raises ValueError for a tracker that is not installed."""
        self.trackers: list[GeneralTracker] = []
        for name in recipe.trackers:
            if importlib.util.find_spec(name) is None:
                raise ValueError(f"trackers: {name} is not installed: pip install {name}, or leave it out")
        if not accelerator.is_main_process:
            return
        for name in recipe.trackers:
            tracker = LOGGER_TYPE_TO_CLASS[name](PROJECT, name=Path(recipe.out).name)
            tracker.start()
            tracker.store_init_configuration(json.loads(json.dumps(asdict(recipe))))
            self.trackers.append(tracker)

    def note(self, numbers: Mapping[str, int | float]) -> None:
        """One iteration's numbers."""
        for tracker in self.trackers:
            tracker.log(dict(numbers), step=int(numbers["step"]))

    def close(self) -> None:
        """Nothing more will be noted."""
        for tracker in self.trackers:
            tracker.finish()
