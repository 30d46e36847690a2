"""What the referee, a second geometry model that no reward may use, says of a video: its path, its world, its verb.

    path_jerk       `path.path_jerk` of the referee's cameras
    reprojection    how far the depths of different frames are from one solid world, in shares of the depth
    verb, side      1 if the camera did what the prompt says, else 0: the motion, and the motion with its side

N/A for a camera that does not travel (any depth then agrees with itself) and for a prompt without a camera verb of the
world's grammar. The embedded referee learnt from the embedded world: of other footage its numbers say little.
"""

from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from geometry.cameras import project
from geometry.types import Geometry, GeometryModel
from geometry.world.trajectory import Motion
from vggrpo.evaluate.path import path_jerk
from vggrpo.evaluate.value import NA, Value

LONGEST = 96
"""Pixels of the longer side; larger videos are scaled down to 64, which is what the referee was taught on."""
STRIDE = 4
"""Frames between the two that are compared."""
BASELINE = 0.03
"""Least distance (median depths) between two cameras whose depths are compared."""
HIDDEN = 0.2
"""Share of its depth by which a point lies behind what the other frame sees: it is hidden, not wrong."""
OVERLAP = 0.2
"""Least share of a frame's pixels that the other frame sees."""


def load_judge(folder: str | Path) -> GeometryModel:
    """The referee of an asset folder.

    Raises:
        ValueError: no card, a file that is missing, or one with other bytes than the card says.
    """
    from vggrpo.bootstrap.referee_publish import load_referee

    return load_referee(folder)


@torch.no_grad()
def referee_says(video: Float[Tensor, "T 3 H W"], referee: GeometryModel, prompt: str | None) -> dict[str, Value]:
    """Of RGB in [0, 1]; `prompt` is what the video was to show, if anybody asked for something."""
    scene = referee(_small(video)[None]).map(lambda x: x[0])
    told = {
        "referee/path_jerk": path_jerk(scene.c2w, float(scene.depth.median())),
        "referee/reprojection": reprojection(scene),
    }
    wanted = None if prompt is None else read_command(prompt)
    if wanted is None:
        reason = "no prompt" if prompt is None else "the prompt has no camera verb of the world's grammar"
        return told | {"verb": Value(NA, reason), "side": Value(NA, reason)}
    from vggrpo.bootstrap.verbs import read_motion

    (motion,), (side,) = read_motion(scene.c2w[None], scene.depth[None])
    return told | {
        "verb": Value(float(motion == wanted[0])),
        "side": Value(float((motion, side) == wanted)),
    }


def reprojection(scene: Geometry) -> Value:
    """Mean |depth here - depth there| / depth there of points that both frames see, frames `STRIDE` apart, both ways.

    All pixels count, also what is said to move: to call everything dynamic would be the way around it.
    """
    T = len(scene.depth)
    if T < 2:
        return Value(NA, "one frame has nothing to be compared with")
    stride = min(STRIDE, T - 1)
    pairs = [(i, i + stride) for i in range(T - stride)]
    centres, unit = scene.c2w[:, :3, 3], scene.depth.median()
    told: list[float] = []
    for i, j in pairs:
        if float((centres[i] - centres[j]).norm() / unit) < BASELINE:
            continue
        both = [_disagreement(scene, *way) for way in ((i, j), (j, i))]
        told += [x for x in both if x is not None]
    if len(told) < len(pairs):
        return Value(NA, "the camera hardly travels, or frames have too little in common: any depth agrees with itself")
    return Value(sum(told) / len(told))


def _disagreement(scene: Geometry, i: int, j: int) -> float | None:
    """Of the points of frame i with the depth of frame j; None without overlap."""
    H, W = scene.depth.shape[-2:]
    at, depth = project(scene.points[i].reshape(-1, 3), scene.intrinsics[j], scene.c2w[j])
    grid = (2 * at / at.new_tensor([W, H]) - 1)[None, None]
    # Bilinear in 1 / depth is exact on planes.
    near = F.grid_sample(1 / scene.depth[j][None, None], grid, align_corners=False, padding_mode="border")
    seen = 1 / near[0, 0, 0]
    usable = (depth > 0) & (at > 0.5).all(-1) & (at < at.new_tensor([W, H]) - 0.5).all(-1)
    if scene.valid is not None:
        usable &= scene.valid[i].flatten()
    usable &= depth < (1 + HIDDEN) * seen
    if float(usable.float().mean()) < OVERLAP:
        return None
    return float(((depth - seen).abs() / seen)[usable].mean())


def read_command(prompt: str) -> tuple[Motion, int] | None:
    """Motion and side that a caption of the world asks for; None for any other prompt."""
    from geometry.world.caption import CAMERA

    for motion, beginnings in CAMERA.items():
        for k, beginning in enumerate(beginnings):
            if prompt.strip().startswith(f"{beginning} "):
                return cast(Motion, motion), 0 if len(beginnings) == 1 else 2 * k - 1
    return None


def _small(video: Float[Tensor, "T 3 H W"]) -> Float[Tensor, "T 3 h w"]:
    longest = max(video.shape[-2:])
    if longest <= LONGEST:
        return video
    size = tuple(max(16, round(64 * side / longest)) for side in video.shape[-2:])
    return F.interpolate(video, size, mode="bilinear", antialias=True).clamp(0, 1)
