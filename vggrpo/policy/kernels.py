"""How a Wan's blocks are computed: which attention, compiled or not. The same function either way, to rounding.

A compiled block is another one with and without gradients, so that the ratio before any update may be off by some 1e-5:
`vggrpo check` says by how much.
"""

import difflib
from collections.abc import Callable
from typing import Any

from diffusers.models.attention_dispatch import AttentionBackendName

from vggrpo.policy.wan import WanVelocity


def attention_backends() -> list[str]:
    """Names that diffusers has, but for those that fetch code from the hub."""
    return [one.value for one in AttentionBackendName if not one.value.endswith("_hub")]


def choose_attention(network: WanVelocity, backend: str) -> None:
    """All attention of the network by this backend of diffusers'.

    Raises:
        ValueError: there is no such backend, or what it needs is not installed.
    """
    known = attention_backends()
    if backend not in known:
        near = difflib.get_close_matches(backend, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"video.attention: no backend {backend!r}: {hint}")
    for transformer in network.transformers().values():
        try:
            transformer.set_attention_backend(backend)
        except RuntimeError as error:
            raise ValueError(f"video.attention is {backend}: {str(error).splitlines()[0]}") from None


def compile_blocks(network: WanVelocity, backend: str | Callable[..., Any] = "inductor") -> None:
    """torch.compile for every block, in place; once they have their LoRA. All of them share what is compiled.

    Args:
        backend: of torch.compile, by name or as it is.
    """
    for transformer in network.transformers().values():
        transformer.compile_repeated_blocks(backend=backend)
