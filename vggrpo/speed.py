"""How long an iteration takes here: one and two blocks with a recipe's own widths, tokens and micro-batch, measured and
scaled; where even that would take long, operations over the rate of one product."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vggrpo.config import Recipe, VideoConfig
from vggrpo.cost import Counts, Shape, forward_flops, iteration_flops
from vggrpo.policy.flow_policy import Told

LONG = 3e11
"""Operations of one block and micro-batch from which on it is not measured."""


def iteration_seconds(
    config: dict[str, Any],
    shape: Shape,
    recipe: Recipe,
    video: VideoConfig,
    latent: tuple[int, int, int, int],
    counts: Counts,
    num_videos: int,
    device: str,
) -> tuple[float, str]:
    """Seconds of an iteration's evaluations of the network, and how that is known."""
    sampling = recipe.sampling
    micro = min(sampling.micro_batch, num_videos)
    if forward_flops(shape) / shape.layers * micro > LONG:
        rate = _rate(shape, device)
        total = iteration_flops(shape, counts, checkpointing=sampling.gradient_checkpointing)
        return total / rate, f"{rate / 1e9:,.0f} G operations/s, as measured in one product"
    one, two = (_measured(config, n, video, latent, micro, shape, device) for n in (1, 2))
    forward, backward = (a + (shape.layers - 1) * max(b - a, 0.0) for a, b in zip(one, two, strict=True))
    again = counts.replay * forward if sampling.gradient_checkpointing else 0.0
    plain = counts.rollout + counts.reference
    return plain * forward + counts.replay * backward + again, "one and two of its blocks were measured"


def _measured(
    config: dict[str, Any],
    layers: int,
    video: VideoConfig,
    latent: tuple[int, ...],
    micro: int,
    shape: Shape,
    device: str,
) -> tuple[float, float]:
    """Seconds per video: a forward pass without a graph, and one with its backward pass."""
    from diffusers import WanTransformer3DModel

    from vggrpo.policy.lora import add_lora
    from vggrpo.policy.wan import WanVelocity, in_dtype

    transformer = WanTransformer3DModel.from_config(config | {"num_layers": layers})
    add_lora(in_dtype(transformer, _dtype(shape)), video.lora)
    network: nn.Module = WanVelocity(transformer, shape.per_token).to(device)
    z = torch.randn(micro, *latent, device=device)
    text, image = (
        torch.randn(micro // shape.sharing, n, width, device=device).repeat_interleave(shape.sharing, 0)
        for n, width in ((video.max_len, config["text_dim"]), (shape.I, shape.image_dim))
    )
    t = torch.full((micro,), 0.5, device=device)
    told: Told = text
    if (further := config["in_channels"] - latent[0]) > 0:
        channels = torch.randn(micro, further, *latent[1:], device=device)
        told = (text, channels, image) if shape.I else (text, channels)

    def forward() -> None:
        with torch.no_grad():
            network(z, t, told)

    def both() -> None:
        network(z, t, told).square().mean().backward()

    return _fastest(forward) / micro, _fastest(both) / micro


def _rate(shape: Shape, device: str) -> float:
    """Operations a second in a product of the feed-forward layer's size, on at most 4096 tokens."""
    a = torch.randn(min(shape.N, 4096), shape.d, device=device, dtype=_dtype(shape))
    b = torch.randn(shape.d, shape.f, device=device, dtype=_dtype(shape))
    return 2 * a.shape[0] * math.prod(b.shape) / _fastest(lambda: a @ b)


def _dtype(shape: Shape) -> torch.dtype:
    return torch.bfloat16 if shape.half else torch.float32


def _fastest(call: Callable[[], object], times: int = 4) -> float:
    """The shortest of a few calls, after one that warms up: a neighbour only makes them longer."""
    found = []
    for _ in range(times + 1):
        begin = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begin)
    return min(found[1:])
