"""The paper's figure: geometry of perturbed latents, read directly and by way of the decoder (VGGRPO, Fig. 5)."""

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from geometry.backbone import HookedBackbone
from geometry.distance import output_distances
from geometry.latent import LatentGeometryModel
from geometry.types import Geometry
from vggrpo.bootstrap.geometry_eval import measure
from vggrpo.stitch.clips import decoded
from vggrpo.stitch.judge import HeldOut, in_parts

LEVELS = (0.0, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
"""Norm of the perturbation in that of the clip's latents."""
SHOWN = ("rotation", "clip_rotation", "direction", "abs_rel")


def robustness(
    vae: AutoencoderKLWan, teacher: HookedBackbone, model: LatentGeometryModel, clips: HeldOut, seed: int = 0
) -> dict[str, list[dict[str, float]]]:
    """One row for each level and way: errors to the truth, and how far outputs moved from their own at level 0."""
    eps = torch.randn(clips.z.shape, generator=torch.Generator().manual_seed(seed))
    eps = eps * (_norm(clips.z) / _norm(eps))
    known = clips.lessons.intrinsics
    found: dict[str, list[dict[str, float]]] = {"latent": [], "decoded": []}
    first: dict[str, Geometry] = {}
    for level in LEVELS:
        z = clips.z + level * eps
        scenes = {"latent": in_parts(model, z, known), "decoded": in_parts(teacher, decoded(vae, z), known)}
        first = first or scenes
        for way, scene in scenes.items():
            errors = measure(scene, clips.lessons)
            moved = output_distances(scene, first[way])
            row = {name: errors[name] for name in SHOWN}
            row |= {f"moved: {name}": float(moved[name].mean()) for name in ("rotation", "translation", "log_depth")}
            found[way].append({"level": level} | row)
    return found


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1)
