"""The camera path that goes with each prompt, and the reward for following it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from geometry.types import Geometry
from rewards import camera_following
from vggrpo.trainer import OfCondition
from vggrpo.types import Condition


def read_paths(file: str, prompts: Sequence[str], frames: int) -> Float[Tensor, "N T 4 4"]:
    """The commanded c2w of each prompt, world = frame 0, in any unit: "c2w" of a safetensors file.

    Raises:
        ValueError: no such file, or not a path of rigid motions for every prompt and frame.
    """
    try:
        found = load_file(Path(file))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read camera paths from {file}: {error}") from None
    expected = [len(prompts), frames, 4, 4]
    if "c2w" not in found or list(found["c2w"].shape) != expected:
        shapes = {name: list(value.shape) for name, value in found.items()}
        raise ValueError(f"{file} must hold c2w {expected}, one path for each prompt, got {shapes}")
    c2w = found["c2w"].float()
    rotation = c2w[..., :3, :3]
    off = (rotation.mT @ rotation - torch.eye(3)).abs().amax()
    if not (off < 1e-3 and (torch.linalg.det(rotation) > 0).all() and c2w.isfinite().all()):
        raise ValueError(f"{file}: c2w[..., :3, :3] must be rotations (R'R = I, det R = +1)")
    return c2w


def follow() -> OfCondition:
    """`camera_following` of the path that each condition asks for, at the frames that the scene has."""

    def reward(scene: Geometry, cond: Condition) -> Tensor:
        if cond.camera is None:
            raise ValueError("camera_following needs a camera path for each prompt: set video.cameras")
        T, seen = cond.camera.shape[1], scene.c2w.shape[-3]
        stride = max((T - 1) // max(seen - 1, 1), 1)  # a scene of latent frames has every fourth
        return camera_following(scene, cond.camera[:, None, ::stride])

    return OfCondition(reward)
