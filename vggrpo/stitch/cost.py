"""What a latent geometry model costs beside decoding the video and asking its teacher: milliseconds a clip."""

import statistics
import time
from collections.abc import Callable

import torch
from diffusers import AutoencoderKLWan
from jaxtyping import Float
from torch import Tensor

from geometry.backbone import HookedBackbone
from geometry.latent import LatentGeometryModel
from geometry.types import Geometry
from vggrpo.bootstrap.vae import decode, denormalise

REPEATS = 3


def cost(
    vae: AutoencoderKLWan,
    teacher: HookedBackbone,
    models: dict[str, LatentGeometryModel],
    z: Float[Tensor, "1 C L h w"],
) -> dict[str, dict[str, float]]:
    """Medians for one clip on this machine: tokens after the stitch, forward pass, and with gradients to the latents.

    "decode, then the teacher" differentiates through the decoder, as a reward of the video would.
    """

    def through_pixels(z: Tensor) -> Geometry:
        return teacher(decode(vae, denormalise(vae, z)))

    tokens = _tokens(teacher, z, 4 * (z.shape[2] - 1) + 1)
    found = {"decode, then the teacher": {"tokens": tokens} | _timed(through_pixels, z)}
    for name, model in models.items():
        frames = len(model.connector.latent.frames(z.shape[2], model.connector.mode))
        found[name] = {"tokens": _tokens(teacher, z, frames)} | _timed(model, z)
    return found


def _tokens(teacher: HookedBackbone, z: Tensor, frames: int) -> float:
    h, w = (8 * side // teacher.spec.patch for side in z.shape[3:])
    return float(frames * (h * w + teacher.spec.num_prefix))


def _timed(model: Callable[[Tensor], Geometry], z: Tensor) -> dict[str, float]:
    forward, both = [], []
    for _ in range(REPEATS):
        with torch.no_grad():
            begin = time.perf_counter()
            model(z)
            forward.append(1000 * (time.perf_counter() - begin))
        begin = time.perf_counter()
        leaf = z.clone().requires_grad_()
        scene = model(leaf)
        (scene.depth.log().mean() + scene.c2w.sum()).backward()
        both.append(1000 * (time.perf_counter() - begin))
    return {"forward_ms": round(statistics.median(forward), 1), "with_gradient_ms": round(statistics.median(both), 1)}
