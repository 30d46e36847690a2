"""Rewards beside those of a geometry alone, as a recipe names them: told ones, imported ones, remote ones."""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor

from geometry.types import Geometry
from rewards import REWARDS
from vggrpo.base_motion import prior_of
from vggrpo.camera_paths import follow
from vggrpo.config import VideoConfig
from vggrpo.decoded import Decoder
from vggrpo.matches import epipolar_of
from vggrpo.remote import remote_reward
from vggrpo.trainer import OfBoth, OfRollout, RewardFn
from vggrpo.types import Rollout

TOLD = ("motion_prior", "camera_following", "epipolar")
"""Shipped rewards that a recipe tells something beside the geometry."""
GROUP = "vggrpo.rewards"
"""Of the entry points that packages may give their rewards."""


def further_rewards(
    video: VideoConfig,
    weights: Mapping[str, float] | None,
    motion: Mapping[str, float],
    decode: Decoder,
    *,
    allow_import: bool,
) -> dict[str, RewardFn]:
    """`motion_prior`, `camera_following`, `epipolar`, and the recipe's `imported` and `remote` rewards, by name.

    Nothing is imported, loaded or asked where there are none.

    Args:
        motion: the base model's, of each prompt; it may still be empty.

    Raises:
        ValueError: one without a weight or with a shipped one's name, code that nobody allowed, a path that leads
            nowhere, `motion_prior` without samples to measure motion in, `camera_following` without paths, `epipolar`
            without two frames to match.
    """
    named = weights or {}
    if "motion_prior" in named and video.motion_samples == 0:
        raise ValueError("motion_prior needs the base model's own motion: set video.motion_samples")
    if ("camera_following" in named) != (video.cameras is not None):
        raise ValueError("video.cameras and the reward camera_following go together: give both or neither")
    if "epipolar" in named and video.epipolar.stride >= video.frames:
        raise ValueError(f"video.epipolar.stride must be less than video.frames, got {video.epipolar.stride}")
    found: dict[str, RewardFn] = {
        "motion_prior": prior_of(motion),
        "camera_following": follow(),
        "epipolar": epipolar_of(video.epipolar, decode),
    }
    for name in (*video.imported, *video.remote):
        if name in REWARDS or name in found or (name in video.imported and name in video.remote):
            raise ValueError(f"video: there are two rewards {name!r}: give this one another name")
        if name not in named:
            raise ValueError(f"video: reward {name!r} has no weight: add it to grpo.weights, or leave it out")
    for name, remote in video.remote.items():
        found[name] = remote_reward(name, remote, decode)
    for name, wanted in video.imported.items():
        if not allow_import:
            raise ValueError(
                f"reward {name!r} would run code that is not this project's, {wanted.path}:"
                " give --allow-import if you trust it"
            )
        fn = import_reward(wanted.path)
        if wanted.takes == "geometry":
            found[name] = of_geometry(name, fn)
        else:
            found[name] = (of_video if wanted.takes == "video" else of_both)(name, fn, decode)
    return found


def import_reward(path: str) -> Callable[..., Any]:
    """The function at "package.module:function", or of the installed entry point of that name.

    Raises:
        ValueError: there is none, or what is there cannot be called.
    """
    module, colon, name = path.partition(":")
    try:
        if colon:
            fn = getattr(import_module(module), name)
        else:
            known = {point.name: point for point in entry_points(group=GROUP)}
            if path not in known:
                there = ", ".join(sorted(known)) or "none"
                raise ValueError(
                    f"no reward {path!r}: give package.module:function, or an entry point of {GROUP} (there: {there})"
                )
            fn = known[path].load()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import the reward {path}: {error}") from error
    if not callable(fn):
        raise ValueError(f"the reward {path} is not a function but a {type(fn).__name__}")
    checked: Callable[..., Any] = fn
    return checked


def of_geometry(name: str, fn: Callable[[Geometry], Tensor]) -> Callable[[Geometry], Tensor]:
    """A reward scene [B K ...] -> [B K]."""
    return lambda scene: _tensor(name, fn(scene), scene.depth)


def of_video(name: str, fn: Callable[[Tensor, list[str]], Tensor], decode: Callable[[Tensor], Tensor]) -> OfRollout:
    """A reward (video [B K T 3 H W] in [0, 1], B prompts) -> [B K]; decoded when it is its turn."""

    def score(rollout: Rollout) -> Tensor:
        return _tensor(name, fn(decode(rollout.z0), rollout.cond.prompt), rollout.z0)

    return OfRollout(lambda rollout: partial(score, rollout))


def of_both(
    name: str, fn: Callable[[Geometry, Tensor, list[str]], Tensor], decode: Callable[[Tensor], Tensor]
) -> OfBoth:
    """A reward (scene [B K ...], video [B K T 3 H W] in [0, 1], B prompts) -> [B K]; decoded when it is its turn."""

    def score(scene: Geometry, rollout: Rollout) -> Tensor:
        return _tensor(name, fn(scene, decode(rollout.z0), rollout.cond.prompt), rollout.z0)

    return OfBoth(score)


def _tensor(name: str, value: Any, like: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"reward {name!r} must give a tensor [B K], got a {type(value).__name__}")
    return value.to(like.device, torch.float32)
