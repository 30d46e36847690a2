"""Alternating attention: blocks that see one frame, and blocks that see all frames of a clip."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Block(nn.Module):
    """Pre-norm transformer block with layer scale, over any one axis of tokens."""

    def __init__(self, dim: int, heads: int, ratio: int = 2, scale: float = 0.3) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, ratio * dim), nn.Linear(ratio * dim, dim)
        for last in (self.out, self.down):
            nn.init.trunc_normal_(last.weight, std=scale * dim**-0.5)
            nn.init.zeros_(last.bias)

    def forward(self, x: Float[Tensor, "n tokens dim"]) -> Float[Tensor, "n tokens dim"]:
        """One block."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Alternating(nn.Module):
    """`pairs` times a frame block and a global block."""

    def __init__(self, dim: int, heads: int, pairs: int) -> None:
        super().__init__()
        self.frame = nn.ModuleList([Block(dim, heads) for _ in range(pairs)])
        self.world = nn.ModuleList([Block(dim, heads) for _ in range(pairs)])

    def forward(self, x: Float[Tensor, "B T tokens dim"]) -> Float[Tensor, "B T tokens dim"]:
        """Within frames, then across them."""
        B, T, n, _ = x.shape
        for frame, world in zip(self.frame, self.world, strict=True):
            x = frame(x.flatten(0, 1)).unflatten(0, (B, T))
            x = world(x.flatten(1, 2)).unflatten(1, (T, n))
        return x
