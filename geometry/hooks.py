"""Hooks on the blocks of a module, and other `forward`s for some of them, for one pass."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_IN_USE: "WeakSet[nn.Module]" = WeakSet()


def pass_through(*args: Any, **kwargs: Any) -> Any:
    """A skipped block: its first input. `nn.Identity` takes one argument, and blocks are called with masks and more."""
    return args[0] if args else next(iter(kwargs.values()))


@contextmanager
def hooked(
    module: nn.Module,
    hooks: Mapping[str, Callable[..., Any]],
    skipped: Sequence[str] = (),
    recomputed: Sequence[str] = (),
) -> Iterator[None]:
    """For one pass: forward hooks on some blocks, no work in others, recomputation in the backward pass of others.

    A block's `forward` is replaced, not the block: hooks, parameters and paths stay where they are, and hooks stay
    outside what is recomputed, so that the backward pass (after the context) finds all it needs. Recomputation is
    non-reentrant: the reentrant kind has no graph where inputs need none, and no `torch.autograd.grad`.

    Args:
        module: whose blocks; one pass at a time.
        hooks: module path -> hook(block, inputs, output) -> new output, or None.
        skipped: paths of blocks that hand on their first input.
        recomputed: paths of blocks that keep their inputs only.

    Raises:
        RuntimeError: the module is already hooked.
        ValueError: a hooked block did not run exactly once.
    """
    if module in _IN_USE:
        raise RuntimeError(f"{type(module).__name__} is already being read or entered; one call at a time")
    blocks = {path: module.get_submodule(path) for path in (*hooks, *skipped, *recomputed)}
    before = {path: block.__dict__.get("forward") for path, block in blocks.items()}
    runs: Counter[str] = Counter()
    handles = [blocks[path].register_forward_hook(hook) for path, hook in hooks.items()]
    handles += [blocks[path].register_forward_hook(lambda *_, path=path: runs.update([path])) for path in hooks]
    _IN_USE.add(module)
    try:
        for path in skipped:
            blocks[path].forward = pass_through
        for path in recomputed:
            blocks[path].forward = partial(checkpoint, blocks[path].forward, use_reentrant=False)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for path in (*skipped, *recomputed):
            del blocks[path].forward
            if (original := before[path]) is not None:
                blocks[path].forward = original
        _IN_USE.discard(module)
    for path in hooks:
        if runs[path] != 1:
            raise ValueError(f"block {path} ran {runs[path]} times in one pass; a stitch point runs exactly once")


@contextmanager
def recorded(module: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What some modules put out in the last pass inside the context: the tensor, or the first of a tuple."""
    found: dict[str, Tensor] = {}

    def keep(path: str, block: nn.Module, args: Any, output: Any) -> None:
        found[path] = output[0] if isinstance(output, list | tuple) else output

    handles = [module.get_submodule(path).register_forward_hook(partial(keep, path)) for path in paths]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
