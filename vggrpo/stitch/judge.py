"""Latent geometry models against the world's truth and against their teacher, kind by kind, beside controls."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan
from jaxtyping import Float
from torch import Tensor

from geometry.backbone import HookedBackbone
from geometry.distance import output_distances
from geometry.latent import Connector, LatentGeometryModel
from geometry.types import Geometry
from vggrpo.bootstrap.geometry_eval import constant, measure
from vggrpo.bootstrap.geometry_publish import BARS
from vggrpo.bootstrap.lesson import Lesson
from vggrpo.stitch.clips import AT_ONCE, decoded, latents_of

Numbers = dict[str, float]
RATIO_BAR = 1.4
"""Largest error of a latent model that was distilled on a CPU, in those of its teacher."""


@dataclass(frozen=True)
class HeldOut:
    """Clips that nothing was fitted on, with all that both kinds of models see of them."""

    lessons: Lesson
    motions: list[str]
    z: Float[Tensor, "N C L h w"]

    @property
    def video(self) -> Float[Tensor, "N T 3 H W"]:
        return self.lessons.video.float() / 255

    def some(self, rows: slice) -> "HeldOut":
        """A part of them."""
        return HeldOut(self.lessons.map(lambda x: x[rows]), self.motions[rows], self.z[rows])


@torch.no_grad()
def in_parts(model: Callable[..., Geometry], data: Tensor, intrinsics: Tensor | None) -> Geometry:
    """A model of latents or of video, some clips at a time."""
    known = [None] * len(data) if intrinsics is None else intrinsics.split(AT_ONCE)
    parts = [vars(model(some, given)) for some, given in zip(data.split(AT_ONCE), known, strict=False)]
    tensors = {name: torch.cat([part[name] for part in parts]) for name, x in parts[0].items() if isinstance(x, Tensor)}
    return Geometry(**tensors, flow_grid="frame")


def judge(
    teacher: HookedBackbone,
    models: dict[str, LatentGeometryModel],
    vae: AutoencoderKLWan,
    clips: HeldOut,
) -> dict[str, dict[str, Numbers]]:
    """Numbers of each model, by kind of clip; distances from the teacher are among them, as "from teacher: ...".

    Args:
        models: of the time mode that ships, in a video frame each; the last one is the one that ships. Controls and
            single kinds are measured of it and of the teacher.

    Returns:
        kind -> model -> numbers of `geometry_eval.measure`. Controls: "constant", "frozen" (the first frame
        throughout, encoded as such) and "shuffled latents" (another clip's).
    """
    known, shipped = clips.lessons.intrinsics, next(reversed(models))
    scenes = {"teacher": in_parts(teacher, clips.video, known)}
    scenes["teacher on decoded latents"] = in_parts(teacher, decoded(vae, clips.z), known)
    scenes |= {name: in_parts(model, clips.z, known) for name, model in models.items()}
    found: dict[str, dict[str, Numbers]] = {"all": {}}
    for name, scene in scenes.items():
        apart = {} if name == "teacher" else _apart(scene, scenes["teacher"])
        found["all"][name] = measure(scene, clips.lessons) | apart
    for kind, mask in kinds(clips).items():
        some = clips.lessons.map(lambda x, mask=mask: x[mask])  # type: ignore[misc]
        found[kind] = {
            name: measure(scenes[name].map(lambda x, mask=mask: x[mask]), some)  # type: ignore[misc]
            for name in ("teacher", shipped)
        }
    few, model = clips.some(slice(0, None, 2)), models[shipped]
    found["focal length unknown"] = {
        "teacher": measure(in_parts(teacher, few.video, None), few.lessons),
        shipped: measure(in_parts(model, few.z, None), few.lessons),
    }
    given = few.lessons.intrinsics
    still = latents_of(vae, few.video[:, :1].expand_as(few.video))
    found["control: constant"] = {shipped: measure(constant(few.lessons), few.lessons)}
    found["control: frozen"] = {shipped: measure(in_parts(model, still, given), few.lessons)}
    found["control: shuffled latents"] = {shipped: measure(in_parts(model, few.z.roll(1, 0), given), few.lessons)}
    return found


def kinds(clips: HeldOut) -> dict[str, Tensor]:
    """Masks of clips whose bodies stand, whose bodies move, and of each camera motion."""
    moving = clips.lessons.dynamic.flatten(1).any(1)
    masks = {"bodies stand": ~moving, "bodies move": moving}
    return masks | {
        f"camera: {name}": torch.tensor([m == name for m in clips.motions]) for name in sorted(set(clips.motions))
    }


def ratios(model: Numbers, teacher: Numbers) -> Numbers:
    """Errors of a model in those of its teacher; for correlations and areas the error is what lacks to 1."""
    return {
        name: (model[name] / teacher[name] if sign < 0 else (1 - model[name]) / (1 - teacher[name]))
        for name, (_, _, sign) in BARS.items()
    }


def at_latents(scene: Geometry) -> Geometry:
    """Every fourth frame, where the time mode "latent" has its maps."""
    return scene.map(lambda x: x[:, ::4])


def random_connector(connector: Connector, seed: int = 0) -> None:
    """Give a connector its own weights in another order: the right size and intercept, and no meaning."""
    weight = connector.conv.weight.detach()
    order = torch.randperm(weight[0].numel(), generator=torch.Generator().manual_seed(seed))
    weight.copy_(weight.flatten(1)[:, order].view_as(weight))


def _apart(scene: Geometry, teacher: Geometry) -> Numbers:
    return {f"from teacher: {name}": float(x.mean()) for name, x in output_distances(scene, teacher).items()}
