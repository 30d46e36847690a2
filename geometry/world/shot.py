"""What decides the pixels of a batch of clips, as tensors. Stage axes are those of `scene.py`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from jaxtyping import Float, Int
from torch import Tensor

SHAPE_CODES = {"box": 0, "sphere": 1, "cylinder": 2}
PATTERN_CODES = {"noise": 0, "checker": 1, "stripes": 2, "gradient": 3}
NUM_WALLS = 6


@dataclass(frozen=True)
class Shot:
    """Everything that decides the pixels of a batch of B clips, in stage axes (`scene.py`). N bodies, T frames."""

    camera: Float[Tensor, "B T 4 4"]
    """Camera to stage."""
    c2w: Float[Tensor, "B T 4 4"]
    """Camera to world: the same path seen from frame 0."""
    world: Float[Tensor, "B 4 4"]
    """Stage to world."""
    intrinsics: Float[Tensor, "B 3 3"]
    """Pixels of the video."""
    room: Float[Tensor, "B 2 3"]
    """Corners of the room; on open ground only the floor, `room[1, 1]`, counts."""
    indoors: Int[Tensor, " B"]
    shape: Int[Tensor, "B N"]
    """`SHAPE_CODES`, or -1 where a clip has fewer bodies."""
    half: Float[Tensor, "B N 3"]
    pose: Float[Tensor, "B T N 4 4"]
    """Body to stage at each frame."""
    motion: Float[Tensor, "B T N 4 4"]
    """Its motion in world axes until the next frame, less the identity: scene flow is `motion` times the point."""
    material: Float[Tensor, "B T M 14"]
    """Pattern, cell, two colours (3 each), offset (3), cosine and sine of the turn, fade; walls, then bodies."""
    sky: Float[Tensor, "B 2 3"]
    light: Float[Tensor, "B 3"]

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Shot":
        """The same shot with `fn` applied to every tensor."""
        return replace(self, **{f.name: fn(getattr(self, f.name)) for f in fields(self)})

    def at(self, frames: Sequence[int]) -> "Shot":
        """The same shot with only these frames, in this order; `c2w` and `motion` stay in the same world."""
        over_time = ("camera", "c2w", "pose", "motion", "material")
        return replace(self, **{name: getattr(self, name)[:, list(frames)] for name in over_time})
