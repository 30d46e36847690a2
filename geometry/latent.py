"""The latent geometry model: a connector from video latents to the tokens of a block, then the rest of the backbone.

Latents are the *normalised* ones that samplers hold, `[*batch C L h w]`; L latent frames are T = s (L - 1) + 1 video
frames for a VAE of time stride s, causal: latent 0 is frame 0, latent i the s frames up to frame s i.

Time modes
    "frames"  a token map per video frame: latents are interpolated in time, then convolved (VIST3A, VGGRPO).
    "phases"  a token map per video frame: the convolution runs over latent frames and has its own weights for each of
              the s frames of a latent, which interpolation cannot tell apart.
    "latent"  a token map per latent frame, at video frames 0, s, 2s, ...: s times fewer tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from geometry.backbone import Grid, HookedBackbone, Tokens
from geometry.cameras import rescaled
from geometry.refiner import Refiner
from geometry.types import Geometry

TimeMode = Literal["frames", "phases", "latent"]


@dataclass(frozen=True)
class LatentSpec:
    """What a video VAE's latents are."""

    channels: int
    """Per latent position."""
    time_stride: int
    """Video frames per latent frame, after the first."""
    space_stride: int
    """Pixels per latent, along each side."""
    mean: tuple[float, ...]
    """Per channel, of the raw latents: `latents_mean` of the VAE's config."""
    std: tuple[float, ...]
    """Per channel, of the raw latents: `latents_std`."""

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == self.channels or min(self.std) <= 0:
            raise ValueError(f"mean and std (> 0) must have {self.channels} numbers, one per latent channel")

    def normalised(self, raw: Float[Tensor, "*batch C L h w"]) -> Float[Tensor, "*batch C L h w"]:
        """What samplers hold, of what the VAE's encoder returns."""
        mean, std = (raw.new_tensor(x).view(-1, 1, 1, 1) for x in (self.mean, self.std))
        return (raw - mean) / std

    def fold(
        self, weight: Float[Tensor, "out C kt kh kw"], bias: Float[Tensor, " out"]
    ) -> tuple[Float[Tensor, "out C kt kh kw"], Float[Tensor, " out"]]:
        """A convolution of raw latents as the same function of normalised ones: W(z std + mean) + b.

        Exact with replicate padding; with zeros it is not, since those mean different things in the two spaces.
        """
        mean, std = weight.new_tensor(self.mean), weight.new_tensor(self.std)
        return weight * std.view(-1, 1, 1, 1), bias + torch.einsum("ocijk,c->o", weight, mean)

    def frames(self, L: int, mode: TimeMode) -> range:
        """Video frames, of T = s (L - 1) + 1, that have a token map."""
        return range(0, self.time_stride * (L - 1) + 1, self.time_stride if mode == "latent" else 1)


class Connector(nn.Module):
    """Normalised latents -> patch tokens of a stitch point: interpolation where it is needed, and one Conv3d.

    With a `width`, a `Refiner` adds what that convolution misses (`geometry/refine.py`).

    `stride` latents per token side, or (`split`) tokens per latent side: a token finer than a latent gets weights of
    its own for each place it can have within that latent, as each frame does in the time mode "phases".
    """

    def __init__(
        self,
        latent: LatentSpec,
        dim: int,
        *,
        mode: TimeMode = "frames",
        kernel: tuple[int, int, int] | None = None,
        stride: int = 1,
        split: int = 1,
        padding: Literal["replicate", "zeros"] = "replicate",
        width: int = 0,
        blocks: int = 2,
        finish: int = 0,
        finish_width: int = 96,
    ) -> None:
        """
        Args:
            dim: width of the tokens.
            kernel: (time, rows, columns), odd; by default 5 x 3 x 3 over video frames, 3 x 3 x 3 over latent frames.
            padding: what half a kernel beyond the borders sees; the fit sees the same.
            width: of the refiner; 0 for none.
            blocks, finish, finish_width: of the refiner.
        """
        super().__init__()
        kernel = kernel or (5 if mode == "frames" else 3, 3, 3)
        if any(k % 2 == 0 for k in kernel) or min(stride, split) < 1 or max(stride, split) != stride * split:
            raise ValueError("kernel must be odd; stride and split >= 1, and one of them 1")
        self.latent, self.dim, self.mode, self.stride, self.split = latent, dim, mode, stride, split
        self.phases = latent.time_stride if mode == "phases" else 1
        self.conv = nn.Conv3d(
            latent.channels,
            self.phases * split**2 * dim,
            kernel,
            (1, stride, stride),
            (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2),
            padding_mode=padding,
        )
        self.refiner: Refiner | None = None
        if width:
            self.add_refiner(width, blocks, finish, finish_width)

    def add_refiner(self, width: int, blocks: int, finish: int = 0, finish_width: int = 96) -> None:
        """One that changes nothing yet."""
        refiner = Refiner(
            self.latent.channels,
            self.conv.out_channels,
            width,
            blocks,
            self.stride,
            dim=self.dim,
            finish=finish,
            finish_width=finish_width,
        )
        self.refiner = refiner.to(self.conv.weight)

    def grid(self, h: int, w: int) -> Grid:
        """Token rows and columns for latents of h x w: the nearest whole number (halves up), at least one."""
        rows, columns = (max(1, (side + self.stride // 2) // self.stride) * self.split for side in (h, w))
        return rows, columns

    def forward(self, z: Float[Tensor, "B C L h w"], grid: Grid | None = None) -> Float[Tensor, "B T rows columns dim"]:
        """Patch tokens; `grid` (rows, columns) if another than `self.grid(h, w)` is wanted.

        Raises:
            ValueError: latents with another number of channels, or a grid that `split` does not divide.
        """
        p, u = self.phases, self.split
        x = self.resampled(z, grid)
        maps = self.conv(x) if self.refiner is None else self.conv(x) + self.refiner(x)
        maps = maps.movedim(1, -1).unflatten(-1, (p, u, u, self.dim))
        maps = maps.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(5, 6).flatten(3, 4).flatten(1, 2)
        maps = maps[:, p - 1 :]  # latent 0 has one frame, which is the last of its group
        return maps if self.refiner is None else self.refiner.finished(maps)

    def resampled(self, z: Float[Tensor, "B C L h w"], grid: Grid | None = None) -> Float[Tensor, "B C T rows columns"]:
        """What the convolution sees: latents at every video frame ("frames"), `stride` of them per token side."""
        C, L, h, w = z.shape[1:]
        grid = grid or self.grid(h, w)
        if self.latent.channels != C:
            raise ValueError(f"latents must have {self.latent.channels} channels, got {list(z.shape)} (B C L h w)")
        if grid[0] % self.split or grid[1] % self.split:
            raise ValueError(f"a token grid of {grid} is not a multiple of split {self.split}; choose one that is")
        if self.mode == "frames" and L > 1:
            T = self.latent.time_stride * (L - 1) + 1
            z = F.interpolate(z.flatten(3), (T, h * w), mode="bilinear", align_corners=True).unflatten(3, (h, w))
        size = (grid[0] // self.split * self.stride, grid[1] // self.split * self.stride)
        if size != (h, w):  # an explicit choice of places; otherwise padding would shift them by part of a token
            z = F.interpolate(z.flatten(1, 2), size, mode="bilinear", align_corners=False).unflatten(1, (C, -1))
        return z

    def windows(self, z: Float[Tensor, "B C L h w"], grid: Grid | None = None) -> Iterator[Float[Tensor, "N columns"]]:
        """What the kernel sees at each place, one map at a time, in the order of `conv.weight.flatten(1)`'s columns."""
        half = [side for k in reversed(self.conv.kernel_size) for side in (k // 2, k // 2)]
        x = F.pad(
            self.resampled(z, grid), half, mode="replicate" if self.conv.padding_mode == "replicate" else "constant"
        )
        for axis, (k, step) in enumerate(zip(self.conv.kernel_size, self.conv.stride, strict=True), start=2):
            x = x.unfold(axis, k, step)
        for one in x.unbind(2):  # B C rows columns kt kh kw
            yield one.movedim(1, 3).flatten(0, 2).flatten(1)

    def targets(self, tokens: Float[Tensor, "B T rows columns D"]) -> Iterator[Float[Tensor, "N outputs"]]:
        """Tokens as the convolution should have put them out, one map at a time, in the order of its channels.

        The first map of the mode "phases" has the last phase only.
        """
        u, p = self.split, self.phases
        x = tokens.unflatten(3, (-1, u)).unflatten(2, (-1, u)).permute(0, 1, 2, 4, 3, 5, 6)  # B T rows columns u u D
        yield x[:, :1].movedim(1, 3).flatten(0, 2).flatten(1)
        for start in range(1, x.shape[1], p):
            yield x[:, start : start + p].movedim(1, 3).flatten(0, 2).flatten(1)


class LatentGeometryModel(nn.Module):
    """Normalised latents -> Geometry, without a decoder: `connector`, then the backbone from `point` on."""

    def __init__(
        self,
        backbone: HookedBackbone,
        point: str,
        connector: Connector,
        prefix: Float[Tensor, "P dim"] | None = None,
        *,
        recompute: bool = False,
    ) -> None:
        """
        Args:
            point: the stitch point whose output the connector stands for.
            prefix: what to start the class and register tokens at: their mean there over a dataset. Zeros by default.
            recompute: the tail's blocks in the backward pass, to save memory.
        """
        super().__init__()
        spec = backbone.spec
        spec.upto(point)
        start = torch.zeros(spec.num_prefix, spec.dim) if prefix is None else prefix.detach().clone()
        if connector.dim != spec.dim or list(start.shape) != [spec.num_prefix, spec.dim]:
            raise ValueError(
                f"{point} has {spec.num_prefix} prefix tokens of width {spec.dim}; connector or prefix differ"
            )
        self.backbone, self.point, self.connector, self.recompute = backbone, point, connector, recompute
        self.prefix = nn.Parameter(start.to(connector.conv.weight))
        self.lora: tuple[int, int] | None = None  # rank and alpha, once `distil.add_lora` has been here

    def forward(
        self, z: Float[Tensor, "*batch C L h w"], intrinsics: Float[Tensor, "*batch T 3 3"] | None = None
    ) -> Geometry:
        """Geometry at the frames of the time mode, on the pixels of the token grid times the patch.

        Args:
            intrinsics: of those frames, in pixels of the decoded video (h and w times the VAE's stride).
        """
        *batch, C, L, h, w = z.shape
        patch = self.connector(z.reshape(-1, C, L, h, w))
        _, T, rows, columns, _ = patch.shape
        if intrinsics is not None:
            p, s = self.backbone.spec.patch, self.connector.latent.space_stride
            intrinsics = rescaled(intrinsics, (h * s, w * s), (rows * p, columns * p))
        tokens = Tokens(self.prefix.expand(*batch, T, -1, -1), patch.reshape(*batch, *patch.shape[1:]))
        return self.backbone.forward_from(self.point, tokens, intrinsics, recompute=self.recompute)
