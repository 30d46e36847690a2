"""Geometry models by the names that recipes give them, and what tells the weights of one from another's.

    FOLDER                          the embedded one, an asset with a card
    vggt:WEIGHTS, pi3:WEIGHTS       a folder or a name on the hub, by the package of that name
    da3-small:FOLDER                Depth Anything 3; da3-base, da3-large, da3-giant
    any4d:package.module:function   the module that this function builds; only with --allow-import

docs/geometry_models.md says where each comes from and under which licence.
"""

import difflib
import hashlib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from geometry.backbone import HookedBackbone

DEPTH_ANYTHING = ("da3-small", "da3-base", "da3-large", "da3-giant")
FAMILIES = ("vggt", "pi3", *DEPTH_ANYTHING, "any4d")


def load_geometry_model(name: str | Path, allow_import: bool = False) -> HookedBackbone:
    """The geometry model of that name, in evaluation mode.

    Args:
        allow_import: whether a name may say what code to run (any4d).

    Raises:
        ValueError: no such family or folder, a package that is missing, weights that cannot be loaded or are another
            model's, code that nobody allowed.
    """
    family, colon, rest = str(name).partition(":")
    if not colon:
        from vggrpo.bootstrap.geometry_publish import load_geometry

        return load_geometry(name)
    if family not in FAMILIES:
        near = difflib.get_close_matches(family, FAMILIES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(FAMILIES)}, or give a folder alone"
        raise ValueError(f"there is no family of geometry models {family!r} ({name}): {hint}")
    if family == "any4d":
        from geometry.models import any4d

        return any4d.backbone(_built(rest, allow_import))
    if family in DEPTH_ANYTHING:
        from geometry.models import depth_anything3

        return depth_anything3.load(rest, family)
    from geometry.models import pi3, vggt

    return {"vggt": vggt, "pi3": pi3}[family].load(rest)


def identity(name: str | Path, model: HookedBackbone) -> dict[str, str]:
    """What tells this model from others: the digests on its card, or one of its weights, wherever they came from.

    Raises:
        ValueError: from `read_card`.
    """
    if ":" not in str(name):
        from vggrpo.bootstrap.assets import read_card

        files: dict[str, str] = read_card(Path(name))["sha256"]
        return files
    return {"weights": digest(model.module)}


@torch.no_grad()
def digest(module: nn.Module) -> str:
    """sha256 of all parameters and buffers, by name: that of a module without adapters."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _built(path: str, allow_import: bool) -> nn.Module:
    if not allow_import:
        raise ValueError(
            f"the geometry model any4d:{path} would run code that is not this project's: give --allow-import if you "
            "trust it"
        )
    module, colon, name = path.partition(":")
    try:
        build: Callable[[], object] = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        where = path if colon else f"{path} (it must be package.module:function)"
        raise ValueError(f"cannot import what builds the geometry model, {where}: {error}") from error
    built = build()
    if not isinstance(built, nn.Module):
        raise ValueError(f"{path} built a {type(built).__name__}, and a geometry model is a torch.nn.Module")
    return built
