"""Geometry models that other people made: where each comes from, under which licence, and what its parts are called.

No code or weights of theirs are part of this project: an adapter describes a module that the user has made.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

from torch import nn


@dataclass(frozen=True)
class Source:
    """One line on how to get a model."""

    name: str
    code: str
    """Where, and under which licence."""
    weights: str
    """Names on the hub, each with its licence."""

    def __str__(self) -> str:
        return f"{self.name}: code {self.code}; weights {self.weights}"


class Vit(NamedTuple):
    """What a spec needs of a DINOv2 encoder."""

    patch: int
    dim: int
    num_prefix: int
    blocks: tuple[str, ...]


def imported(source: Source, module: str, name: str) -> Any:
    """Something of the model's own package.

    Raises:
        ValueError: the package, or what it needs, is not installed; with where to get it.
    """
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import {name} from {module} ({error}): {source}") from None


def pretrained(source: Source, kind: Any, weights: str) -> nn.Module:
    """`kind.from_pretrained(weights)`: a folder, or a name on the hub.

    Raises:
        ValueError: what cannot be loaded, for whatever reason (no network, a gated name, no such folder).
    """
    try:
        module: nn.Module = kind.from_pretrained(weights)
    except Exception as error:  # the hub's client and its transports have no error in common
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        told = f"{type(error).__name__} {error}".lower()
        closed = any(word in told for word in ("gated", "restricted", "401", "403"))
        remedy = "accept its terms on its page on the hub and log in (hf auth login); " if closed else ""
        raise ValueError(f"cannot load {weights} ({reason}): {remedy}{source}") from error
    return module


def part(source: Source, module: nn.Module, path: str) -> nn.Module:
    """A submodule.

    Raises:
        ValueError: there is none of that name, so this is another class.
    """
    try:
        return module.get_submodule(path)
    except AttributeError:
        raise ValueError(f"{type(module).__name__} is not the module of {source.name}: no {path}; {source}") from None


def vit_of(source: Source, module: nn.Module, path: str) -> Vit:
    """The DINOv2 encoder at `path`: its patch, width, class and register tokens, and blocks."""
    encoder: Any = part(source, module, path)
    projection: Any = part(source, module, f"{path}.patch_embed.proj")
    registers = encoder.register_tokens
    return Vit(
        projection.kernel_size[0],
        projection.out_channels,
        1 + (0 if registers is None else registers.shape[1]),
        paths(source, module, f"{path}.blocks"),
    )


def paths(source: Source, module: nn.Module, path: str) -> tuple[str, ...]:
    """The paths of all blocks of a list."""
    blocks: Any = part(source, module, path)
    return tuple(f"{path}.{k}" for k in range(len(blocks)))
