"""Linear codes: principal components and least squares, and what 16 components keep of a block of video.

The start of the video VAE is made of the first two; the third is what the VAE has to beat.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

COMPONENTS = 16
"""As many as the VAE has channels."""
ROWS = 60_000
"""Positions that a least-squares fit is given; more change nothing."""


def principal(
    x: Float[Tensor, "*rows C"], count: int
) -> tuple[Float[Tensor, "components C"], Float[Tensor, " components"]]:
    """The first principal directions about zero (the mean is a component like any other) and their mean squares."""
    rows = x.reshape(-1, x.shape[-1]).double()
    size, axes = torch.linalg.eigh(rows.T @ rows / len(rows))
    return axes.flip(1)[:, :count].T.to(x.dtype), size.flip(0)[:count].clamp(min=1e-9).to(x.dtype)


def least_squares(
    x: Float[Tensor, "*rows C"], y: Float[Tensor, "*rows D"], ridge: float = 1e-4
) -> tuple[Float[Tensor, "D C"], Float[Tensor, " D"]]:
    """Weight and intercept of the ridge regression of y on x, on at most `ROWS` evenly spaced rows."""
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    step = max(1, len(x) // ROWS)
    x, y = x[::step].double(), y[::step].double()
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    gram = x.T @ x / len(x)
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, x.T @ y / len(x)).T.float()
    return weight[:, :-1].contiguous(), weight[:, -1].contiguous()


def block_components(
    footage: UInt8[Tensor, "N T 3 H W"],
) -> tuple[Float[Tensor, " pixels"], Float[Tensor, "components pixels"]]:
    """Mean and principal components of blocks of 4 frames x 8 x 8 pixels, on at most 256 clips."""
    step = max(1, len(footage) // 256)
    blocks = blocks_of(footage[::step, 1:].float() / 255).flatten(0, -2)
    mean = blocks.mean(0)
    return mean, principal(blocks - mean, COMPONENTS)[0]


def through_components(
    video: Float[Tensor, "B T C H W"], mean: Float[Tensor, " pixels"], axes: Float[Tensor, "components pixels"]
) -> Float[Tensor, "B T-1 C H W"]:
    """All frames but the first, as the linear code keeps them."""
    B, T, C, H, W = video.shape
    blocks = blocks_of(video[:, 1:])
    seen = (blocks - mean) @ axes.T @ axes + mean
    seen = seen.view(B, (T - 1) // 4, H // 8, W // 8, 4, C, 8, 8).permute(0, 1, 4, 5, 2, 6, 3, 7)
    return seen.reshape(B, T - 1, C, H, W)


def blocks_of(video: Float[Tensor, "B T C H W"]) -> Float[Tensor, "B times rows columns pixels"]:
    """Cut into blocks of 4 frames x 8 x 8 pixels, each a vector."""
    B, T, C, H, W = video.shape
    cut = video.reshape(B, T // 4, 4, C, H // 8, 8, W // 8, 8)
    return cut.permute(0, 1, 4, 6, 2, 3, 5, 7).flatten(4)
