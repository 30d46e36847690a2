"""VGGT (arXiv 2503.11651): spec, call and parse of the module that facebookresearch/vggt builds.

Its conventions: images in [0, 1], normalised inside; poses w2c in frame 0's camera as translation, quaternion xyzw and
two fields of view; z-depth in units of the scene's mean distance; confidence 1 + exp. Its principal point is the middle
of the image, which is W / 2 for us; its own code counts pixels from 0 there, half a pixel away. Points are unprojected
depth, which is more accurate than its point head (its README). Given intrinsics are not used. No scene flow.
"""

from typing import Any

from torch import Tensor, nn

from geometry.backbone import BackboneSpec, HookedBackbone
from geometry.cameras import rigid, unproject
from geometry.models.convert import confidence_of, path_of_w2c, pinhole_of_fov, rotation_of
from geometry.models.source import Source, imported, part, paths, pretrained, vit_of
from geometry.types import Geometry

SOURCE = Source(
    "VGGT",
    "github.com/facebookresearch/vggt (VGGT License v1, commercial use allowed)",
    "facebook/VGGT-1B-Commercial (gated, commercial use allowed) or facebook/VGGT-1B (CC-BY-NC-4.0)",
)


def load(weights: str) -> HookedBackbone:
    """The model with weights from a folder or the hub; needs the package `vggt`."""
    return backbone(pretrained(SOURCE, imported(SOURCE, "vggt.models.vggt", "VGGT"), weights))


def backbone(module: nn.Module) -> HookedBackbone:
    """A `vggt.models.vggt.VGGT`, frozen."""
    return HookedBackbone(module.eval().requires_grad_(False), spec(module), call, parse)


def spec(module: nn.Module) -> BackboneSpec:
    """Every encoder block is a stitch point: heads read the alternating blocks only.

    Raises:
        ValueError: a module of another class.
    """
    vit = vit_of(SOURCE, module, "aggregator.patch_embed")
    frame, world = (paths(SOURCE, module, f"aggregator.{kind}_blocks") for kind in ("frame", "global"))
    alternating = [path for pair in zip(frame, world, strict=True) for path in pair]
    heads = ("camera_head", "depth_head")
    for head in heads:
        part(SOURCE, module, head)
    return BackboneSpec(
        vit.patch, vit.dim, vit.num_prefix, (*vit.blocks, *alternating), vit.blocks, "unit", heads
    )  # fmt: skip


def call(module: nn.Module, images: Tensor, intrinsics: Tensor | None) -> Any:
    """Run it as `HookedBackbone` does."""
    return module(images)


def parse(raw: Any, size: tuple[int, int]) -> Geometry:
    """In the conventions of `geometry/types.py`, in units of the model's own."""
    code = raw["pose_enc"].float()
    c2w = path_of_w2c(rigid(rotation_of(code[..., 3:7]), code[..., :3]))
    intrinsics = pinhole_of_fov(code[..., 7], code[..., 8], size)
    depth = raw["depth"][..., 0].float()
    points = unproject(depth, intrinsics, c2w)
    return Geometry(c2w, intrinsics, depth, points, confidence=confidence_of(raw["depth_conf"].float()))
