"""Training the geometry model on the world's truth, resumable to the bit.

Every step draws from a generator of its own, seeded by the run's seed and the step, so that nothing but weights, their
average, Adam's moments and the step has to be kept (`training.py`).
"""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geometry.backbone import HookedBackbone
from geometry.models.tiny import TinyGeometry, call, parse, spec
from geometry.world import make_clips
from vggrpo.bootstrap.assets import load_tensors, read_card, save_tensors
from vggrpo.bootstrap.geometry_eval import measure, predict
from vggrpo.bootstrap.geometry_loss import losses, truth
from vggrpo.bootstrap.geometry_recipe import MAY_CHANGE, Batch, GeometryRecipe
from vggrpo.bootstrap.lesson import Lesson, lesson
from vggrpo.bootstrap.progress import Progress
from vggrpo.bootstrap.training import Training, load_training, save_training

JITTER = (0.0, 0.0, 0.15, 0.0, 0.6, 0.3)
"""Degrees of hand-held shake that groups of clips take in turn."""
RENDERED_AT_ONCE = 8
VALIDATION = range(9_000_000, 9_000_032)
"""Clips that the curve is measured on; the card's numbers come from others."""


def lessons_of(seeds: range, patch: int, jitter: tuple[float, ...] = JITTER) -> Lesson:
    """Clips of the world and their truth; every other group of `RENDERED_AT_ONCE` seeds has moving bodies."""
    parts, progress = [], Progress()
    for k, start in enumerate(range(seeds.start, seeds.stop, RENDERED_AT_ONCE)):
        some = range(start, min(start + RENDERED_AT_ONCE, seeds.stop))
        clip = make_clips(some, dynamic=k % 2 == 1, jitter=jitter[k // 2 % len(jitter)])
        parts.append(lesson(clip, patch))
        progress(f"rendering: {some.stop - seeds.start} of {len(seeds)} clips")
    return Lesson(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Lesson)})


def load_lessons(recipe: GeometryRecipe) -> Lesson:
    """The recipe's training clips, rendered the first time and kept in its folder.

    Raises:
        ValueError: the file is damaged or holds other seeds.
    """
    path = Path(recipe.out) / "lessons.safetensors"
    seeds = range(recipe.first_clip, recipe.first_clip + recipe.num_clips)
    wanted = {"seeds": [seeds.start, seeds.stop], "patch": recipe.model.patch}
    if not path.exists():
        save_tensors(
            path, {name: x.contiguous() for name, x in vars(lessons_of(seeds, recipe.model.patch)).items()}, wanted
        )
    tensors, notes = load_tensors(path)
    if notes != wanted:
        raise ValueError(f"{path} holds clips {notes}, not {wanted}: delete it or give the run another folder")
    return Lesson(**tensors)


def start_run(recipe: GeometryRecipe) -> Training[TinyGeometry]:
    """A training at step 0, or where the checkpoint in `recipe.out` left it.

    Raises:
        ValueError: the checkpoint is damaged, or was made by another recipe; a start of another architecture; no notes
            where the recipe says.
    """
    if recipe.notes is not None and not Path(recipe.notes).is_file():
        raise ValueError(f"no notes at {recipe.notes}: write them there, or leave `notes` out of the recipe")
    torch.manual_seed(recipe.seed)
    network = TinyGeometry(recipe.model)
    if recipe.start is not None:
        take_weights(network, Path(recipe.start))
    freeze(network, recipe.frozen)
    network.to(recipe.device)
    optimizer = torch.optim.AdamW(
        [weight for weight in network.parameters() if weight.requires_grad],
        lr=recipe.lr,
        betas=(0.9, 0.95),
        weight_decay=recipe.weight_decay,
    )
    run = Training(network, optimizer)
    load_training(checkpoint_of(recipe), run, asdict(recipe), MAY_CHANGE)
    return run


def take_weights(network: TinyGeometry, folder: Path) -> None:
    """Give the network the weights of a published one; what that lacks stays as it is.

    Raises:
        ValueError: no card, a damaged file, or a weight that the network has not or in another shape.
    """
    read_card(folder)
    weights, own = load_tensors(folder / "model.safetensors")[0], network.state_dict()
    for name, weight in weights.items():
        if name not in own or own[name].shape != weight.shape:
            raise ValueError(f"{folder} has another architecture ({name}): give `model` its config.json's numbers")
    network.load_state_dict(weights, strict=False)


def freeze(network: nn.Module, names: list[str]) -> None:
    """Take modules out of training.

    Raises:
        ValueError: the network has no module of that name.
    """
    known = dict(network.named_children())
    for name in names:
        if name not in known:
            raise ValueError(f"nothing to freeze at {name}: the network has {', '.join(known)}")
        known[name].requires_grad_(False)


def checkpoint_of(recipe: GeometryRecipe) -> Path:
    """Where a run is kept."""
    return Path(recipe.out) / "checkpoint.safetensors"


def train_geometry(run: Training[TinyGeometry], recipe: GeometryRecipe, lessons: Lesson) -> Iterator[dict[str, float]]:
    """Train to the recipe's last step, yielding every step's numbers; checkpoints on the way and at the end."""
    validation = lessons_of(VALIDATION, recipe.model.patch, (0.0,)).map(lambda x: x.to(recipe.device))
    lessons = lessons.map(lambda x: x.to(recipe.device))
    while run.step < recipe.num_steps:
        if run.step % recipe.checkpoint_every == 0:
            _note_and_save(run, recipe, validation)
        begin = time.perf_counter()
        numbers = train_step(run, recipe, lessons)
        run.seconds += time.perf_counter() - begin
        yield numbers | {"seconds": run.seconds}
    _note_and_save(run, recipe, validation)


def train_step(run: Training[TinyGeometry], recipe: GeometryRecipe, lessons: Lesson) -> dict[str, float]:
    """One step of AdamW on one batch of windows, and one of the average."""
    rng = torch.Generator().manual_seed(recipe.seed * 1_000_003 + run.step)
    share = run.step / recipe.num_steps
    batch = next(batch for batch in recipe.batches if share < batch.until)
    video, wanted = draw_batch(lessons, batch, rng)
    given = float(torch.rand((), generator=rng)) >= recipe.without_focal
    found = run.network(video, wanted.intrinsics if given else None)
    terms = losses(found, truth(wanted), focal_given=given)
    run.optimizer.zero_grad(set_to_none=True)
    torch.stack(list(terms.values())).sum().backward()
    norm = torch.nn.utils.clip_grad_norm_(run.network.parameters(), recipe.max_grad_norm)
    falling = max(0.0, (share - recipe.hold) / (1 - recipe.hold))
    lr = recipe.lr * min(1.0, (run.step + 1) / recipe.warmup) * (0.03 + 0.97 * (1 + math.cos(math.pi * falling)) / 2)
    run.optimizer.param_groups[0]["lr"] = lr
    if bool(norm.isfinite()):  # a pair of frames without any texture can leave the solver without an answer
        run.optimizer.step()
    run.update_average(recipe.average)
    return {"step": float(run.step), "lr": lr, "grad_norm": norm.item()} | {name: x.item() for name, x in terms.items()}


def draw_batch(lessons: Lesson, batch: Batch, rng: torch.Generator) -> tuple[Float[Tensor, "B T 3 H W"], Lesson]:
    """Random windows, half of them mirrored, in other colours and light, with a little noise.

    Never upside down: the floor is below, and a mean depth for each pixel alone has an AbsRel of 0.30 against 0.39.
    """
    T = lessons.video.shape[1]
    start = int(torch.randint(T - batch.frames + 1, (), generator=rng))
    index = torch.randint(len(lessons), (batch.clips,), generator=rng).to(lessons.video.device)
    window = lessons.map(lambda x: x[index, start : start + batch.frames]).window(0, batch.frames)
    if float(torch.rand((), generator=rng)) < 0.5:
        window = mirrored(window, axis=0)
    video = window.video.float()[:, :, torch.randperm(3, generator=rng)] / 255
    gain = 0.75 + 0.45 * torch.rand(batch.clips, 1, 3, 1, 1, generator=rng)
    noise = 0.02 * torch.rand((), generator=rng) * torch.randn(video.shape, generator=rng)
    return (video * gain.to(video) + noise.to(video)).clamp(0, 1), window


def mirrored(lesson: Lesson, axis: int) -> Lesson:
    """The lesson of the mirrored world, left-right (0) or up-down (1); the principal point must be the centre."""
    sign = torch.ones(4, device=lesson.video.device)
    sign[axis] = -1
    flat, deep = -1 - axis, -2 - axis
    return replace(
        lesson,
        video=lesson.video.flip(flat),
        c2w=sign[:, None] * lesson.c2w * sign,
        depth=lesson.depth.flip(flat),
        valid=lesson.valid.flip(flat),
        dynamic=lesson.dynamic.flip(flat),
        motion=lesson.motion.flip(deep) * sign[:3].to(lesson.motion),
        flow=lesson.flow.flip(deep) * sign[:2].to(lesson.flow),
    )


def _note_and_save(run: Training[TinyGeometry], recipe: GeometryRecipe, validation: Lesson) -> None:
    """A point of the curve and a checkpoint; a run that has just been resumed has both already."""
    if run.curve and run.curve[-1]["step"] == run.step:
        return
    with run.averaged() as network:
        model = HookedBackbone(network, spec(network.config), call, parse)
        numbers = measure(predict(model, validation), validation)
    rounded = {name: round(value, 4) for name, value in numbers.items()}
    run.curve.append({"step": run.step, "seconds": round(run.seconds, 1)} | rounded)
    save_training(checkpoint_of(recipe), run, asdict(recipe))
