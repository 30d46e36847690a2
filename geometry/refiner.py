"""What one convolution of latents misses of the tokens: residual ones, which begin as nothing and are then trained."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Refiner(nn.Module):
    """3 x 3 x 3 convolutions at the latents' own grid and one map at the end; then blocks that see the tokens.

    The first know what is in the latents, the second what neighbouring tokens and frames agree on. Both are zero until
    they are trained.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        width: int,
        blocks: int,
        stride: int = 1,
        *,
        dim: int,
        finish: int = 0,
        finish_width: int = 96,
    ) -> None:
        """
        Args:
            width: channels within.
            blocks: residual ones, of two convolutions each.
            stride: latents per place of the output, along rows and columns.
            dim: width of a token.
            finish: residual blocks on the tokens, at their own grid.
            finish_width: channels within those.
        """
        super().__init__()
        self.width, self.finish_width = width, finish_width
        self.enter = _convolution(channels, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.leave = _nothing(nn.Conv3d(width, outputs, (1, stride, stride), (1, stride, stride)))
        self.finish = nn.ModuleList(_Finish(dim, finish_width) for _ in range(finish))

    def sizes(self) -> dict[str, int]:
        """What `Connector` needs to make another one like it."""
        counts = {"blocks": len(self.blocks), "finish": len(self.finish)}
        return {"width": self.width, "finish_width": self.finish_width} | counts

    def forward(self, z: Float[Tensor, "B C T rows columns"]) -> Float[Tensor, "B outputs T _ _"]:
        """What is added to the convolution's output; rows and columns are multiples of the stride."""
        x = self.enter(z)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.leave(F.gelu(x))
        return out

    def finished(self, tokens: Float[Tensor, "B T rows columns dim"]) -> Float[Tensor, "B T rows columns dim"]:
        """Tokens, which the convolution and `forward` made, after the blocks that see them."""
        x = tokens.movedim(-1, 1)
        for block in self.finish:
            x = block(x)
        return x.movedim(1, -1)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _convolution(width, width), _convolution(width, width)

    def forward(self, x: Float[Tensor, "B width T rows columns"]) -> Float[Tensor, "B width T rows columns"]:
        return x + self.second(F.gelu(self.first(F.gelu(x))))


class _Finish(nn.Module):
    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.enter = _convolution(dim, width, (1, 3, 3))
        self.time = _convolution(width, width, (3, 1, 1))
        self.leave = _nothing(_convolution(width, dim, (1, 3, 3)))

    def forward(self, x: Float[Tensor, "B dim T rows columns"]) -> Float[Tensor, "B dim T rows columns"]:
        inner = F.gelu(self.enter(x))
        return x + self.leave(F.gelu(inner + self.time(inner)))


def _convolution(inputs: int, outputs: int, kernel: tuple[int, int, int] = (3, 3, 3)) -> nn.Conv3d:
    half = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    return nn.Conv3d(inputs, outputs, kernel, padding=half, padding_mode="replicate")


def _nothing(convolution: nn.Conv3d) -> nn.Conv3d:
    """The same with zero for an answer."""
    nn.init.zeros_(convolution.weight)
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    return convolution
