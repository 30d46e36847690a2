"""Any pretrained geometry transformer, driven through forward hooks: run whole, read at a block, entered at a block.

A model is described by a `BackboneSpec` and two functions, `call` and `parse`; nothing of it is copied or subclassed.

    image --embed--> block 0 --> ... --> block k --> ... --> last block --> heads --> Geometry
                                            ^ a stitch point: `tokens_at` reads its output, `forward_from` replaces it

To enter at block k the module runs on an empty image of the right size, blocks 0..k hand their input on, and a hook
puts the given tokens in the place of block k's output. Position embeddings are added before block 0, so they are *not*
added to what enters at k. It is exact (difference 0.0: `tests/geometry/test_backbone.py`).
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from geometry.cameras import rescaled
from geometry.hooks import hooked
from geometry.types import Geometry

Grid = tuple[int, int]
"""Rows and columns of patch tokens."""
Call = Callable[[nn.Module, Tensor, Tensor | None], Any]
"""(module, images [B T 3 H W], intrinsics [B T 3 3] in pixels of those images, or None) -> raw output."""
Parse = Callable[[Any, tuple[int, int]], Geometry]
"""(raw output, (H, W) of the images) -> Geometry [B T ...] in the conventions of `geometry/types.py`."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Tokens(NamedTuple):
    """Output of one block."""

    prefix: Float[Tensor, "*batch T P C"]
    """Class and register tokens, which stand before the patches."""
    patch: Float[Tensor, "*batch T h w C"]


@dataclass(frozen=True)
class BackboneSpec:
    """What `HookedBackbone` must know of a module."""

    patch: int
    """Pixels per side of a patch."""
    dim: int
    """Width of a token at the stitch points."""
    num_prefix: int
    """Class and register tokens before the patches, at the stitch points."""
    blocks: tuple[str, ...]
    """Module paths of all transformer blocks, in the order they run. Up to the stitch point they are skipped; after it
    they take LoRA, and are what is recomputed under checkpointing."""
    stitch_points: tuple[str, ...]
    """Those of them where the model may be entered: frame-wise blocks before the first whose output a head also reads.
    They return [B*T, N, C] or [B, T, N, C], as a tensor, or first in a tuple or list."""
    normalisation: Literal["unit", "imagenet"] = "imagenet"
    """Of the images that `call` gets: [0, 1] as they are, or less ImageNet's mean over its deviation."""
    heads: tuple[str, ...] = ()
    """Modules beside the blocks that run after every stitch point and take LoRA as well."""
    matched: tuple[str, ...] = ()
    """Modules after every stitch point whose output (the first tensor of it) distillation may ask for as well: dense
    intermediate results, such as a correspondence, say more of what is wrong than a few poses do."""
    frames_first: bool = False
    """Blocks return frame 0 of all clips, then frame 1, ... on the first axis of [B*T, N, C] (Any4D)."""

    def __post_init__(self) -> None:
        order = [self.blocks.index(p) if p in self.blocks else -1 for p in self.stitch_points]
        if not order or -1 in order or order != sorted(set(order)):
            raise ValueError(f"stitch_points must be some of blocks, in their order, got {self.stitch_points}")

    def upto(self, point: str) -> tuple[str, ...]:
        """Blocks that need not run when the model is entered at `point`, itself included."""
        return self.blocks[: self._index(point) + 1]

    def after(self, point: str) -> tuple[str, ...]:
        """Blocks that run when the model is entered at `point`: the tail."""
        return self.blocks[self._index(point) + 1 :]

    def _index(self, point: str) -> int:
        if point not in self.stitch_points:
            raise ValueError(f"{point!r} is not a stitch point; choose from {', '.join(self.stitch_points)}")
        return self.blocks.index(point)


class _AllFound(Exception):
    """Ends a pass: what comes after the last block that is asked for, which is most of the model, need not run."""


class HookedBackbone(nn.Module):
    """A geometry model `(video) -> Geometry` that can also be read and entered at its stitch points.

    Not for several threads: hooks belong to the module, and one call at a time may have them.
    """

    def __init__(self, module: nn.Module, spec: BackboneSpec, call: Call, parse: Parse) -> None:
        """
        Raises:
            ValueError: a module of the spec that does not exist.
        """
        super().__init__()
        known = {name for name, _ in module.named_modules()}
        missing = [path for path in (*spec.blocks, *spec.heads, *spec.matched) if path not in known]
        if missing:
            raise ValueError(f"{type(module).__name__} has no module {missing[0]!r}; correct the spec")
        self.module, self.spec, self._call, self._parse = module, spec, call, parse

    def forward(
        self, video: Float[Tensor, "*batch T 3 H W"], intrinsics: Float[Tensor, "*batch T 3 3"] | None = None
    ) -> Geometry:
        """`forward_rgb` on the nearest token grid."""
        return self.forward_rgb(video, intrinsics)

    def forward_rgb(
        self,
        video: Float[Tensor, "*batch T 3 H W"],
        intrinsics: Float[Tensor, "*batch T 3 3"] | None = None,
        grid: Grid | None = None,
    ) -> Geometry:
        """Geometry of RGB in [0, 1], on the pixels of the token grid times the patch.

        Args:
            intrinsics: in pixels of this video, for models that can use them.
            grid: tokens (rows, columns) that the video is resized to; by default the nearest to its own size.
        """
        images, intrinsics = self._images(video, intrinsics, grid)
        return self._run(images, intrinsics, video.shape[:-4])

    def tokens_at(
        self,
        points: Sequence[str],
        video: Float[Tensor, "*batch T 3 H W"],
        intrinsics: Float[Tensor, "*batch T 3 3"] | None = None,
        grid: Grid | None = None,
    ) -> dict[str, Tokens]:
        """Outputs of the blocks at `points` in one pass, which ends there; arguments as in `forward_rgb`.

        Raises:
            ValueError: a point that is not one, or whose block does not run or returns another layout.
        """
        images, intrinsics = self._images(video, intrinsics, grid)
        B, T, _, H, W = images.shape
        h, w = H // self.spec.patch, W // self.spec.patch
        found: dict[str, Tensor] = {}

        def keep(point: str, block: nn.Module, args: Any, output: Any) -> None:
            found[point] = self._tensor(point, output, (B, T, h * w))
            if len(found) == len(points):
                raise _AllFound

        for point in points:
            self.spec.upto(point)
        with suppress(_AllFound), hooked(self.module, {point: partial(keep, point) for point in points}):
            self._call(self.module, images, intrinsics)
        batch, P = (*video.shape[:-4], T), self.spec.num_prefix
        ordered = {point: self._clips_first(found[point], (T, B)) for point in points}
        whole = {point: x.reshape(*batch, P + h * w, self.spec.dim) for point, x in ordered.items()}
        return {point: Tokens(x[..., :P, :], x[..., P:, :].unflatten(-2, (h, w))) for point, x in whole.items()}

    def forward_from(
        self,
        point: str,
        tokens: Tokens,
        intrinsics: Float[Tensor, "*batch T 3 3"] | None = None,
        *,
        skip: bool = True,
        recompute: bool = False,
    ) -> Geometry:
        """Geometry when the output of the block at `point` is `tokens`.

        Args:
            intrinsics: in pixels of the token grid times the patch.
            skip: do not run the blocks up to the point. What comes out is the same.
            recompute: recompute the tail's blocks in the backward pass (less memory, a third more time); the same too.

        Raises:
            ValueError: tokens of the wrong shape, a point that is not one, or a module that cuts the gradient.
        """
        *batch, T, h, w, C = tokens.patch.shape
        expected = [*batch, T, self.spec.num_prefix, self.spec.dim]
        if list(tokens.prefix.shape) != expected or self.spec.dim != C:
            raise ValueError(f"tokens at {point} must have prefix {expected}, got {list(tokens.prefix.shape)} and {C}")
        whole = torch.cat([tokens.prefix, tokens.patch.flatten(-3, -2)], dim=-2).reshape(-1, T, expected[-2] + h * w, C)
        B, size = len(whole), (h * self.spec.patch, w * self.spec.patch)
        images = whole.new_zeros(1, 1, 3, *size).expand(B, T, 3, *size)
        if intrinsics is not None:
            intrinsics = intrinsics.reshape(B, T, 3, 3)

        wanted = torch.is_grad_enabled() and whole.requires_grad

        def inject(block: nn.Module, args: Any, output: Any) -> Any:
            if wanted and not torch.is_grad_enabled():
                raise ValueError(
                    f"block {point} runs without gradients: checkpointing with use_reentrant=True (which would lose "
                    "the tokens) or no_grad; turn that off in the module"
                )
            old = self._tensor(point, output, (B, T, h * w))
            new = self._clips_first(whole.reshape(old.shape), (B, T)).to(old.dtype)
            return type(output)([new, *output[1:]]) if isinstance(output, list | tuple) else new

        passed = self.spec.upto(point) if skip else ()
        with hooked(self.module, {point: inject}, passed, self.spec.after(point) if recompute else ()):
            scene = self._run(images, intrinsics, torch.Size(batch))
        outputs = [x for x in vars(scene).values() if isinstance(x, Tensor)]
        if wanted and not any(x.requires_grad for x in outputs):
            raise ValueError(f"no output depends on the tokens at {point}: something after it cuts the gradient")
        return scene

    def _run(self, images: Tensor, intrinsics: Tensor | None, batch: torch.Size) -> Geometry:
        raw = self._call(self.module, images, intrinsics)
        with torch.autocast(images.device.type, enabled=False):  # a pose times a point is no work for bf16
            scene = self._parse(raw, (images.shape[-2], images.shape[-1]))
        return scene.map(lambda x: x.reshape(*batch, *x.shape[1:]))

    def _images(
        self, video: Tensor, intrinsics: Tensor | None, grid: Grid | None
    ) -> tuple[Float[Tensor, "B T 3 H W"], Tensor | None]:
        """What `call` gets: a batch axis, whole patches, the model's normalisation."""
        *_, T, _, H, W = video.shape
        patch = self.spec.patch
        rows, columns = grid or (max(1, round(H / patch)), max(1, round(W / patch)))
        size = (rows * patch, columns * patch)
        images = video.reshape(-1, 3, H, W)
        if size != (H, W):
            images = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        if self.spec.normalisation == "imagenet":
            mean, std = (images.new_tensor(x).view(3, 1, 1) for x in IMAGENET)
            images = (images - mean) / std
        if intrinsics is not None:
            intrinsics = rescaled(intrinsics.reshape(-1, T, 3, 3), (H, W), size)
        return images.reshape(-1, T, 3, *size), intrinsics

    def _clips_first(self, x: Tensor, axes: tuple[int, int]) -> Tensor:
        """[T*B, N, C] as [B*T, N, C], or (with the axes the other way round) back; other layouts as they are."""
        frames_first = self.spec.frames_first and x.ndim == 3
        return x.unflatten(0, axes).transpose(0, 1).flatten(0, 1) if frames_first else x

    def _tensor(self, point: str, output: Any, shape: tuple[int, int, int]) -> Tensor:
        """The tensor in a block's output, which must be [B*T, N, C] or [B, T, N, C]."""
        (B, T, patches), C = shape, self.spec.dim
        N = patches + self.spec.num_prefix
        tensor = output[0] if isinstance(output, list | tuple) else output
        if list(tensor.shape) not in ([B * T, N, C], [B, T, N, C]):
            raise ValueError(
                f"block {point} returns {list(tensor.shape)}; the spec (patch, dim, num_prefix) promises "
                f"{[B * T, N, C]} or {[B, T, N, C]}"
            )
        return tensor
