"""Ordinary finetuning of a video model on clips: flow matching on cached latents, resumable to the bit.

Every step draws from a generator of its own, seeded by the run's seed and the step, so that nothing but weights, their
average, the optimiser's moments and the step has to be kept.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from jaxtyping import Float
from torch import Tensor

from vggrpo.bootstrap.training import load_training, save_training
from vggrpo.data import Encoded, encode_clips
from vggrpo.flow import interpolate
from vggrpo.muon import MuonAdamW
from vggrpo.policy.encoders import load_encoders
from vggrpo.policy.lora import add_lora, save_lora
from vggrpo.policy.wan_folder import lora_folder
from vggrpo.sft_config import MAY_CHANGE, SftRecipe, WanSize
from vggrpo.sft_role import Finetuning, Role, role_of, without_first

BUCKETS = 5
"""Equal parts of the times that the transformer is asked at, for which the held-out loss is reported."""
ALONE = Role()
BETAS = (0.9, 0.95)
"""Of AdamW."""


def new_transformer(size: WanSize, channels: int, text_dim: int) -> WanTransformer3DModel:
    """An untrained Wan transformer for latents of `channels`; random numbers come from torch's global generator."""
    return WanTransformer3DModel(
        num_layers=size.layers,
        num_attention_heads=size.heads,
        attention_head_dim=size.head_dim,
        ffn_dim=size.ffn_dim,
        in_channels=channels,
        out_channels=channels,
        text_dim=text_dim,
    )


def load_transformer(
    folder: Path, part: str = "transformer", dtype: torch.dtype = torch.float32
) -> WanTransformer3DModel:
    """A transformer of a Wan folder; by default the first, where there are two. In bf16, embeddings of time, norms and
    modulation stay in fp32 (`wan_folder.load_velocity`).

    Raises:
        ValueError: the folder has none.
    """
    if not (folder / part).is_dir():
        raise ValueError(f"{folder} has no {part}/: give `new` a size to train one from nothing")
    return WanTransformer3DModel.from_pretrained(folder / part, local_files_only=True, torch_dtype=dtype)


def finetune(recipe: SftRecipe, say: Callable[[str], None]) -> Finetuning:
    """All of a finetuning, from encoding the clips to the last step; what was done before is not done again.

    Raises:
        ValueError: from `role_of`, `load_encoders`, `encode_clips` and `start_sft`.
    """
    role = role_of(recipe)
    encoders = load_encoders(
        Path(recipe.model), recipe.max_len, recipe.device, first_frames=role.way == "channels", sight=role.sight
    )
    data, held_out = (encode_clips(clips, encoders, say) for clips in (recipe.data, recipe.held_out))
    del encoders  # the training needs their memory, not them
    if role.way == "kept":
        data, held_out = without_first(data), without_first(held_out)
    training = start_sft(recipe, data, role)
    for loss in train_sft(training, recipe, data, held_out):
        left = training.seconds / training.step * (recipe.num_steps - training.step) / 60
        say(f"step {training.step} of {recipe.num_steps}  loss {loss:.4f}  {left:.0f} min left")
    return training


def start_sft(recipe: SftRecipe, data: Encoded, role: Role = ALONE) -> Finetuning:
    """A finetuning at step 0, or where the checkpoint in `recipe.out` left it.

    Args:
        role: of what is trained (`role_of`); by default the only transformer of a model that takes prompts alone.

    Raises:
        ValueError: no transformer to start from; a checkpoint that is damaged or was made by another recipe.
    """
    torch.manual_seed(recipe.seed)
    if recipe.new is None:
        frozen = recipe.bf16 and recipe.lora is not None  # what is trained is fp32 in any case
        transformer = load_transformer(Path(recipe.model), role.part, torch.bfloat16 if frozen else torch.float32)
    else:
        transformer = new_transformer(recipe.new, data.z0.shape[1], data.text.shape[-1])
    if recipe.lora is not None:
        add_lora(transformer, recipe.lora)
    if recipe.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer = transformer.to(recipe.device)
    training = Finetuning(transformer, _optimizer(transformer, recipe), role=role)
    load_training(_checkpoint(recipe), training, asdict(recipe), MAY_CHANGE)
    return training


def train_sft(training: Finetuning, recipe: SftRecipe, data: Encoded, held_out: Encoded) -> Iterator[float]:
    """Train to the recipe's last step, yielding every step's loss; checkpoints and curve on the way and at the end."""
    while training.step < recipe.num_steps:
        begin = time.perf_counter()
        loss = sft_step(training, recipe, data)
        training.seconds += time.perf_counter() - begin
        if training.step % recipe.checkpoint_every == 0 or training.step == recipe.num_steps:
            training.curve.append({"step": training.step} | measure_sft(training, recipe, held_out))
            save_training(_checkpoint(recipe), training, asdict(recipe))
        yield loss


def sft_step(training: Finetuning, recipe: SftRecipe, data: Encoded) -> float:
    """One step of the optimiser on one batch, and one of the average; the loss before it."""
    rng = torch.Generator().manual_seed(recipe.seed * 1_000_003 + training.step)
    rows = torch.randint(len(data.z0), (recipe.batch,), generator=rng)
    t = draw_times(recipe.batch, recipe.shift, rng, training.role.span)
    dropped = torch.rand(recipe.batch, 1, 1, generator=rng) < recipe.drop_caption
    text = torch.where(dropped, data.negative, data.text[rows])
    eps = torch.randn(data.z0[rows].shape, generator=rng)
    training.network.train()
    loss = flow_loss(training, recipe, data.z0[rows], eps, t, (text, *(x[rows] for x in data.given)))
    if recipe.channel_weights is not None:
        weights = loss.new_tensor(recipe.channel_weights)
        loss = loss * (weights / weights.mean())[:, None]
    if recipe.first_weight != 1:
        weights = torch.ones_like(loss[0, 0])
        weights[0] = recipe.first_weight
        loss = loss * (weights / weights.mean())
    loss = loss.mean()
    training.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([weight for _, weight in training.trained()], recipe.max_grad_norm)
    for group in training.optimizer.param_groups:
        group["lr"] = recipe.lr * rate(training.step, recipe)
    training.optimizer.step()
    training.update_average(recipe.average)
    return loss.item()


def rate(step: int, recipe: SftRecipe) -> float:
    """Share of the learning rate that a step is made with: up in a line, level, and down in a line to (almost) 0."""
    left = 1 - step / recipe.num_steps
    return min(1.0, (step + 1) / recipe.warmup, left / recipe.cooldown if recipe.cooldown else 1.0)


def draw_times(
    count: int, shift: float, generator: torch.Generator, span: tuple[float, float] = (0.0, 1.0)
) -> Float[Tensor, " {count}"]:
    """Flow times of a batch, one from each of `count` equal parts of u in (0, 1), shifted as in `time_grid`.

    Args:
        span: times that are wanted: u is then in what becomes of them, and the law of t is as before, between them.
    """
    begin, end = (t / (shift - (shift - 1) * t) for t in span)
    u = begin + (end - begin) * (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (shift * u / (1 + (shift - 1) * u)).clamp(*span)  # rounding must not cross the boundary


def flow_loss(
    training: Finetuning,
    recipe: SftRecipe,
    z0: Float[Tensor, "B C L h w"],
    eps: Float[Tensor, "B C L h w"],
    t: Float[Tensor, " B"],
    told: tuple[Tensor, ...],
) -> Float[Tensor, "B C L"]:
    """Mean squared error of the velocity, v = eps - z0 (`flow.py`), of each clip, channel and latent frame.

    Args:
        told: captions [B tokens channels], and what is told of first frames (`WanVelocity`).
    """
    z0, eps, t = (x.to(recipe.device) for x in (z0, eps, t))
    told = tuple(x.to(recipe.device) for x in told)
    z_t = interpolate(z0, eps, t.view(-1, 1, 1, 1, 1))
    with torch.autocast(z0.device.type, torch.bfloat16, enabled=recipe.bf16):
        v = training.velocity(z_t, t, told)
    return F.mse_loss(v.float(), eps - z0, reduction="none").mean((3, 4))


@torch.no_grad()
def measure_sft(training: Finetuning, recipe: SftRecipe, held_out: Encoded) -> dict[str, Any]:
    """Loss of the average on held-out clips: by bucket of t, over all, and with each other's captions.

    Noise and times depend on the clip alone, so that points of one curve can be compared. Where captions are used, the
    loss with another clip's is the higher one.
    """
    N = len(held_out.z0)
    rng = torch.Generator().manual_seed(recipe.seed)
    times = (torch.arange(BUCKETS)[:, None] + torch.rand(BUCKETS, N, generator=rng)) / BUCKETS
    begin, end = training.role.span
    times = begin + (end - begin) * times
    eps = torch.randn(BUCKETS, *held_out.z0.shape, generator=rng)

    def told(text: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        return (text[i], *(x[i] for x in held_out.given))

    training.swap_average()
    training.network.eval()
    losses = [
        torch.stack(
            [
                torch.cat(
                    [
                        flow_loss(training, recipe, held_out.z0[i], eps[bucket, i], times[bucket, i], told(text, i))
                        for i in torch.arange(N).split(recipe.batch)
                    ]
                ).cpu()
                for bucket in range(BUCKETS)
            ]
        ).mean((1, 2, 3))
        for text in (held_out.text, held_out.text.roll(1, 0))
    ]
    training.swap_average()
    return {
        "loss": round(losses[0].mean().item(), 5),
        "other_captions": round(losses[1].mean().item(), 5),
        "by_time": [round(x, 5) for x in losses[0].tolist()],
    }


def save_result(training: Finetuning, recipe: SftRecipe) -> Path:
    """Write the average: a transformer/ folder, or a LoRA that `pipe.load_lora_weights` loads at the right scale; of a
    second transformer in transformer_2/, both, as a run's (`wan_folder.save_loras`)."""
    training.swap_average()
    out = Path(recipe.out)
    if recipe.lora is None:
        out /= training.role.part
        training.network.save_pretrained(out)
    else:
        out = lora_folder(out, training.role.part)
        out.mkdir(parents=True, exist_ok=True)
        save_lora(training.network, out)
    training.swap_average()
    return out


def _optimizer(transformer: WanTransformer3DModel, recipe: SftRecipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "muon":
        return MuonAdamW(transformer, recipe.lr, BETAS, recipe.weight_decay)
    trained = [weight for weight in transformer.parameters() if weight.requires_grad]
    return torch.optim.AdamW(trained, recipe.lr, BETAS, weight_decay=recipe.weight_decay)


def _checkpoint(recipe: SftRecipe) -> Path:
    return Path(recipe.out) / "checkpoint.safetensors"
