"""The embedded generator: a Wan transformer, trained by the ordinary finetuner, becomes a whole WanPipeline."""

import copy
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from transformers import AutoTokenizer, UMT5EncoderModel

from vggrpo.bootstrap.assets import read_card, save_json, sha256
from vggrpo.bootstrap.generator_card import card_text, result_lines
from vggrpo.bootstrap.generator_eval import (
    Reader,
    Sampling,
    commands,
    decoded,
    draw_sheet,
    evaluate_generator,
    held_out_seeds,
    sample_latents,
)
from vggrpo.bootstrap.training import Training
from vggrpo.bootstrap.vae_publish import hardware
from vggrpo.sft_config import SftRecipe, WanSize

FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
)
"""All that the pipeline is loaded from. VAE and text stage too: the transformer means nothing with others."""
PICTURE = "samples.png"


@dataclass(frozen=True)
class GeneratorRecipe:
    """All of the generator's training, read from `launch/recipes/bootstrap/generator.yaml`."""

    asset: str = "assets/tiny-wan"
    """Wan folder with VAE and text stage, which gets transformer, scheduler and model index, with their card."""
    referee: str = "assets/tiny-referee"
    """Folder of the geometry model that says what the camera does in the samples."""
    training: SftRecipe = field(default_factory=lambda: SftRecipe(new=WanSize()))
    """As for `vggrpo sft`; without `new`, the transformer of the asset goes on."""
    sampling: Sampling = field(default_factory=Sampling)
    """How the card's samples are drawn."""
    num_samples: int = 100
    """Held-out captions that it is measured on."""

    def __post_init__(self) -> None:
        if self.training.lora is not None:
            raise ValueError("training.lora must be left out: the generator is a whole transformer")
        if self.training.model != self.asset:
            raise ValueError(f"training.model is {self.training.model} and asset {self.asset}: they must be one folder")
        if self.sampling.max_len != self.training.max_len:
            raise ValueError("training.max_len and sampling.max_len must be the same")


def load_generator(folder: str | Path) -> WanPipeline:
    """The text-to-video pipeline of an asset folder, in fp32, from files that are what its card says.

    Raises:
        ValueError: a file is missing or has been changed (`assets.read_card`).
    """
    read_card(Path(folder))
    pipe = WanPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def publish_generator(training: Training, recipe: GeneratorRecipe, path: str, reader: Reader) -> list[str]:
    """Write the training's average below `recipe.asset` and measure what was written. Returns what to tell the user."""
    folder = Path(recipe.asset)
    went_on_from = (
        None if recipe.training.new is not None else _shortened(json.loads((folder / "card.json").read_text()))
    )
    write_pipeline(training, folder, recipe.training.shift)
    data, held_out = recipe.training.data, recipe.training.held_out
    judged = held_out_seeds(recipe.num_samples, data.scenes)
    card: dict[str, Any] = {
        "what": "WanPipeline, a caption of the world's grammar to 17 frames of 64 x 64",
        "command": f"vggrpo bootstrap generator {path}",
        "recipe": asdict(recipe),
        "seeds": {
            "training": [data.seeds[0], data.seeds[-1]],
            "curve": [held_out.seeds[0], held_out.seeds[-1]],
            "held out": [judged[0], judged[-1]],
        },
        "steps": training.step,
        "went_on_from": went_on_from,
        "plans": training.plans,
        "hours": round(training.seconds / 3600, 3),
        "hardware": hardware(recipe.training.device),
        "parameters": sum(weight.numel() for weight in training.network.parameters()),
        "curve": training.curve,
        "sha256": {name: sha256(folder / name) for name in FILES},
    }
    save_json(folder / "card.json", card)
    pipe = load_generator(folder)
    card["held_out"] = evaluate_generator(
        pipe, reader, recipe.num_samples, recipe.sampling, data.scenes, sway=data.sway
    )
    save_json(folder / "card.json", card)
    captions, _ = commands(judged[:20], data.scenes)
    draw_sheet(decoded(pipe.vae, sample_latents(pipe, captions, recipe.sampling)), folder / PICTURE)
    (folder / "README.md").write_text(card_text(card, captions))
    return [f"wrote {folder}", *result_lines(card["held_out"])]


def _shortened(card: dict[str, Any]) -> dict[str, Any]:
    """What a card must say of the transformer that another training begins with; after a second try, of the first."""
    if card.get("went_on_from") is not None:
        earlier: dict[str, Any] = card["went_on_from"]
        return earlier
    return {name: card[name] for name in ("command", "steps", "hours", "hardware", "seeds")} | {
        "clips": card["recipe"]["training"]["data"]["num_clips"]
    }


def write_pipeline(training: Training, folder: Path, shift: float) -> None:
    """Add transformer (fp16), scheduler and model index to a folder that has a VAE and a text stage."""
    with training.averaged() as network:
        transformer = copy.deepcopy(network).cpu().half()
    transformer.save_pretrained(folder / "transformer")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.save_pretrained(folder / "scheduler")
    WanPipeline(
        AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        UMT5EncoderModel.from_pretrained(folder / "text_encoder", local_files_only=True),
        AutoencoderKLWan.from_pretrained(folder / "vae", local_files_only=True),
        scheduler,
        transformer,
    ).save_config(folder)
