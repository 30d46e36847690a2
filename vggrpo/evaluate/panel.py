"""All judges together: what is asked of every video that is evaluated."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from geometry.types import GeometryModel
from vggrpo.evaluate.judges import judge, open_video
from vggrpo.evaluate.referee import load_judge, referee_says
from vggrpo.evaluate.sfm import sfm
from vggrpo.evaluate.value import NA, Value

When = Literal["large", "always", "never"]
"""For frames of 256 pixels and more; for smaller ones, enlarged, too; for none."""
BY_REFEREE = ("referee/path_jerk", "referee/reprojection", "verb", "side")


@dataclass(frozen=True)
class Panel:
    """Who judges, beside the pixels."""

    referee: GeometryModel | None = None
    """None: what it would say is N/A."""
    fov: float | None = None
    """Field of view (degrees across the image) that a focal length found by structure from motion is held against."""
    sfm: When = "large"
    """Whether structure from motion is tried, which takes seconds a video."""


def load_panel(referee: str | None, fov: float | None, *, sfm: When = "large") -> Panel:
    """With the referee of an asset folder, if one is named.

    Raises:
        ValueError: the folder is not what its card says; a field of view outside (0, 180).
    """
    if fov is not None and not 0 < fov < 180:
        raise ValueError(f"fov must be between 0 and 180 degrees, got {fov:g}")
    return Panel(None if referee is None else load_judge(referee), fov, sfm)


def ask(panel: Panel, video: Float[Tensor, "T 3 H W"], prompt: str | None = None) -> dict[str, Value]:
    """Every verdict on one video (RGB in [0, 1]) by name, N/A with its reason.

    Raises:
        ValueError: fewer than two frames.
    """
    told = judge(video)
    if panel.sfm != "never":
        told |= sfm(open_video(video).frames, panel.fov, enlarge=panel.sfm == "always")
    if panel.referee is None:
        return told | {name: Value(NA, "no referee was named") for name in BY_REFEREE}
    return told | referee_says(video, panel.referee, prompt)
