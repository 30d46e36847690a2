"""Training the referee's network on the world's truth, resumable to the bit.

Depth, what moves and how far each displacement is to be trusted are taught directly; cameras follow from them without
being learnt (`geometry/models/bundle.py`). Every step draws from a generator of its own, seeded by the run's seed and
the step, so that weights, their average, Adam's moments and the step are all that has to be kept.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from geometry.cameras import anchored
from geometry.models.bundle import unexplained
from geometry.models.referee import Referee, RefereeConfig
from geometry.models.referee_cameras import Impression, normalised
from geometry.models.referee_flow import CELL, Tracks, edges
from vggrpo.bootstrap.geometry_eval import measure, predict
from vggrpo.bootstrap.geometry_recipe import Batch
from vggrpo.bootstrap.geometry_train import lessons_of
from vggrpo.bootstrap.lesson import Lesson
from vggrpo.bootstrap.referee_data import Exam
from vggrpo.bootstrap.training import Training, load_training, save_training

MAY_CHANGE = ("out", "asset", "geometry", "checkpoint_every", "num_steps")
"""Fields in which a resumed run may differ from what it was started with."""
VALIDATION = range(49_000_000, 49_000_016)
"""Clips that the curve is measured on; the card's numbers come from others."""
FAR = 15.0
"""Depth of the sky in median depths: a target, so that it counts for rotation."""
WARMUP = 50


@dataclass(frozen=True)
class RefereeRecipe:
    """All of the referee's training."""

    out: str = "runs/bootstrap/referee"
    """Folder of the checkpoint and of the rendered clips."""
    asset: str = "assets/tiny-referee"
    """Folder that the finished model is written to, with its card."""
    vae: str = "assets/tiny-wan/vae"
    """The video VAE that a share of the training clips goes through."""
    geometry: str = "assets/tiny-geometry"
    """The embedded geometry model, which the card compares with. Nothing of it is trained on."""
    seed: int = 7
    """Of every random stream."""
    model: RefereeConfig = field(default_factory=RefereeConfig)
    """Widths of the network."""
    num_clips: int = 1600
    """Training clips; half of them have moving bodies."""
    first_clip: int = 40_000_000
    """Their first seed."""
    num_steps: int = 900
    """Optimiser steps. A run can be resumed with another number: learning rate and batches go by the share done."""
    batches: list[Batch] = field(default_factory=lambda: [Batch(0.6, 5, 5), Batch(1.0, 2, 13)])
    """Many scenes of few frames first, then longer windows."""
    lr: float = 2e-3
    """Highest learning rate of AdamW (betas .9, .98); it falls as a cosine."""
    weight_decay: float = 0.02
    """Of AdamW."""
    average: float = 0.99
    """Decay of the weights' running average, which is what is evaluated and shipped."""
    checkpoint_every: int = 180
    """Steps between checkpoints, each with a point of the curve."""

    def __post_init__(self) -> None:
        for name in ("num_clips", "num_steps", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        shares = [batch.until for batch in self.batches]
        if not shares or shares != sorted(shares) or shares[-1] != 1:
            raise ValueError(f"batches must have rising `until` that ends with 1.0, got {shares}")
        if any(not 2 <= batch.frames <= 17 or batch.clips < 1 for batch in self.batches):
            raise ValueError("batches must have 2 to 17 frames and at least one clip")


def start_run(recipe: RefereeRecipe) -> Training[Referee]:
    """A run at step 0, or where the checkpoint in `recipe.out` left it.

    Raises:
        ValueError: the checkpoint is damaged, or was made by another recipe.
    """
    torch.manual_seed(recipe.seed)
    network = Referee(recipe.model)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    run = Training(network, optimizer)
    load_training(checkpoint_of(recipe), run, asdict(recipe), MAY_CHANGE)
    return run


def train_referee(run: Training[Referee], recipe: RefereeRecipe, exams: Exam) -> Iterator[dict[str, float]]:
    """Train to the recipe's last step, yielding every step's terms; checkpoints on the way and at the end."""
    validation = lessons_of(VALIDATION, CELL, (0.0,))
    while run.step < recipe.num_steps:
        begin = time.perf_counter()
        terms = train_step(run, recipe, exams)
        run.seconds += time.perf_counter() - begin
        if run.step % recipe.checkpoint_every == 0 or run.step == recipe.num_steps:
            note(run, validation)
            save_training(checkpoint_of(recipe), run, asdict(recipe))
        yield terms


def train_step(run: Training[Referee], recipe: RefereeRecipe, exams: Exam) -> dict[str, float]:
    """One step of AdamW on one batch of windows, and one of the average."""
    rng = torch.Generator().manual_seed(recipe.seed * 1_000_003 + run.step)
    share = run.step / recipe.num_steps
    batch = next(batch for batch in recipe.batches if share < batch.until)
    window = draw_window(exams, batch, rng)
    video, wanted = recoloured(window, rng), truth(window)
    found = run.network.judge(video, tracks_of(window), window.intrinsics)
    first, last = losses(found.first, wanted), losses(found.last, wanted)
    total = 0.5 * torch.stack(list(first.values())).sum() + torch.stack(list(last.values())).sum()
    run.optimizer.zero_grad(set_to_none=True)
    total.backward()
    torch.nn.utils.clip_grad_norm_(run.network.parameters(), 1.0)
    rate = min(1.0, (run.step + 1) / WARMUP) * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2)
    run.optimizer.param_groups[0]["lr"] = recipe.lr * rate
    run.optimizer.step()
    run.update_average(recipe.average)
    return {name: x.item() for name, x in last.items()}


@dataclass(frozen=True)
class Wanted:
    """Truth in the network's units: lengths in median depths of the window."""

    log_depth: Float[Tensor, "B T H W"]
    valid: Float[Tensor, "B T H W"]
    dynamic: Float[Tensor, "B T H W"]
    surprise: Float[Tensor, "B E h w"]
    """How far each displacement is from that of a point that stands still, in units of its own sharpness."""


def truth(window: Exam) -> Wanted:
    """What a perfect network would know."""
    depth = window.depth.float()
    unit = torch.where(window.valid, depth, torch.nan).flatten(1).nanmedian(dim=1).values[:, None, None, None]
    log_depth = torch.log((depth / unit).clamp(max=FAR))
    c2w = anchored(window.c2w)
    c2w[..., :3, 3] /= unit[:, 0]
    tracks = tracks_of(window)
    seen, scale = normalised(tracks, window.intrinsics)
    off = unexplained(c2w, F.avg_pool2d(log_depth, CELL).flatten(2), seen).unflatten(2, tracks.flow.shape[2:4]) * scale
    surprise = (off[..., None, :] @ tracks.information @ off[..., None])[..., 0, 0].clamp(min=0).sqrt()
    return Wanted(log_depth, window.valid.float(), window.dynamic.float(), surprise.clamp(max=100))


def losses(seen: Impression, wanted: Wanted) -> dict[str, Tensor]:
    """Each term by name; their sum is trained."""
    heed = wanted.valid + 0.1 * (1 - wanted.valid)
    error = (seen.log_depth - wanted.log_depth).abs()
    still = seen.witness
    return {
        "depth": 1.5 * (heed * error).mean(),
        "doubt": 0.2 * (heed * (error.detach() * torch.exp(-seen.log_doubt) + seen.log_doubt)).mean(),
        "edges": 0.5 * _slope(seen.log_depth - wanted.log_depth, wanted.valid),
        "dynamic": 0.3
        * F.binary_cross_entropy_with_logits(seen.dynamic, wanted.dynamic, pos_weight=error.new_tensor(2.0)),
        # A Cauchy density in the plane: most displacements are near the truth, some anywhere.
        "witness": 0.2 * (1.5 * torch.log1p((wanted.surprise * torch.exp(-still)).square()) + 2 * still).mean(),
    }


def draw_window(exams: Exam, batch: Batch, rng: torch.Generator) -> Exam:
    """Random windows of neighbouring frames, half of them mirrored left-right; never upside down: there is a floor."""
    T = exams.video.shape[1]
    start = int(torch.randint(T - batch.frames + 1, (), generator=rng))
    index = torch.randint(len(exams), (batch.clips,), generator=rng)
    window = cut(exams.map(lambda x: x[index]), start, batch.frames)
    return mirrored(window) if float(torch.rand((), generator=rng)) < 0.5 else window


def cut(exams: Exam, start: int, frames: int) -> Exam:
    """A window of frames, with the displacements that begin and end in it."""
    source, target, _ = edges(exams.video.shape[1])
    stop = start + frames
    inside = (source >= start) & (source < stop) & (target >= start) & (target < stop)
    names = ("flow", "information", "loop")
    parts = {name: x[:, inside] if name in names else x[:, start:stop] for name, x in vars(exams).items()}
    return Exam(**parts)


def mirrored(window: Exam) -> Exam:
    """The mirrored world, left-right; the principal point must be the centre."""
    sign = window.c2w.new_tensor([-1.0, 1.0, 1.0, 1.0])
    flip = sign[:2].to(window.flow)
    return replace(
        window,
        video=window.video.flip(-1),
        c2w=sign[:, None] * window.c2w * sign,
        depth=window.depth.flip(-1),
        valid=window.valid.flip(-1),
        dynamic=window.dynamic.flip(-1),
        flow=window.flow.flip(3) * flip,
        information=window.information.flip(3) * flip[:, None] * flip,
        loop=window.loop.flip(3),
    )


def recoloured(window: Exam, rng: torch.Generator) -> Float[Tensor, "B T 3 H W"]:
    """The video in other colours and another light."""
    video = window.video.float()[:, :, torch.randperm(3, generator=rng)] / 255
    gain = 0.75 + 0.45 * torch.rand(len(video), 1, 3, 1, 1, generator=rng)
    return (video * gain).clamp(0, 1)


def tracks_of(window: Exam) -> Tracks:
    """Its displacements as the network takes them."""
    source, target, _ = edges(window.video.shape[1])
    return Tracks(source, target, window.flow.float(), window.information.float(), window.loop.float())


def note(run: Training[Referee], validation: Lesson) -> None:
    """A point of the curve: the running average on clips of other seeds."""
    with run.averaged() as network:
        numbers = measure(predict(network, validation), validation)
    rounded = {name: round(value, 4) for name, value in numbers.items()}
    run.curve.append({"step": run.step, "seconds": round(run.seconds, 1)} | rounded)


def checkpoint_of(recipe: RefereeRecipe) -> Path:
    """Where a run is kept."""
    return Path(recipe.out) / "checkpoint.safetensors"


def _slope(error: Float[Tensor, "B T H W"], valid: Float[Tensor, "B T H W"]) -> Tensor:
    across = (error[..., 1:] - error[..., :-1]).abs() * valid[..., 1:] * valid[..., :-1]
    down = (error[..., 1:, :] - error[..., :-1, :]).abs() * valid[..., 1:, :] * valid[..., :-1, :]
    return across.mean() + down.mean()
