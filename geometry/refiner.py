"""What one convolution of latents misses of the tokens: residual ones, which begin as nothing and are then trained."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Refiner(nn.Module):
    """3 x 3 x 3 convolutions at the latents' own grid, and one map at the end: zero until it is trained."""

    def __init__(self, channels: int, outputs: int, width: int, blocks: int, stride: int = 1) -> None:
        """
        Args:
            width: channels within.
            blocks: residual ones, of two convolutions each.
            stride: latents per place of the output, along rows and columns.
        """
        super().__init__()
        self.width = width
        self.enter = _convolution(channels, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.leave = nn.Conv3d(width, outputs, (1, stride, stride), (1, stride, stride))
        nn.init.zeros_(self.leave.weight)
        assert self.leave.bias is not None
        nn.init.zeros_(self.leave.bias)

    def forward(self, z: Float[Tensor, "B C T rows columns"]) -> Float[Tensor, "B outputs T _ _"]:
        """What is added to the convolution's output; rows and columns are multiples of the stride."""
        x = self.enter(z)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.leave(F.gelu(x))
        return out


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _convolution(width, width), _convolution(width, width)

    def forward(self, x: Float[Tensor, "B width T rows columns"]) -> Float[Tensor, "B width T rows columns"]:
        return x + self.second(F.gelu(self.first(F.gelu(x))))


def _convolution(inputs: int, outputs: int) -> nn.Conv3d:
    return nn.Conv3d(inputs, outputs, 3, padding=1, padding_mode="replicate")
