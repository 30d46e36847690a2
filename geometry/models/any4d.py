"""Any4D (arXiv 2512.10935), the teacher of VGGRPO: spec, call and parse of the module that Any-4D/Any4D builds.

Its conventions: one dictionary a view, DINOv2-normalised images; views before clips on the first axis; poses c2w in
view 0's camera as translation and quaternion xyzw; depth along rays of unit length, metric; confidence 1 + exp and a
mask of what is not ambiguous; no intrinsics, which are fitted to the rays. Scene flow is in world axes, from view 0 to
view i, on view 0's pixels: `flow_grid` "first". Given intrinsics are not used.
"""

from typing import Any

import torch
from torch import Tensor, nn

from geometry.backbone import BackboneSpec, HookedBackbone
from geometry.cameras import anchored, rigid, unproject
from geometry.models.convert import confidence_of, pinhole_of_rays, rotation_of
from geometry.models.source import Source, part, paths, vit_of
from geometry.types import Geometry

SOURCE = Source(
    "Any4D",
    "github.com/Any-4D/Any4D (Apache-2.0), built with its own configuration files",
    "airlabshare/any4d-checkpoint (no licence of their own, made from non-commercial ones: not for commercial use)",
)


def backbone(module: nn.Module) -> HookedBackbone:
    """An `any4d.models.any4d.model.Any4D`, frozen."""
    return HookedBackbone(module.eval().requires_grad_(False), spec(module), call, parse)


def spec(module: nn.Module) -> BackboneSpec:
    """The encoder's output feeds the heads, so all of its blocks but the last are stitch points.

    Raises:
        ValueError: a module of another class.
    """
    vit = vit_of(SOURCE, module, "encoder.model")
    heads = ("dense_head", "pose_head", "scale_head", "scene_flow_dense_head")
    for head in heads:
        part(SOURCE, module, head)
    blocks = (*vit.blocks, *paths(SOURCE, module, "info_sharing.self_attention_blocks"))
    return BackboneSpec(
        vit.patch, vit.dim, vit.num_prefix, blocks, vit.blocks[:-1], "imagenet", heads, frames_first=True
    )  # fmt: skip


def call(module: nn.Module, images: Tensor, intrinsics: Tensor | None) -> Any:
    """Run it as `HookedBackbone` does."""
    return module([{"img": image, "data_norm_type": ["dinov2"]} for image in images.unbind(1)])


def parse(raw: Any, size: tuple[int, int]) -> Geometry:
    """In the conventions of `geometry/types.py`, in metres.

    Raises:
        ValueError: a model that was configured to say less.
    """
    names = ("cam_trans", "cam_quats", "ray_directions", "depth_along_ray", "conf", "non_ambiguous_mask", "scene_flow")
    for name in names:
        if name not in raw[0]:
            raise ValueError(f"{SOURCE.name} says no {name}: build it with raydirs+depth+pose+confidence+mask")
    view = {name: torch.stack([one[name] for one in raw], dim=1) for name in names}
    own = rigid(rotation_of(view["cam_quats"].float()), view["cam_trans"].float())
    c2w, ray = anchored(own), view["ray_directions"].float()
    z = view["depth_along_ray"][..., 0].float() * ray[..., 2]
    ahead = z > 0
    depth = z.where(ahead, torch.ones_like(z))
    intrinsics = pinhole_of_rays(ray.where(ahead[..., None], ray.new_tensor([0.0, 0.0, 1.0])))
    flow = view["scene_flow"][:, 1:].float() @ own[:, :1, None, :3, :3]  # rows: R_0' applied to each vector
    return Geometry(
        c2w,
        intrinsics,
        depth,
        unproject(depth, intrinsics, c2w),
        confidence=confidence_of(view["conf"].float()),
        valid=view["non_ambiguous_mask"].bool() & ahead,
        scene_flow=torch.cat([torch.zeros_like(view["scene_flow"][:, :1], dtype=flow.dtype), flow], dim=1),
        flow_grid="first",
    )
