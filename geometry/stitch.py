"""Stage 1 of a latent geometry model: the closed-form connector of every stitch point, and which point is best.

    models = stitch(backbone, connector, calibration)     # one pass over the clips, for all points together
    layers = rank_layers(models, held_out)                # best first
    for record in distil(layers[0].model, clips, config): # geometry/distil.py

Unlike VIST3A (github.com/gohyojun15/VIST3A) the fit sees the padding that the convolution will see, has an intercept,
enters the block after position embeddings were added, gives class and register tokens their mean, and is judged on
other clips.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geometry.backbone import HookedBackbone
from geometry.distance import OutputWeights, output_distances
from geometry.latent import Connector, LatentGeometryModel
from geometry.ridge import ConnectorFit, Total, set_connector
from geometry.types import Geometry


def _own(x: Tensor) -> Tensor:
    """The sum over one rank."""
    return x


class Sample(NamedTuple):
    """Clips, and the latents that the VAE makes of them."""

    z: Float[Tensor, "B C L h w"]
    """Normalised, as samplers hold them."""
    video: Float[Tensor, "B T 3 H W"]
    """RGB in [0, 1], T = s (L - 1) + 1."""
    intrinsics: Float[Tensor, "B T 3 3"] | None = None
    """In pixels of the video, if both models shall be given them."""


@dataclass(frozen=True)
class Layer:
    """A stitch point and how well the model entered there in closed form does on held-out clips."""

    point: str
    r2: float
    """Of the connector: 1 - squared error / variance of the tokens, all channels together."""
    distances: dict[str, float]
    """Of each output from the teacher's."""
    total: float
    """Their weighted sum."""
    model: LatentGeometryModel


def stitch(
    backbone: HookedBackbone,
    connector: Connector,
    samples: Iterable[Sample],
    points: Sequence[str] | None = None,
    *,
    ridge: float = 1e-4,
    total: Total = _own,
) -> dict[str, LatentGeometryModel]:
    """The closed-form latent geometry model of every stitch point (or of some), all of them around the one backbone.

    Args:
        connector: how it is built; its weights do not matter and stay as they are.
        samples: calibration clips, read once.
        ridge: penalty in units of the latents' mean variance.
        total: sums a tensor over ranks, each of which has clips of its own: all get the same models.

    Raises:
        ValueError: no samples, or too few for ridge = 0.
    """
    points = backbone.spec.stitch_points if points is None else tuple(points)
    fit = ConnectorFit(connector, len(points) * backbone.spec.dim)
    prefix, rows = torch.zeros(len(points), backbone.spec.num_prefix, backbone.spec.dim, dtype=torch.float64), 0
    for sample in samples:
        patches, prefixes = tokens(backbone, connector, points, sample)
        fit.add(sample.z, patches)
        prefix = prefix.to(prefixes.device) + prefixes.double().sum((0, 1))
        rows += prefixes.shape[0] * prefixes.shape[1]
    fit.reduce(total)
    prefix, rows = total(prefix), int(total(prefix.new_tensor([rows])).item())
    if rows == 0:
        raise ValueError("there are no clips to fit the connector on")
    weight, bias = (x.unflatten(-1, (-1, len(points), backbone.spec.dim)) for x in fit.solve(ridge))
    models = {}
    for index, point in enumerate(points):
        own = copy.deepcopy(connector)
        set_connector(own.conv, weight[..., index, :].flatten(-2), bias[..., index, :].flatten(-2))
        models[point] = LatentGeometryModel(backbone, point, own, (prefix[index] / rows).to(weight.dtype))
    return models


@torch.no_grad()
def rank_layers(
    models: Mapping[str, LatentGeometryModel],
    samples: Iterable[Sample],
    weights: OutputWeights | None = None,
    total: Total = _own,
) -> list[Layer]:
    """Stitched models by what they put out on held-out clips, best first; R^2 beside it, which favours early blocks.

    Args:
        models: of one `stitch`: one backbone, connectors of one shape.
        samples: clips that `stitch` did not see, read once.
        total: as in `stitch`.

    Raises:
        ValueError: no models, or no samples.
    """
    if not models:
        raise ValueError("there are no models to rank")
    points, first = tuple(models), next(iter(models.values()))
    dim = first.backbone.spec.dim
    fit = ConnectorFit(first.connector, len(points) * dim)
    sums: dict[str, dict[str, Tensor]] = {point: {} for point in points}
    clips = 0
    for sample in samples:
        fit.add(sample.z, tokens(first.backbone, first.connector, points, sample)[0])
        truth = teach(first, sample)
        for point, model in models.items():
            for name, value in output_distances(student(model, sample), truth).items():
                sums[point][name] = sums[point].get(name, 0.0) + value.double().sum()
        clips += len(sample.z)
    if clips == 0:
        raise ValueError("there are no held-out clips to rank the layers on")
    fit.reduce(total)
    clips = int(total(torch.tensor([clips], dtype=torch.float64)).item())
    error, variance = fit.errors(*_solution(list(models.values())))
    r2 = 1 - error.unflatten(0, (len(points), dim)).sum(1) / variance.unflatten(0, (len(points), dim)).sum(1)
    layers = []
    for index, (point, model) in enumerate(models.items()):
        distances = {name: float(total(value)) / clips for name, value in sums[point].items()}
        summed = (weights or OutputWeights()).total({name: torch.tensor(x) for name, x in distances.items()})
        layers.append(Layer(point, float(r2[index]), distances, float(summed), model))
    return sorted(layers, key=lambda layer: layer.total)


def student(model: LatentGeometryModel, sample: Sample) -> Geometry:
    """What the latents say."""
    frames = model.connector.latent.frames(sample.z.shape[2], model.connector.mode)
    return model(sample.z, None if sample.intrinsics is None else sample.intrinsics[:, _every(frames)])


@torch.no_grad()
def teach(model: LatentGeometryModel, sample: Sample) -> Geometry:
    """What the same backbone, adapters disabled, says of the video, at the model's frames and on its pixels."""
    images, intrinsics, grid = _seen(model.connector, sample)
    with adapters_disabled(model.backbone):
        return model.backbone.forward_rgb(images, intrinsics, grid)


@contextmanager
def adapters_disabled(module: nn.Module) -> Iterator[None]:
    """The module as it was before any LoRA, to the bit. Which parameters train is the same before and after."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    trained = {name: p.requires_grad for name, p in module.named_parameters()}
    for layer in adapted:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in adapted:
            layer.enable_adapters(True)
        for name, p in module.named_parameters():
            p.requires_grad_(trained[name])


def _every(frames: range) -> slice:
    return slice(frames.start, frames.stop, frames.step)


def _seen(connector: Connector, sample: Sample) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
    """The frames that have token maps, their intrinsics, and the token grid."""
    L, h, w = sample.z.shape[2:]
    T = len(connector.latent.frames(L, "frames"))
    if sample.video.shape[1] != T:
        raise ValueError(f"{L} latent frames belong to {T} video frames, got {sample.video.shape[1]}")
    frames = _every(connector.latent.frames(L, connector.mode))
    intrinsics = None if sample.intrinsics is None else sample.intrinsics[:, frames]
    return sample.video[:, frames], intrinsics, connector.grid(h, w)


@torch.no_grad()
def tokens(
    backbone: HookedBackbone, connector: Connector, points: Sequence[str], sample: Sample
) -> tuple[Float[Tensor, "B T rows columns D"], Float[Tensor, "B T points P dim"]]:
    """The teacher's at the model's frames: patch tokens of all points side by side, and prefix tokens."""
    images, intrinsics, grid = _seen(connector, sample)
    with adapters_disabled(backbone):
        found = backbone.tokens_at(points, images, intrinsics, grid)
    patches = torch.cat([found[point].patch for point in points], dim=-1)
    return patches, torch.stack([found[point].prefix for point in points], dim=2)


def _solution(models: Sequence[LatentGeometryModel]) -> tuple[Tensor, Tensor]:
    """Weights and biases of several connectors, side by side as `ConnectorFit` has them."""
    weights, biases = [], []
    for model in models:
        conv, dim = model.connector.conv, model.connector.dim
        assert conv.bias is not None
        weights.append(conv.weight.flatten(1).mT.double().unflatten(1, (-1, dim)))
        biases.append(conv.bias.double().unflatten(0, (-1, dim)))
    return torch.cat(weights, dim=-1).flatten(1), torch.cat(biases, dim=-1).flatten()
