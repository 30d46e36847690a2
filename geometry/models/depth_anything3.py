"""Depth Anything 3 (arXiv 2511.10647), any-view models: spec, call and parse of `DepthAnything3Net`.

Its conventions: ImageNet-normalised images; poses w2c; z-depth in units of its own; confidence 1 + exp; a centred
pinhole. With three frames or more it would choose a reference view by their content; we ask for the first. Its ray head
estimates poses by random draws, without a gradient: poses are the camera decoder's. Given intrinsics are not used. No
scene flow.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from geometry.backbone import BackboneSpec, HookedBackbone
from geometry.cameras import unproject
from geometry.models.convert import confidence_of, path_of_w2c
from geometry.models.source import Source, imported, part, vit_of
from geometry.types import Geometry

SOURCE = Source(
    "Depth Anything 3",
    "pip install --no-deps depth-anything-3, and addict, einops, omegaconf (Apache-2.0)",
    "depth-anything/DA3-SMALL, DA3-BASE (Apache-2.0), DA3-LARGE-1.1, DA3-GIANT-1.1 (CC-BY-NC-4.0)",
)


def load(folder: str | Path, name: str) -> HookedBackbone:
    """A model from the folder that the hub has: `model.safetensors`; needs the package `depth_anything_3`.

    Args:
        name: of the package's own configurations: da3-small, da3-base, da3-large or da3-giant.

    Raises:
        ValueError: no package, no such name, no file, or weights of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    file, net = Path(folder) / "model.safetensors", build(name)
    if not file.is_file():
        raise ValueError(f"no weights at {file}; {SOURCE}")
    try:  # the hub's files hold the net as a part of its interface; tied weights are there once
        missing, _ = load_model(nn.ModuleDict({"model": net}), file, strict=False)
    except (RuntimeError, SafetensorError) as error:
        lines = str(error).strip().splitlines()
        raise ValueError(f"{file} is not {name}: {lines[min(1, len(lines) - 1)].strip()}") from None
    if missing:
        raise ValueError(f"{file} is not {name}: it has no {sorted(missing)[0]}")
    return backbone(net)


def build(name: str) -> nn.Module:
    """A net with random weights from one of the package's own configurations."""
    create = imported(SOURCE, "depth_anything_3.cfg", "create_object")
    configuration = imported(SOURCE, "depth_anything_3.cfg", "load_config")
    try:
        net: nn.Module = create(configuration(f"depth_anything_3.configs.{name}"))
    except FileNotFoundError:
        raise ValueError(f"depth_anything_3 has no model {name!r}: da3-small, da3-base, da3-large, da3-giant") from None
    return net


def backbone(net: nn.Module) -> HookedBackbone:
    """A `depth_anything_3.model.da3.DepthAnything3Net` (`.model` of a `DepthAnything3`), frozen."""
    return HookedBackbone(net.eval().requires_grad_(False), spec(net), call, parse)


def spec(net: nn.Module) -> BackboneSpec:
    """Stitch points are the blocks before views are mixed and before the first that a head reads.

    Raises:
        ValueError: a module of another class, or one without camera decoder.
    """
    vit = vit_of(SOURCE, net, "backbone.pretrained")
    encoder: Any = part(SOURCE, net, "backbone")
    if net.cam_dec is None:
        raise ValueError(f"{SOURCE.name} METRIC and MONO estimate no cameras; use SMALL, BASE, LARGE or GIANT")
    early = min(encoder.pretrained.alt_start, min(encoder.out_layers))
    if early < 1:
        raise ValueError(f"this {SOURCE.name} has no block before its views are mixed; there is nowhere to stitch")
    return BackboneSpec(
        vit.patch, vit.dim, vit.num_prefix, vit.blocks, vit.blocks[:early], "imagenet", ("head", "cam_dec")
    )  # fmt: skip


def call(net: nn.Module, images: Tensor, intrinsics: Tensor | None) -> Any:
    """Run it as `HookedBackbone` does."""
    return net(images, ref_view_strategy="first")


def parse(raw: Any, size: tuple[int, int]) -> Geometry:
    """In the conventions of `geometry/types.py`, in units of the model's own."""
    c2w = path_of_w2c(raw["extrinsics"].float())
    intrinsics, depth = raw["intrinsics"].float(), raw["depth"].float()
    points = unproject(depth, intrinsics, c2w)
    return Geometry(c2w, intrinsics, depth, points, confidence=confidence_of(raw["depth_conf"].float()))
