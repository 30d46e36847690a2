"""A geometry transformer of VGGT's size and block layout with random weights, which cost what trained ones do.

In our own words after its public description (arXiv 2503.11651): a DINOv2 encoder, camera and register tokens, pairs of
blocks within a frame and over all of them, a camera head that refines four times, a DPT head for depth which sees
four of the pairs, some frames at a time. Rotary positions and norms of queries and keys are left out: they cost
little. `geometry.models.vggt` drives it as it would drive the real one.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH, REGISTERS = 14, 4


@dataclass(frozen=True)
class Size:
    """Widths and depths."""

    dim: int = 1024
    heads: int = 16
    encoder: int = 24
    """Blocks of the encoder."""
    pairs: int = 24
    """Blocks within a frame, and as many over all frames."""
    trunk: int = 4
    """Blocks of the camera head, of twice the width."""
    features: int = 256
    """Channels in the DPT head."""
    channels: tuple[int, int, int, int] = (256, 512, 1024, 1024)
    """What the DPT head makes of the four pairs that it sees."""
    read: tuple[int, int, int, int] = (4, 11, 17, 23)
    """Those pairs."""
    chunk: int = 8
    """Frames that the DPT head sees together."""


VGGT_1B = Size()
TINY = Size(16, 2, 2, 2, 1, 8, (8, 8, 8, 8), (0, 0, 1, 1), 4)


class Block(nn.Module):
    """Attention and a feed-forward layer, before norm; called with positions by keyword, as VGGT's is."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Encoder(nn.Module):
    """Frames [n 3 H W] -> patch tokens [n N C]."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, size.dim, PATCH, PATCH)
        self.cls_token = nn.Parameter(torch.randn(1, 1, size.dim))
        self.register_tokens = nn.Parameter(torch.randn(1, REGISTERS, size.dim))
        self.blocks = nn.ModuleList([Block(size.dim, size.heads) for _ in range(size.encoder)])
        self.norm = nn.LayerNorm(size.dim)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed.proj(images).flatten(2).mT
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in (self.cls_token, self.register_tokens)), x], dim=1)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)[:, 1 + REGISTERS :]
        return out


class CameraHead(nn.Module):
    """The camera token of every frame -> translation, quaternion, two fields of view."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        dim = 2 * size.dim
        self.trunk = nn.ModuleList([Block(dim, size.heads) for _ in range(size.trunk)])
        self.embed, self.out = nn.Linear(9, dim), nn.Linear(dim, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B S 2C] -> [B S 9]."""
        start = tokens.new_tensor([0, 0, 0, 0, 0, 0, 1, 0.8, 0.8])
        code = start.expand(*tokens.shape[:2], 9)
        for _ in range(4):
            x = tokens + self.embed(code)
            for block in self.trunk:
                x = block(x)
            code = code + 0.1 * torch.tanh(self.out(x))
        return torch.cat([code[..., :7], code[..., 7:].clamp(0.3, 1.5)], dim=-1)


class Fusion(nn.Module):
    """Two residual units of two convolutions, then twice the size."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.units = nn.ModuleList(
            nn.Sequential(nn.ReLU(), nn.Conv2d(features, features, 3, padding=1), nn.ReLU(),
                          nn.Conv2d(features, features, 3, padding=1))
            for _ in range(2)
        )  # fmt: skip
        self.out = nn.Conv2d(features, features, 1)

    def forward(self, x: Tensor, skip: Tensor | None, size: tuple[int, int]) -> Tensor:
        if skip is not None:
            x = x + skip + self.units[0](skip)
        x = x + self.units[1](x)
        out: Tensor = self.out(F.interpolate(x, size, mode="bilinear", align_corners=True))
        return out


class DepthHead(nn.Module):
    """DPT: the tokens of four pairs -> log-depth and confidence at every pixel."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        wide, features = 2 * size.dim, size.features
        self.chunk = size.chunk
        self.norm = nn.LayerNorm(wide)
        self.project = nn.ModuleList(nn.Conv2d(wide, channels, 1) for channels in size.channels)
        a, b, _, d = size.channels
        self.resize = nn.ModuleList(
            [nn.ConvTranspose2d(a, a, 4, 4), nn.ConvTranspose2d(b, b, 2, 2), nn.Identity(), nn.Conv2d(d, d, 3, 2, 1)]
        )
        self.narrow = nn.ModuleList(nn.Conv2d(channels, features, 3, padding=1) for channels in size.channels)
        self.fuse = nn.ModuleList(Fusion(features) for _ in size.channels)
        self.halved = nn.Conv2d(features, features // 2, 3, padding=1)
        self.last = nn.Sequential(nn.Conv2d(features // 2, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 2, 1))

    def forward(self, seen: list[Tensor], grid: tuple[int, int]) -> Tensor:
        """Four of [n N 2C] -> [n 2 H W]."""
        chunks = zip(*(x.split(self.chunk) for x in seen), strict=True)
        return torch.cat([self._some(list(some), grid) for some in chunks])

    def _some(self, seen: list[Tensor], grid: tuple[int, int]) -> Tensor:
        parts = zip(seen, self.project, self.resize, self.narrow, strict=True)
        maps = [narrow(resize(project(self.norm(x).mT.unflatten(2, grid)))) for x, project, resize, narrow in parts]
        sizes = [m.shape[-2:] for m in maps]
        x = self.fuse[3](maps[3], None, sizes[2])
        x = self.fuse[2](x, maps[2], sizes[1])
        x = self.fuse[1](x, maps[1], sizes[0])
        x = self.fuse[0](x, maps[0], (2 * sizes[0][0], 2 * sizes[0][1]))
        full = (grid[0] * PATCH, grid[1] * PATCH)
        out: Tensor = self.last(F.interpolate(self.halved(x), full, mode="bilinear", align_corners=True))
        return out


class VggtSized(nn.Module):
    """What `geometry.models.vggt` takes."""

    def __init__(self, size: Size = VGGT_1B) -> None:
        super().__init__()
        self.size = size
        self.aggregator = nn.Module()
        self.aggregator.patch_embed = Encoder(size)
        for kind in ("frame_blocks", "global_blocks"):
            setattr(self.aggregator, kind, nn.ModuleList(Block(size.dim, size.heads) for _ in range(size.pairs)))
        self.aggregator.camera_token = nn.Parameter(torch.randn(2, 1 + REGISTERS, size.dim))
        self.camera_head, self.depth_head = CameraHead(size), DepthHead(size)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """[B S 3 H W] in [0, 1]."""
        B, S, _, H, W = images.shape
        parts, grid = self.aggregator, (H // PATCH, W // PATCH)
        x = parts.patch_embed((images.flatten(0, 1) - 0.45) / 0.225)
        special = torch.cat([parts.camera_token[:1], parts.camera_token[1:].expand(S - 1, -1, -1)])
        x = torch.cat([special.repeat(B, 1, 1), x], dim=1)
        seen: dict[int, Tensor] = {}
        for k, (frame, world) in enumerate(zip(parts.frame_blocks, parts.global_blocks, strict=True)):
            x = local = frame(x, pos=None)
            x = world(x.unflatten(0, (B, S)).flatten(1, 2), pos=None).unflatten(1, (S, -1)).flatten(0, 1)
            if k in self.size.read:
                seen[k] = torch.cat([local, x], dim=-1)
        last = seen[max(seen)]
        maps = self.depth_head([seen[k][:, 1 + REGISTERS :] for k in self.size.read], grid).unflatten(0, (B, S))
        return {
            "pose_enc": self.camera_head(last[:, 0].unflatten(0, (B, S))),
            "depth": (0.1 * maps[:, :, 0]).exp()[..., None],
            "depth_conf": 1 + maps[:, :, 1].exp(),
        }
