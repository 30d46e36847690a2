"""Token grids merged two by two, and back; sides may be odd."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def even(x: Tensor) -> Tensor:
    """Padded at the right and the bottom to even sides, for 2 x 2 merging."""
    return F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2), mode="replicate")


def whole_grid(x: Float[Tensor, "B T n fours"], size: tuple[int, int], whole: tuple[int, int]) -> Tensor:
    """Merged tokens back to `[B T fours/4 h w]`."""
    flat = x.flatten(0, 1).mT.unflatten(-1, size)
    return F.pixel_shuffle(flat, 2)[..., : whole[0], : whole[1]].unflatten(0, x.shape[:2])
