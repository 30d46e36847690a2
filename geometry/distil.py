"""Stage 2 of a latent geometry model: the stitched model learns to say of latents what its teacher says of the video.

The connector, the prefix tokens and LoRA adapters of the tail are trained; the backbone itself is not touched, so the
teacher is the same module with its adapters disabled, and one copy of the weights serves both.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from geometry.distance import OutputWeights, output_distances
from geometry.hooks import recorded
from geometry.latent import LatentGeometryModel
from geometry.stitch import Sample, student, teach


@runtime_checkable
class Schedule(Protocol):
    """Of a training's learning rate."""

    @property
    def steps(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def warmup(self) -> int: ...
    @property
    def clip(self) -> float: ...


@dataclass(frozen=True)
class DistilConfig:
    """How a stitched model is trained (defaults: VIST3A and VGGRPO, arXiv 2603.26599)."""

    steps: int = 1000
    """Batches."""
    lr: float = 2e-4
    """Of AdamW, at its highest."""
    connector: float = 1.0
    """Share of it for the connector and the prefix, whose hundreds of inputs all move together under Adam."""
    warmup: int = 100
    """Steps of linear warm-up; then a cosine to zero."""
    weight_decay: float = 0.0
    """Of AdamW."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    rank: int = 64
    """Of LoRA on every linear map and 2-D convolution in the tail's blocks and in the spec's heads."""
    alpha: int = 32
    """Its scale, times the rank."""
    weights: OutputWeights = field(default_factory=OutputWeights)
    """What each output's distance counts for."""
    matched: float = 0.0
    """What the mean L1 distance of the outputs of the spec's `matched` modules counts for, in their own units."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rank < 1 or self.alpha < 1 or not 0 <= self.warmup < self.steps:
            raise ValueError(f"steps, rank and alpha must be >= 1 and warmup in [0, steps), got {self}")
        if min(self.lr, self.connector, self.clip) <= 0 or min(self.weight_decay, self.matched) < 0:
            raise ValueError(f"lr, connector and clip must be > 0, weight_decay and matched >= 0, got {self}")


def add_lora(model: LatentGeometryModel, rank: int, alpha: int) -> None:
    """Adapters in tail and heads, which change nothing yet. The backbone's own parameters need no gradient after it.

    Raises:
        ValueError: the tail has adapters already, or nothing in it can have them.
    """
    from peft import LoraConfig, inject_adapter_in_model

    module, spec = model.backbone.module, model.backbone.spec
    if any("lora_" in name for name in trained(model)):
        raise ValueError("the backbone has LoRA adapters already; build the model around a fresh one")
    # Subclasses are left out: nn.MultiheadAttention reads its out_proj's weight and would never call an adapter.
    targets = [
        f"{path}.{name}" if name else path
        for path in (*spec.after(model.point), *spec.heads)
        for name, layer in module.get_submodule(path).named_modules()
        if type(layer) in (nn.Linear, nn.Conv2d)
    ]
    if not targets:
        raise ValueError(f"there is nothing after {model.point} that can have LoRA; stitch earlier")
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), module)
    model.lora = rank, alpha


def trained(model: LatentGeometryModel) -> dict[str, nn.Parameter]:
    """What distillation changes, by name: the connector with its refiner, the prefix, and the adapters."""
    return {name: p for name, p in model.named_parameters() if not name.startswith("backbone.") or "lora_" in name}


def learning_rate(step: int, config: Schedule) -> float:
    """As a fraction of the highest: linear up to 1, then a cosine down to 0."""
    if step < config.warmup:
        return (step + 1) / (config.warmup + 1)
    return (1 + math.cos(math.pi * (step - config.warmup) / (config.steps - config.warmup))) / 2


def start(model: LatentGeometryModel, config: DistilConfig) -> torch.optim.AdamW:
    """Adapters if the model has none, and the optimiser of all that is trained; nothing else needs a gradient after it.

    Both models run in eval mode, as they are used.
    """
    if model.lora is None:
        add_lora(model, config.rank, config.alpha)
    model.eval().requires_grad_(False)
    groups = []
    for share, adapters in ((1.0, True), (config.connector, False)):
        some = [p.requires_grad_() for name, p in trained(model).items() if ("lora_" in name) == adapters]
        groups.append({"params": some, "lr": share * config.lr, "share": share})
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay)


def distil_step(
    model: LatentGeometryModel, sample: Sample, optimizer: torch.optim.Optimizer, step: int, config: DistilConfig
) -> dict[str, float]:
    """Train on one batch, the `step`-th from 0: each distance (outputs, matched modules), loss and gradient before it.

    A batch whose gradient is not finite changes nothing, and `gradient` says so.
    """
    optimizer.zero_grad()
    record = distil_backward(model, sample, config)
    return record | distil_update(optimizer, step, config)


def distil_backward(
    model: LatentGeometryModel, sample: Sample, config: DistilConfig, share: float = 1.0
) -> dict[str, float]:
    """Add the gradient of `share` of a batch's loss; each distance and the loss come back, for the batch itself."""
    module, matched = model.backbone.module, model.backbone.spec.matched
    with recorded(module, matched) as ours:
        scene = student(model, sample)
    with recorded(module, matched) as theirs:
        wanted = teach(model, sample)
    distances = output_distances(scene, wanted)
    gaps = {path: (ours[path] - theirs[path]).abs().mean() for path in matched}
    loss = config.weights.total(distances).mean() + config.matched * sum(gaps.values())
    (share * loss).backward()
    record = {name: float(x.detach().mean()) for name, x in (distances | gaps).items()}
    return {**record, "loss": float(loss.detach())}


def distil_update(optimizer: torch.optim.Optimizer, step: int, config: Schedule) -> dict[str, float]:
    """The `step`-th step from 0, on the gradient that was added up: its norm before clipping, and the learning rate."""
    rate = config.lr * learning_rate(step, config)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = group["share"] * rate
    gradient = nn.utils.clip_grad_norm_(parameters, config.clip)
    if gradient.isfinite():
        optimizer.step()
    return {"gradient": float(gradient), "lr": rate}


def distil(model: LatentGeometryModel, samples: Iterable[Sample], config: DistilConfig) -> Iterator[dict[str, float]]:
    """Train in place, one step (`distil_step`) for each record that is taken.

    Args:
        model: from `stitch`; it is given adapters if it has none.
        samples: batches, at least `config.steps` of them.

    Raises:
        ValueError: samples that run out, or do not fit the model.
    """
    optimizer = start(model, config)
    return stepped(samples, config.steps, lambda sample, step: distil_step(model, sample, optimizer, step, config))


def stepped(
    samples: Iterable[Sample], steps: int, take: Callable[[Sample, int], dict[str, float]]
) -> Iterator[dict[str, float]]:
    """`take(sample, step)` for so many steps, from 0, one for each record that is taken.

    Raises:
        ValueError: samples that run out.
    """
    step = 0
    for step, sample in enumerate(islice(samples, steps), start=1):
        yield take(sample, step - 1)
    if step < steps:
        raise ValueError(f"the samples ran out after {step} of {steps} steps; give as many batches as steps")
