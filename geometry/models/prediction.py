"""All that the embedded network finds, before it becomes a `Geometry`."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from geometry.models.correlation import Correspondence


class Prediction(NamedTuple):
    """Everything that the losses ask for. h, w: tokens; poses are camera i+1 in camera i."""

    correspondence: Correspondence
    coarse_log_depth: Float[Tensor, "B T h w"]
    coarse_dynamic: Float[Tensor, "B T h w"]
    """Logit."""
    coarse_relative: Float[Tensor, "B pairs 4 4"]
    relative: Float[Tensor, "B pairs 4 4"]
    c2w: Float[Tensor, "B T 4 4"]
    intrinsics: Float[Tensor, "B T 3 3"]
    log_focal: Float[Tensor, " B"]
    """Estimated: log of focal / width, also where intrinsics were given."""
    guess: Float[Tensor, "B T H W"]
    """Log-depth before parallax was looked at."""
    log_depth: Float[Tensor, "B T H W"]
    confidence: Float[Tensor, "B T H W"]
    """Logit that the depth is within a factor 1.1."""
    dynamic: Float[Tensor, "B T H W"]
    """Logit that the point moves by itself."""
    motion: Float[Tensor, "B T H W 3"]
    """To the next frame, in the axes of the frame's own camera, if it does."""
