"""`vggrpo train`: a run from its first iteration, or from where it was left, with all that is kept of it."""

import atexit
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vggrpo.average import AVERAGE, follow, start_average
from vggrpo.bootstrap.progress import Progress
from vggrpo.build import Parts, build
from vggrpo.config import Recipe
from vggrpo.control import is_control
from vggrpo.launch import described
from vggrpo.progress import bar, shares
from vggrpo.session import Session
from vggrpo.sharded import restore_moments, whole_moments, whole_weights
from vggrpo.signals import STATUS, Interrupted, Signals
from vggrpo.trackers import Trackers
from vggrpo.trainer import OfBoth, OfCondition, OfRollout, RewardFn, train
from vggrpo.types import Condition, Rollout


class Training:
    """A run under way: its parts, its folder, and how far it is."""

    def __init__(self, recipe: Recipe, *, resume: bool, allow_import: bool = False) -> None:
        """Raises ValueError for everything that is wrong with the recipe, the launch or what is in the folder."""
        self.recipe = recipe
        self.session = Session(recipe, writes=int(os.environ.get("RANK", 0)) == 0)
        found = self.session.find(resume=resume)
        self.parts: Parts = build(
            recipe, weights=None if found is None else found.tensors["weights"], allow_import=allow_import
        )
        self.run = self.parts.run
        self.main = self.session.writes = self.run.accelerator.is_main_process
        self.bare = self.run.accelerator.unwrap_model(self.parts.network)
        if found is not None:
            restore_moments(self.bare, self.parts.optimizer, found.tensors["optimizer"], self.run.engine)
        self.done = 0 if found is None else int(found.state["iteration"])
        """Iterations whose update has been made."""
        weights = whole_weights(self.bare, self.run.engine)
        average = None if found is None else found.tensors[AVERAGE] if recipe.optimizer.ema is not None else None
        self.average = None if recipe.optimizer.ema is None else start_average(weights, average)
        self.progress = Progress()
        self.history: list[dict[str, float]] = []
        """Seconds of each phase."""
        self.trackers = Trackers(self.run.accelerator, recipe)

    def go(self) -> int:
        """Train to the end; the exit status. A signal ends it sooner, with a checkpoint."""
        recipe, run, session = self.recipe, self.run, self.session
        session.begin(self.done, {"num_processes": run.accelerator.num_processes, "engine": run.engine})
        if self.main:
            print(described(run.accelerator), file=sys.stderr)
            if is_control(recipe.grpo.weights):
                print("CONTROL: the reward is random; nothing can be learnt from it", file=sys.stderr)
            if "epipolar" in self.parts.rewards:
                print("epipolar is a reward: the Sampson judges of vggrpo evaluate do not count", file=sys.stderr)
        todo = itertools.islice(self.parts.conditions, self.done, recipe.grpo.num_iterations)
        rewards = {name: self._polled(reward) for name, reward in self.parts.rewards.items()}
        status, deadline = 0, time.monotonic() + 60 * (recipe.max_minutes or math.inf)
        with Signals() as signals:
            run.asked_to_stop = lambda: signals.received is not None

            def poll(*_: Any) -> None:
                """Where a single process can be left: at every forward pass. Several agree after every micro-batch."""
                if run.accelerator.num_processes == 1 and run.updates == run.boundary:
                    signals.poll()

            watched = self.bare.register_forward_pre_hook(poll)
            try:
                policy, optimizer = self.parts.policy, self.parts.optimizer
                for numbers in train(
                    policy, self.parts.geometry, rewards, todo, optimizer, run, recipe.grpo, self.done
                ):
                    self._after(numbers)
                    if run.any(signals.received is not None):
                        raise Interrupted
                    if recipe.max_minutes and run.updates == run.boundary and run.any(time.monotonic() >= deadline):
                        break
            except Interrupted:
                status = STATUS
            finally:
                watched.remove()
                session.close()
                self.trackers.close()
        self.keep()
        if self.main and self.history:
            print(shares(self.history))
        if run.accelerator.num_processes > 1:
            run.accelerator.wait_for_everyone()
            atexit.register(_part)
        return status

    def keep(self) -> None:
        """A checkpoint, and the LoRA beside it. All ranks call it, for weights and moments may be in parts."""
        weights = whole_weights(self.bare, self.run.engine)
        tensors = {
            "weights": weights,
            "optimizer": whole_moments(self.bare, self.parts.optimizer, self.run.engine),
        }
        if self.average is not None:
            tensors[AVERAGE] = self.average
        self.session.save(self.done, tensors)
        if self.recipe.video is not None and self.main:
            self._export(weights, "")
            if self.average is not None:
                self._export(self.average, AVERAGE)

    def _after(self, numbers: Mapping[str, int | float]) -> None:
        """What follows an iteration; `done` counts those that end with an update."""
        run, recipe = self.run, self.recipe
        updated = "grad_norm" in numbers
        if updated:
            self.done, run.boundary = int(numbers["step"]) + 1, run.updates
            if self.average is not None and recipe.optimizer.ema is not None:
                follow(self.average, whole_weights(self.bare, run.engine), recipe.optimizer.ema)
        self.session.note(numbers)
        self.trackers.note(numbers)
        self.history.append({name: x for name, x in numbers.items() if name.startswith("seconds/")})
        if self.main:
            self.progress(bar(int(numbers["step"]) + 1, recipe.grpo.num_iterations, self.history, numbers))
            if not self.progress.terminal:
                print("  ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
        if updated and recipe.video is not None and _due(self.done, recipe.video.sample_every):
            from vggrpo.preview import preview

            preview(recipe, recipe.video, self.parts.policy, self.session.folder / f"videos/{self.done:06d}", self.main)
        if updated and _due(self.done, recipe.checkpoint_every):
            self.keep()

    def _export(self, weights: dict[str, Tensor], where: str) -> None:
        from vggrpo.policy.wan_folder import save_loras

        save_loras(self.bare, self.session.folder / where, weights)

    def _polled(self, reward: RewardFn) -> RewardFn:
        """The same reward, before which ranks agree whether to stop; one that is asked early is not held up."""

        def judged(scene: Any, *more: Condition | Rollout) -> Tensor:
            self.run.agree()
            return fn(scene, *more)

        if isinstance(reward, OfRollout):
            return reward
        if isinstance(reward, OfCondition | OfBoth):
            fn: Callable[..., Tensor] = reward.reward
            return type(reward)(judged)
        fn = reward
        return judged


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _part() -> None:
    """Close the process group, of whose threads a finished rank could crash; gloo may leave some (torch 2.13)."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
