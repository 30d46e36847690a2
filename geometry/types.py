"""What a camera saw: the one type that the whole house speaks, and THE legend of conventions.

Frames and axes
    OpenCV camera: x right, y down, z forward. Poses are `c2w`; the world is frame 0's camera, so `c2w[0] = I`.
    Depth is z-depth (not distance along the ray), > 0, in scene units unless a model is metric.
    Pixel centres lie at +0.5: the top-left pixel covers [0, 1) x [0, 1) and is centred on (0.5, 0.5).
    `intrinsics` are in pixels of the depth grid they come with (never called K: K is the group size).
Shapes
    `*batch` leading axes; `T` frames; `H`, `W` pixels of its grid. Video is `[*batch T 3 H W]` RGB in [0, 1].
Validity
    `valid` False: nothing was seen there (sky, padding); depth is then a finite placeholder that nobody may use.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

FlowGrid = Literal["frame", "first"]


@dataclass(frozen=True)
class Geometry:
    """Cameras, depth, points and motion of a clip, or of a batch of clips."""

    c2w: Float[Tensor, "*batch T 4 4"]
    """Camera to world, rigid; `c2w[0] = I`."""
    intrinsics: Float[Tensor, "*batch T 3 3"]
    """Pinhole, in pixels of this depth grid."""
    depth: Float[Tensor, "*batch T H W"]
    """z-depth > 0, scene units."""
    points: Float[Tensor, "*batch T H W 3"]
    """World position of the point seen at each pixel."""
    confidence: Float[Tensor, "*batch T H W"] | None = None
    """In [0, 1]."""
    valid: Bool[Tensor, "*batch T H W"] | None = None
    """False where nothing was seen. None: every pixel counts."""
    scene_flow: Float[Tensor, "*batch T H W 3"] | None = None
    """Displacement of points in world axes; on which pixels and between which frames, `flow_grid` says."""
    flow_grid: FlowGrid | None = None
    """"frame": pixel of frame i, displacement i -> i+1. "first": pixel of frame 0, displacement 0 -> i (Any4D)."""

    @property
    def batch(self) -> torch.Size:
        """The leading axes, `()` for one clip."""
        return self.depth.shape[:-3]

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Geometry":
        """The same geometry with `fn` applied to every tensor: `scene.map(lambda x: x[0])` is the first of a batch."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: fn(x) for name, x in tensors.items() if isinstance(x, Tensor)}
        return replace(self, **changed)


@runtime_checkable
class GeometryModel(Protocol):
    """Anything that turns RGB video into geometry."""

    def __call__(self, video: Float[Tensor, "*batch T 3 H W"]) -> Geometry: ...


def check_geometry(scene: Geometry) -> None:
    """Refuse a geometry that breaks the legend above, naming the field.

    Values that are not finite pass: they say that *this clip* cannot be scored (its reward is NaN), not that the caller
    is wrong. Everything finite must be right.

    Raises:
        ValueError: a shape that does not fit the others, a `c2w` that is not a rigid motion, intrinsics that are not a
            pinhole's, depth <= 0 at a valid pixel, scene flow without its grid (or the reverse).
    """
    _check_shapes(scene)
    if (scene.scene_flow is None) != (scene.flow_grid is None):
        raise ValueError("scene_flow and flow_grid go together: give both or neither")
    rotation, bottom = scene.c2w[..., :3, :3], scene.c2w[..., 3, :]
    finite = scene.c2w.isfinite().all(-1).all(-1)
    gram = (rotation.mT @ rotation - torch.eye(3, dtype=rotation.dtype, device=rotation.device)).abs().amax((-2, -1))
    if (finite & (gram > 1e-3)).any() or (finite & (torch.linalg.det(rotation.nan_to_num()) < 0)).any():
        raise ValueError("c2w[..., :3, :3] must be rotations (R'R = I, det R = +1)")
    if (finite[..., None] & (bottom != bottom.new_tensor([0.0, 0.0, 0.0, 1.0]))).any():
        raise ValueError("c2w[..., 3, :] must be (0, 0, 0, 1)")
    focal = scene.intrinsics.diagonal(dim1=-2, dim2=-1)
    if (focal <= 0).any() or (scene.intrinsics[..., 2, :2] != 0).any():
        raise ValueError("intrinsics must be [[fx, s, cx], [0, fy, cy], [0, 0, 1]] with fx, fy > 0, in pixels")
    behind = scene.depth <= 0
    if (behind if scene.valid is None else behind & scene.valid).any():
        raise ValueError("depth must be > 0 (z-depth) wherever valid is True")


def _check_shapes(scene: Geometry) -> None:
    if scene.depth.ndim < 3:
        raise ValueError(f"depth must be [*batch T H W], got {list(scene.depth.shape)}")
    *batch, T, H, W = scene.depth.shape
    expected = {
        "c2w": [*batch, T, 4, 4],
        "intrinsics": [*batch, T, 3, 3],
        "points": [*batch, T, H, W, 3],
        "confidence": [*batch, T, H, W],
        "valid": [*batch, T, H, W],
        "scene_flow": [*batch, T, H, W, 3],
    }
    for name, shape in expected.items():
        value = getattr(scene, name)
        if value is not None and list(value.shape) != shape:
            raise ValueError(f"{name} must be {shape} to go with depth {[*batch, T, H, W]}, got {list(value.shape)}")
