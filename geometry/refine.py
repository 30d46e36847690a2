"""Between the stages of a latent geometry model: its connector's refiner learns the teacher's tokens.

One convolution of the latents is all that a closed form can have, and a decoder is not linear. The tokens are a target
that needs no tail, so that thousands of clips cost little; only then is the tail trained with it (`distil.py`).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from geometry.distil import distil_update, stepped
from geometry.latent import LatentGeometryModel
from geometry.stitch import Sample, tokens


@dataclass(frozen=True)
class RefineConfig:
    """How large a refiner is, and how it is trained."""

    steps: int = 2000
    """Batches; 0 for no refiner."""
    width: int = 128
    """Its channels."""
    blocks: int = 2
    """Its residual blocks, at the latents' grid."""
    finish: int = 0
    """Its residual blocks that see the tokens, at theirs."""
    finish_width: int = 96
    """Channels of those."""
    change: float = 2.0
    """What the error's change from one token map to the next counts for, beside the error: it is taken for motion."""
    lr: float = 1e-3
    """Of AdamW, at its highest."""
    warmup: int = 30
    """Steps of linear warm-up; then a cosine to zero."""
    weight_decay: float = 0.01
    """Of AdamW."""
    clip: float = 1.0
    """Largest norm of the gradient."""

    def __post_init__(self) -> None:
        if min(self.steps, self.blocks, self.finish) < 0 or not 0 <= self.warmup <= self.steps:
            raise ValueError(f"steps, blocks and finish must be >= 0 and warmup in [0, steps], got {self}")
        if min(self.width, self.finish_width) < 1:
            raise ValueError(f"width and finish_width must be >= 1, got {self}")
        if min(self.lr, self.clip) <= 0 or min(self.weight_decay, self.change) < 0:
            raise ValueError(f"lr and clip must be > 0, weight_decay and change >= 0, got {self}")


def start_refine(model: LatentGeometryModel, config: RefineConfig) -> torch.optim.AdamW:
    """A refiner if the connector has none, and the optimiser of it alone; nothing else needs a gradient after it."""
    if model.connector.refiner is None:
        model.connector.add_refiner(config.width, config.blocks, config.finish, config.finish_width)
    assert model.connector.refiner is not None
    model.eval().requires_grad_(False)
    weights = list(model.connector.refiner.requires_grad_().parameters())
    groups = [{"params": weights, "lr": config.lr, "share": 1.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=config.weight_decay)


def refine_step(
    model: LatentGeometryModel, sample: Sample, optimizer: torch.optim.Optimizer, step: int, config: RefineConfig
) -> dict[str, float]:
    """Train on one batch, the `step`-th from 0: mean squared error of the tokens, of their change, and the loss."""
    optimizer.zero_grad()
    record = refine_backward(model, sample, config)
    return record | distil_update(optimizer, step, config)


def refine_backward(
    model: LatentGeometryModel, sample: Sample, config: RefineConfig, share: float = 1.0
) -> dict[str, float]:
    """Add the gradient of `share` of a batch's loss; the errors and the loss come back, for the batch itself."""
    wanted, _ = tokens(model.backbone, model.connector, (model.point,), sample)
    error = model.connector(sample.z).float() - wanted
    record = {"tokens": error.square().mean()}
    if error.shape[1] > 1:
        record["change"] = error.diff(dim=1).square().mean()
    loss = record["tokens"] + config.change * record.get("change", 0.0)
    (share * loss).backward()
    return {name: float(x.detach()) for name, x in record.items()} | {"loss": float(loss.detach())}


def refine(model: LatentGeometryModel, samples: Iterable[Sample], config: RefineConfig) -> Iterator[dict[str, float]]:
    """Train in place, one step (`refine_step`) for each record that is taken.

    Args:
        model: from `stitch`; its connector is given a refiner if it has none.
        samples: batches, at least `config.steps` of them.

    Raises:
        ValueError: samples that run out, or do not fit the model.
    """
    optimizer = start_refine(model, config)
    return stepped(samples, config.steps, lambda sample, step: refine_step(model, sample, optimizer, step, config))
