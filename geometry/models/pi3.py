"""Pi3 (arXiv 2507.13347): spec, call and parse of the module that yyfz/Pi3 builds.

Its conventions: images in [0, 1], normalised inside; poses c2w in a world of no one's, since no view is the reference;
points in each camera's own axes, whose z is depth in units of its own; confidence as a logit; no intrinsics, which are
fitted to the points' directions. Given intrinsics are not used. No scene flow.
"""

from typing import Any

from torch import Tensor, nn

from geometry.backbone import BackboneSpec, HookedBackbone
from geometry.cameras import anchored, unproject
from geometry.models.convert import pinhole_of_rays
from geometry.models.source import Source, imported, part, paths, pretrained, vit_of
from geometry.types import Geometry

SOURCE = Source(
    "Pi3", "github.com/yyfz/Pi3 (BSD-3-Clause)", "yyfz233/Pi3 or yyfz233/Pi3X (CC-BY-NC-4.0, not for commercial use)"
)


def load(weights: str) -> HookedBackbone:
    """The model with weights from a folder or the hub; needs the package `pi3`."""
    return backbone(pretrained(SOURCE, imported(SOURCE, "pi3.models.pi3", "Pi3"), weights))


def backbone(module: nn.Module) -> HookedBackbone:
    """A `pi3.models.pi3.Pi3`, frozen."""
    return HookedBackbone(module.eval().requires_grad_(False), spec(module), call, parse)


def spec(module: nn.Module) -> BackboneSpec:
    """Every encoder block is a stitch point: heads read the last two decoder blocks only.

    Raises:
        ValueError: a module of another class.
    """
    vit = vit_of(SOURCE, module, "encoder")
    heads = tuple(f"{what}_{kind}" for what in ("point", "conf", "camera") for kind in ("decoder", "head"))
    for head in heads:
        part(SOURCE, module, head)
    blocks = (*vit.blocks, *paths(SOURCE, module, "decoder"))
    return BackboneSpec(vit.patch, vit.dim, vit.num_prefix, blocks, vit.blocks, "unit", heads)


def call(module: nn.Module, images: Tensor, intrinsics: Tensor | None) -> Any:
    """Run it as `HookedBackbone` does."""
    return module(images)


def parse(raw: Any, size: tuple[int, int]) -> Geometry:
    """In the conventions of `geometry/types.py`, in units of the model's own."""
    c2w, local = anchored(raw["camera_poses"].float()), raw["local_points"].float()
    intrinsics, depth = pinhole_of_rays(local), local[..., 2]
    points = unproject(depth, intrinsics, c2w)
    return Geometry(c2w, intrinsics, depth, points, confidence=raw["conf"][..., 0].float().sigmoid())
