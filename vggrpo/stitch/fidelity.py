"""Do rewards mean on estimated geometry what they mean on the true one? Rank correlations over spoilt clips.

Every perturbation of the world's catalogue that pixels can show is applied to the video, the video is encoded, and the
rewards of what models read from it are compared with the rewards of the true geometry. No model is told the focal
length: nobody knows that of a sample.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from jaxtyping import Float
from torch import Tensor

from geometry.backbone import HookedBackbone
from geometry.cameras import unproject
from geometry.latent import LatentGeometryModel
from geometry.types import Geometry
from geometry.world import PERTURBATIONS, Clip, Motion, make_clip
from rewards import ESTIMATED_FLOW, RewardFn, camera_motion_floor, motion_smoothness, reprojection_consistency
from rewards.reprojection import EXACT_FLOW
from vggrpo.bootstrap.geometry_eval import spearman
from vggrpo.stitch.clips import AT_ONCE, latents_of

FIRST_SEED = 9_800_000
MOVING: tuple[Motion, ...] = ("orbit", "truck", "dolly_in", "pan", "random", "arc", "pedestal", "tilt", "dolly_out")
"""Camera motions that the clips have in turn; every other clip has moving bodies."""
SWAY = (0.0, 0.0, 2.0, 2.0)
"""Degrees of a walker's bobbing that the clips have in turn, as the generator's footage has it: steady clips alone have
one true smoothness, 1, which most faults leave alone: a rank correlation would be that of ties."""
UNSEEN = ("depth_flicker",)
"""Faults of a geometry that no pixel can show."""
COARSE, FINE = (0, 2, 4), (0.5, 1.0, 1.5)
"""Which of a perturbation's magnitudes; and multiples of its smallest."""


def confident(scene: Geometry) -> Geometry:
    """The half of each clip's pixels that the model is surest of; all of them where it does not say."""
    if scene.confidence is None:
        return scene
    middle = scene.confidence.flatten(-3).median(-1).values[..., None, None, None]
    return replace(scene, valid=scene.confidence > middle)


def rewards_with(flow: float) -> dict[str, RewardFn]:
    """What is compared; scene flow longer than `flow` (median depths) is motion."""
    consistent = partial(reprojection_consistency, dynamic_threshold=flow)
    return {
        "motion_smoothness": motion_smoothness,
        "motion_smoothness, paper": partial(motion_smoothness, floor=0.0),
        "reprojection_consistency": consistent,
        "reprojection_consistency, surer half": lambda scene: consistent(confident(scene)),
        "reprojection_consistency, paper": partial(consistent, scale="absolute", exclude_self=False),
        "camera_motion_floor": camera_motion_floor,
    }


OF_TRUTH, REWARDS = rewards_with(EXACT_FLOW), rewards_with(ESTIMATED_FLOW)
"""The true geometry's, and a model's."""
CHANGES = 1e-3
"""A true reward that changes less within a clip does not answer to a fault."""
OFF = {f"depth {share:.1%} off": share for share in (0.003, 0.01, 0.03, 0.1)}
"""The true geometry with its depth so far off: what a correlation can be for a model that makes no other error."""
FIDELITY_BARS = {"motion_smoothness": 0.8, "reprojection_consistency": 0.6}
"""Rank correlation asked of the shipped model, over all clips, faults and magnitudes."""


def depth_off(scene: Geometry, share: float, seed: int) -> Geometry:
    """Every frame's depth times exp of a smooth field of its own, whose standard deviation is `share`."""
    *batch, H, W = scene.depth.shape
    coarse = torch.randn(1, math.prod(batch), 8, 8, generator=torch.Generator().manual_seed(seed))
    field = F.interpolate(coarse, size=(H, W), mode="bicubic")
    depth = scene.depth * (share * field / field.std()).exp().view(scene.depth.shape)
    return replace(scene, depth=depth, points=unproject(depth, scene.intrinsics, scene.c2w))


def versions(count: int) -> tuple[list[tuple[str, float]], Callable[[str, float], list[Clip]]]:
    """(fault, magnitude) of every version of the clips, the first of them none, and what makes the clips of one."""
    clips = [
        make_clip(FIRST_SEED + n, motion=MOVING[n % len(MOVING)], dynamic=n % 2 == 1, sway=SWAY[n % len(SWAY)])
        for n in range(count)
    ]
    listed = [("none", 0.0)]
    for name, fault in PERTURBATIONS.items():
        if name not in UNSEEN:
            amounts = {fault.magnitudes[k] for k in COARSE} | {round(f * fault.magnitudes[0], 4) for f in FINE}
            listed += [(name, amount) for amount in sorted(amounts)]

    def make(name: str, amount: float) -> list[Clip]:
        if name == "none":
            return clips
        return [PERTURBATIONS[name].apply(clip, amount, n) for n, clip in enumerate(clips)]

    return listed, make


@torch.no_grad()
def score(
    vae: AutoencoderKLWan,
    teacher: HookedBackbone,
    models: dict[str, LatentGeometryModel],
    count: int,
    progress: Callable[[str], None],
) -> tuple[list[tuple[str, float]], dict[str, dict[str, Float[Tensor, "versions clips"]]]]:
    """Versions, and source -> reward -> its value for each; sources are "truth", `OFF`, "teacher" and the models."""
    listed, make = versions(count)
    values: dict[str, dict[str, list[Tensor]]] = {}
    for number, (name, amount) in enumerate(listed):
        progress(f"reward fidelity: {number} of {len(listed)} versions of {count} clips")
        clips = make(name, amount)
        video = torch.stack([clip.video for clip in clips])
        z = latents_of(vae, video)
        scenes: dict[str, list[Geometry]] = {"truth": [clip.geometry for clip in clips]}
        for source, share in OFF.items():
            scenes[source] = [depth_off(scene, share, 100 * number + n) for n, scene in enumerate(scenes["truth"])]
        scenes["teacher"] = [teacher(some) for some in video.split(AT_ONCE)]
        scenes |= {source: [model(some) for some in z.split(AT_ONCE)] for source, model in models.items()}
        for source, parts in scenes.items():
            for reward, fn in (OF_TRUTH if source in ("truth", *OFF) else REWARDS).items():
                one = torch.cat([fn(part).flatten() for part in parts])
                values.setdefault(source, {}).setdefault(reward, []).append(one)
    stacked = {s: {reward: torch.stack(rows) for reward, rows in found.items()} for s, found in values.items()}
    return listed, stacked


def fidelity(
    listed: Sequence[tuple[str, float]], values: dict[str, dict[str, Float[Tensor, "versions clips"]]]
) -> dict[str, dict[str, dict[str, float]]]:
    """source -> reward -> rank correlation with the truth's.

    "all": over clips, faults and magnitudes; "fine", "coarse": of those magnitudes alone (and no fault at all).
    "answered faults": of the faults that change the true reward of a clip, and none.
    "within a clip": over the versions of one clip, mean over clips, which is what a group of samples compares.
    "fault: ...": the same over the magnitudes of one fault; 0 where one of the two rewards does not change.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    names = [name for name in PERTURBATIONS if name not in UNSEEN]
    rows = {"all": list(range(len(listed)))}
    for kind, wanted in (("fine", _is_fine), ("coarse", _is_coarse)):
        rows[kind] = [i for i, (name, amount) in enumerate(listed) if name == "none" or wanted(name, amount)]
    for source, rewards in values.items():
        if source == "truth":
            continue
        found[source] = {}
        for reward, mine in rewards.items():
            truth = values["truth"][reward]
            numbers = {kind: _pooled(mine[chosen], truth[chosen]) for kind, chosen in rows.items()}
            by_fault = {}
            for name in names:
                chosen = [i for i, (other, _) in enumerate(listed) if other in ("none", name)]
                by_fault[name] = _within(mine[chosen], truth[chosen])
            answered = ["none", *(name for name, x in by_fault.items() if not math.isnan(x))]
            chosen = [i for i, (name, _) in enumerate(listed) if name in answered]
            numbers["answered faults"] = _pooled(mine[chosen], truth[chosen])
            numbers["within a clip"] = _within(mine, truth)
            found[source][reward] = numbers | {f"fault: {name}": x for name, x in by_fault.items()}
    return found


def blind(found: dict[str, dict[str, float]]) -> dict[str, list[str]]:
    """Reward -> faults that the true reward answers to and a model's does not (rank correlation within a clip < 0.5).

    A fault that leaves the true reward as it was has NaN in `fidelity` and is nobody's fault.
    """
    return {
        reward: [name.removeprefix("fault: ") for name, x in numbers.items() if name.startswith("fault") and x < 0.5]
        for reward, numbers in found.items()
    }


def _is_fine(name: str, amount: float) -> bool:
    return amount <= 1.5 * PERTURBATIONS[name].magnitudes[0] + 1e-6


def _is_coarse(name: str, amount: float) -> bool:
    return amount in [PERTURBATIONS[name].magnitudes[k] for k in COARSE]


def _pooled(mine: Tensor, truth: Tensor) -> float:
    both = mine.isfinite() & truth.isfinite()
    return spearman(mine[both].double(), truth[both].double())


def _within(mine: Float[Tensor, "versions clips"], truth: Float[Tensor, "versions clips"]) -> float:
    """Mean over clips whose true reward changes; NaN if none does."""
    each = []
    for ours, theirs in zip(mine.T, truth.T, strict=True):
        both = ours.isfinite() & theirs.isfinite()
        if int(both.sum()) > 2 and float(theirs[both].max() - theirs[both].min()) > CHANGES:
            each.append(spearman(ours[both].double(), theirs[both].double()))
    return sum(each) / len(each) if each else math.nan
