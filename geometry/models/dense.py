"""From tokens back to pixels: depth, confidence, what moves, and how."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

CHANNELS = 6
"""Log-depth, confidence logit, dynamic logit, scene flow (3)."""


class DenseHead(nn.Module):
    """Tokens at two resolutions and features per pixel -> `CHANNELS` maps per pixel."""

    def __init__(self, dim: int, patch: int, features: int, width: int = 24) -> None:
        super().__init__()
        self.patch = patch
        self.mix = nn.Conv2d(dim, 2 * width, 3, padding=1, padding_mode="replicate")
        self.spread = nn.Conv2d(2 * width, width * (patch // 2) ** 2, 1)
        self.narrow = nn.Conv2d(width + features, width, 3, padding=1, padding_mode="replicate")
        self.out = nn.Conv2d(width, 4 * CHANNELS, 3, padding=1, padding_mode="replicate")
        nn.init.trunc_normal_(self.out.weight, std=0.005)
        assert self.out.bias is not None
        nn.init.zeros_(self.out.bias)

    def forward(
        self, tokens: Float[Tensor, "n dim h w"], features: Float[Tensor, "n features H W"]
    ) -> Float[Tensor, "n channels H W"]:
        """Half the resolution of the pixels carries most of the work; the last step is a pixel shuffle."""
        x = F.gelu(self.mix(tokens))
        x = F.pixel_shuffle(self.spread(x), self.patch // 2)
        x = F.gelu(self.narrow(torch.cat([x, F.avg_pool2d(features, 2)], dim=1)))
        return F.pixel_shuffle(self.out(x), 2)
