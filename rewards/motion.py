"""How steadily the camera moves, and that it moves at all."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from geometry.types import Geometry, check_geometry
from rewards.base import length, median_depth, ratio, steps


class MotionErrors(NamedTuple):
    """Acceleration over speed at each inner frame, in [0, 1]."""

    translation: Float[Tensor, "*batch inner"]
    rotation: Float[Tensor, "*batch inner"]


def motion_errors(scene: Geometry, *, floor: float = 0.06) -> MotionErrors:
    """Of every frame but the first and the last: |a| / max(|v| + |v'|, floor), for translation and for rotation.

    v and v' are the camera's steps into and out of the frame, a = v' - v (VGGRPO, arXiv 2603.26599, motion reward;
    rotation steps are SO(3) logarithms of R_i^T R_{i+1}).

    Args:
        scene: a clip or a batch of clips; at least 3 frames, or there is nothing to return.
        floor: the speed below which a camera counts as standing still: radians per two frames for rotation, the same
            number of median depths for translation. It changes nothing for a camera that moves faster; for one that
            does not, an *estimated* pose's noise would otherwise be judged as if it were motion: on poses with 0.15
            degrees of noise the paper's form ranks calm clips almost in reverse (`benchmarks/motion_floor.py`, which
            chose the default). 0 is the paper's form; then, too, what does not move at all has no error (0/0 is 0).

    Raises:
        ValueError: a geometry that breaks the conventions, or floor < 0.
    """
    check_geometry(scene)
    if floor < 0:
        raise ValueError(f"floor must be >= 0, got {floor}")
    velocity, omega = steps(scene)
    unit = median_depth(scene)[..., None] if floor > 0 else torch.zeros_like(scene.depth[..., 0, 0, :1])
    return MotionErrors(_jolt(velocity, floor * unit), _jolt(omega, torch.full_like(unit, floor)))


def motion_smoothness(scene: Geometry, *, floor: float = 0.06) -> Float[Tensor, "*batch"]:
    """r = 1/2 (1/(1 + e_trans) + 1/(1 + e_rot)), in [1/2, 1]; 1 is a camera of constant velocity, or one that rests.

    e is the mean over frames of acceleration over speed (VGGRPO, arXiv 2603.26599, motion reward). A camera that only
    turns has e_trans = 0, so its half of the reward is full, and the other way round. A still camera scores 1: use
    `camera_motion_floor` beside it. NaN below 3 frames, and where poses or (with a floor) depth are not finite.

    Args and errors as in `motion_errors`.
    """
    errors = motion_errors(scene, floor=floor)
    half = [1 / (1 + error.mean(dim=-1)) for error in errors]  # the mean of no frames is NaN
    return (half[0] + half[1]) / 2


def camera_motion(scene: Geometry, *, stride: int = 1) -> Float[Tensor, "*batch"]:
    """Mean of how far the camera gets in `stride` frames: translation in median depths plus rotation in radians.

    From frame to frame (1) shake counts as motion; over several frames it hardly does. A shorter clip is taken from its
    first frame to its last. NaN for T < 2.

    Raises:
        ValueError: a geometry that breaks the conventions, or stride < 1.
    """
    check_geometry(scene)
    if stride < 1:
        raise ValueError(f"stride must be >= 1, got {stride}")
    velocity, omega = steps(scene, min(stride, max(scene.c2w.shape[-3] - 1, 1)))
    return (length(velocity) / median_depth(scene)[..., None] + length(omega)).mean(dim=-1)


def camera_motion_floor(
    scene: Geometry, *, floor: float | Float[Tensor, "#*batch"] = 0.01, stride: int = 1
) -> Float[Tensor, "*batch"]:
    """min(0, motion/floor - 1), in [-1, 0]: 0 for a camera that moves at least `floor`, -1 for a frozen one.

    The anti-freeze term (the hinge of WorldAlign, arXiv 2610.12382, made scale-free); motion is `camera_motion`. Unlike
    the others it says nothing about a camera that moves enough, so that it cannot be won by shaking.

    Args:
        scene: a clip or a batch of clips.
        floor: one for all, or one for each clip, such as the motion that a model had before it was trained
            (`vggrpo/base_motion.py`).
        stride: frames over which motion is measured.

    Raises:
        ValueError: a geometry that breaks the conventions, floor <= 0 or stride < 1.
    """
    lowest = float(torch.as_tensor(floor).min())
    if not lowest > 0:
        raise ValueError(f"floor must be > 0, got {lowest:g}")
    return (camera_motion(scene, stride=stride) / floor - 1).clamp(max=0)


def motion_prior(
    scene: Geometry, base: float | Float[Tensor, "#*batch"], *, width: float = 0.5, stride: int = 8, still: float = 0.01
) -> Float[Tensor, "*batch"]:
    """exp(-(log m - log base)^2 / (2 width^2)), in [0, 1]: 1 for a camera that moves as much as the base model's.

    A Gaussian gate around the base model's own motion (Stream4D, arXiv 2608.19556, has one of scene flow), in log
    motion: half as much costs what twice as much does. m is `camera_motion`. NaN where that is.

    Args:
        scene: a clip or a batch of clips.
        base: motion, of one for all or of each clip, before the model was trained (`vggrpo/base_motion.py`), over the
            same stride.
        width: of the gate, in log motion: at 0.5, twice or half the motion has a reward of 0.38.
        stride: frames over which motion is measured.
        still: less motion than this counts as this much, here and there; so a frozen clip is as far from its base as
            noise allows, and a camera that is to stand still has done so.

    Raises:
        ValueError: a geometry that breaks the conventions, base < 0, width <= 0, still <= 0 or stride < 1.
    """
    wanted = torch.as_tensor(base, dtype=scene.depth.dtype, device=scene.depth.device)
    if not (wanted >= 0).all() or width <= 0 or still <= 0:
        raise ValueError(
            f"base must be >= 0, width and still > 0, got {float(wanted.min()):g}, {width:g} and {still:g}"
        )
    apart = camera_motion(scene, stride=stride).clamp(min=still).log() - wanted.clamp(min=still).log()
    return torch.exp(-(apart**2) / (2 * width**2))


def _jolt(step: Float[Tensor, "*batch pairs 3"], floor: Float[Tensor, "*batch 1"]) -> Float[Tensor, "*batch inner"]:
    before, after = step[..., :-1, :], step[..., 1:, :]
    return ratio(length(after - before), torch.maximum(length(after) + length(before), floor))
