"""The referee: a second geometry model, of another make than the embedded one. No reward may ever use it.

    video -> displacements between frames 1, 2 and 4 apart, from pixels (referee_flow.py)     nothing learnt
          -> convolutional U-Net over frames, with convolutions over time    log-depth, its doubt, what moves, and
                                                                             how good a witness each displacement is
          -> bundle adjustment over the whole clip (bundle.py)               cameras and depths of cells, jointly
          -> the same network again, which now sees what the cameras leave unexplained -> bundle adjustment again

The network is taught by the world's truth directly: no gradient passes through the adjustment. It has no tokens that a
latent could be stitched into, so it is a plain module and no `HookedBackbone`. Depth is in units of about the clip's
median depth. Focal lengths are given, or taken from `DEFAULT_FOV`. With the model that it judges it shares the maths of
`geometry/cameras.py` and nothing else.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from geometry.cameras import pinhole, pixel_grid, unproject
from geometry.models.referee_cameras import Cameras, Impression, adjust, sideways
from geometry.models.referee_flow import CELL, STRIDES, Tracks, edges, follow
from geometry.types import Geometry

DEFAULT_FOV = 62.0
"""Degrees across the image where no intrinsics are given: the middle of the world's."""
MULTIPLE = 16
"""Pixels; sides are padded to multiples of it."""
SLOTS = 2 * len(STRIDES)
"""Frames that a frame is compared with, at most."""
CUES = 9 * SLOTS + 2
"""Maps per cell: see `_cues`."""
WITNESS = (-3.0, 5.0)
"""Range of `Impression.witness`."""
DOUBT = (-4.0, 1.0)
"""Range of `Impression.log_doubt`."""


@dataclass(frozen=True)
class RefereeConfig:
    """Widths of the network."""

    widths: tuple[int, int, int, int] = (24, 48, 80, 112)
    """Channels at a half, a quarter, an eighth and a sixteenth of the size."""


class Opinion(NamedTuple):
    """All that the referee finds."""

    first: Impression
    last: Impression
    cameras: Cameras
    motion: Float[Tensor, "B T h w 3"]
    """Of points until the next frame, in world axes, across the line of sight; before it is weighed by `dynamic`."""


class Residual(nn.Module):
    """Two convolutions over space and, where `temporal`, one over time."""

    def __init__(self, dim: int, *, temporal: bool) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, dim)
        self.first = nn.Conv2d(dim, dim, 3, padding=1)
        self.second = nn.Conv2d(dim, dim, 3, padding=1)
        self.time = nn.Conv3d(dim, dim, (3, 1, 1), padding=(1, 0, 0), padding_mode="replicate") if temporal else None
        nn.init.zeros_(self.second.weight)
        if self.time is not None:
            nn.init.zeros_(self.time.weight)

    def forward(self, x: Float[Tensor, "n C h w"], T: int) -> Float[Tensor, "n C h w"]:
        """Frames of a clip follow one another on the first axis."""
        y = F.gelu(self.norm(x))
        x = x + self.second(F.gelu(self.first(y)))
        if self.time is None:
            return x
        return x + self.time(y.unflatten(0, (-1, T)).transpose(1, 2)).transpose(1, 2).flatten(0, 1)


class Referee(nn.Module):
    """Video -> Geometry; a `geometry.types.GeometryModel`."""

    def __init__(self, config: RefereeConfig = RefereeConfig()) -> None:
        super().__init__()
        self.config = config
        a, b, c, d = config.widths
        self.stem = nn.Conv2d(5, a, 5, stride=2, padding=2)
        self.early_half = Residual(a, temporal=False)
        self.to_quarter = nn.Conv2d(a, b, 3, stride=2, padding=1)
        self.cues = nn.Conv2d(CUES, b, 3, padding=1)
        self.quarter = nn.ModuleList([Residual(b, temporal=True), Residual(b, temporal=False)])
        self.to_eighth = nn.Conv2d(b, c, 3, stride=2, padding=1)
        self.eighth = nn.ModuleList([Residual(c, temporal=True), Residual(c, temporal=True)])
        self.to_sixteenth = nn.Conv2d(c, d, 3, stride=2, padding=1)
        self.sixteenth = nn.ModuleList([Residual(d, temporal=True), Residual(d, temporal=True)])
        self.scene = nn.Linear(d, d)
        self.merge_eighth = nn.Conv2d(d + c, c, 1)
        self.late_eighth = Residual(c, temporal=True)
        self.merge_quarter = nn.Conv2d(c + b, b, 1)
        self.late_quarter = Residual(b, temporal=True)
        self.witness = nn.Conv2d(b, SLOTS, 1)
        self.merge_half = nn.Conv2d(b + a, a, 1)
        self.late_half = Residual(a, temporal=False)
        self.out = nn.Conv2d(a, 4 * 3, 3, padding=1)
        for head in (self.witness, self.out):
            nn.init.trunc_normal_(head.weight, std=0.01)
            assert head.bias is not None
            nn.init.zeros_(head.bias)

    def forward(
        self, video: Float[Tensor, "*batch T 3 H W"], intrinsics: Float[Tensor, "*batch T 3 3"] | None = None
    ) -> Geometry:
        """Geometry of RGB in [0, 1], on its own pixels, which `intrinsics` are in; without gradient.

        Raises:
            ValueError: sides below 16 pixels.
        """
        (*batch, T, _, H, W) = video.shape
        if min(H, W) < MULTIPLE:
            raise ValueError(f"the referee needs sides of at least {MULTIPLE} pixels, got {H} x {W}")
        if intrinsics is None:
            intrinsics = pinhole(video.new_full((), DEFAULT_FOV), H, W)
        intrinsics = intrinsics.expand(*batch, T, 3, 3).reshape(-1, T, 3, 3)
        wide = F.pad(video.reshape(-1, 3, H, W), (0, -W % MULTIPLE, 0, -H % MULTIPLE), mode="replicate")
        wide = wide.unflatten(0, (-1, T))
        with torch.no_grad():
            found = self.judge(wide, follow(wide), intrinsics)
        return parse(found, intrinsics, (H, W)).map(lambda x: x.unflatten(0, batch) if batch else x[0])

    def judge(self, video: Float[Tensor, "B T 3 H W"], tracks: Tracks, intrinsics: Float[Tensor, "B T 3 3"]) -> Opinion:
        """Both rounds; only the two impressions carry gradients. Sides are multiples of `MULTIPLE`."""
        first = self.look(video, tracks, intrinsics, None)
        cameras = adjust(first, tracks, intrinsics, None)
        change = cameras.log_depth - F.avg_pool2d(first.log_depth.detach(), CELL)
        last = self.look(video, tracks, intrinsics, (cameras.slip, change))
        cameras = adjust(last, tracks, intrinsics, cameras.c2w)
        return Opinion(first, last, cameras, sideways(cameras, tracks, intrinsics))

    def look(
        self,
        video: Float[Tensor, "B T 3 H W"],
        tracks: Tracks,
        intrinsics: Float[Tensor, "B T 3 3"],
        known: tuple[Tensor, Tensor] | None,
    ) -> Impression:
        """One round of the network; `known`: slip of each displacement and change of log-depth in the adjustment."""
        B, T = video.shape[:2]
        image = torch.cat([2 * video - 1, _rays(intrinsics, video)], dim=2).flatten(0, 1)
        half = self.early_half(self.stem(image), T)
        quarter = self.to_quarter(F.gelu(half)) + self.cues(_cues(tracks, T, known).flatten(0, 1))
        for block in self.quarter:
            quarter = block(quarter, T)
        eighth = self.to_eighth(F.gelu(quarter))
        for block in self.eighth:
            eighth = block(eighth, T)
        x = self.to_sixteenth(F.gelu(eighth))
        x = x + self.scene(x.unflatten(0, (B, T)).mean((1, 3, 4))).repeat_interleave(T, 0)[..., None, None]
        for block in self.sixteenth:
            x = block(x, T)
        x = self.late_eighth(self.merge_eighth(torch.cat([_twice(x), eighth], dim=1)), T)
        x = self.late_quarter(self.merge_quarter(torch.cat([_twice(x), quarter], dim=1)), T)
        witness = self.witness(F.gelu(x)).unflatten(0, (B, T))
        x = self.late_half(self.merge_half(torch.cat([_twice(x), half], dim=1)), T)
        maps = F.pixel_shuffle(self.out(F.gelu(x)), 2).unflatten(0, (B, T))
        return Impression(
            maps[:, :, 0],
            (maps[:, :, 1] - 1.0).clamp(*DOUBT),
            maps[:, :, 2],
            witness.flatten(1, 2)[:, tracks.source * SLOTS + _slots(tracks, T)].clamp(*WITNESS),
        )


def parse(found: Opinion, intrinsics: Float[Tensor, "B T 3 3"], size: tuple[int, int]) -> Geometry:
    """In the conventions of `geometry/types.py`, without the padding."""
    H, W = size
    depth = found.last.log_depth[..., :H, :W].exp()
    motion = F.interpolate(
        found.motion.movedim(-1, 2).flatten(0, 1), scale_factor=float(CELL), mode="bilinear", align_corners=False
    )
    motion = motion.unflatten(0, depth.shape[:2]).movedim(2, -1)[..., :H, :W, :]
    c2w = found.cameras.c2w
    return Geometry(
        c2w,
        intrinsics,
        depth,
        unproject(depth, intrinsics, c2w),
        confidence=torch.exp(-found.last.log_doubt[..., :H, :W].exp()),
        scene_flow=motion * found.last.dynamic[..., :H, :W].sigmoid()[..., None],
        flow_grid="frame",
    )


def _cues(tracks: Tracks, T: int, known: tuple[Tensor, Tensor] | None) -> Float[Tensor, "B T CUES h w"]:
    """Of each cell and each frame that its own is compared with, zero where there is none: displacement, how sharp it
    is and in which direction, how far it is from leading back, that it exists, and what the cameras leave of it. Then
    how the adjustment changed its depth, and whether there was one."""
    B, _, h, w, _ = tracks.flow.shape
    slot = _slots(tracks, T)
    pace = tracks.flow.new_tensor(STRIDES)[slot // 2][:, None, None]
    xx, xy, yy = (tracks.information[..., i, j] for i, j in ((0, 0), (0, 1), (1, 1)))
    total = (xx + yy).clamp(min=1e-4)
    flow = tracks.flow / (2 * pace[..., None])
    slip = torch.zeros_like(flow) if known is None else (known[0] / 2).clamp(-3, 3)
    maps = [*flow.unbind(-1), total.log() / 4, (xx - yy) / total, 2 * xy / total, tracks.loop.clamp(max=4) / 2]
    values = torch.stack([*maps, torch.ones_like(total), *slip.unbind(-1)], dim=2)
    table = values.new_zeros(B, T * SLOTS, *values.shape[2:]).index_copy(1, tracks.source * SLOTS + slot, values)
    change = values.new_zeros(B, T, 2, h, w)
    if known is not None:
        change = torch.stack([known[1].clamp(-1, 1), torch.ones_like(known[1])], dim=2)
    return torch.cat([table.unflatten(1, (T, SLOTS)).flatten(2, 3), change], dim=2)


def _slots(tracks: Tracks, T: int) -> Int[Tensor, " E"]:
    return edges(T)[2].to(tracks.source.device)


def _rays(intrinsics: Float[Tensor, "B T 3 3"], video: Float[Tensor, "B T 3 H W"]) -> Float[Tensor, "B T 2 H W"]:
    """Direction of every pixel: where it is in the image and how wide the view is, in one."""
    entry = intrinsics[:, :, None, None]
    pixels = pixel_grid(video.shape[-2], video.shape[-1], video)
    x, y = ((pixels[..., k] - entry[..., k, 2]) / entry[..., k, k] for k in (0, 1))
    return 2 * torch.stack([x, y], dim=2)


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
