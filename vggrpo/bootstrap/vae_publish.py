"""A trained VAE becomes an asset: fp16 weights, latent statistics, numbers on fresh clips, a picture and a card."""

import copy
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from geometry.world import MOTIONS
from vggrpo.bootstrap.assets import save_json, sha256
from vggrpo.bootstrap.footage import render_footage
from vggrpo.bootstrap.training import Training
from vggrpo.bootstrap.vae import encode, load_vae
from vggrpo.bootstrap.vae_card import card_text, result_lines
from vggrpo.bootstrap.vae_eval import FIRST_SEED, evaluate_vae, reconstruct
from vggrpo.bootstrap.vae_recipe import VaeRecipe

PER_FAMILY = 8
WEIGHTS = "diffusion_pytorch_model.safetensors"
PICTURE = "reconstructions.png"


def publish(
    run: Training[AutoencoderKLWan], recipe: VaeRecipe, path: str, clips: UInt8[Tensor, "N T 3 H W"]
) -> list[str]:
    """Write the run's average to `recipe.asset` and measure what was written. Returns what to tell the user."""
    folder = Path(recipe.asset)
    with run.averaged() as average:
        vae = copy.deepcopy(average).eval().requires_grad_(False)
    mean, std = latent_statistics(vae, clips[:256].to(recipe.device))
    vae.register_to_config(latents_mean=mean, latents_std=std)
    vae.half().save_pretrained(folder)
    card: dict[str, Any] = {
        "what": "AutoencoderKLWan, 3 x T x H x W in [-1, 1] to 16 x L x H/8 x W/8, T = 4 (L - 1) + 1",
        "command": f"vggrpo bootstrap vae {path}",
        "recipe": asdict(recipe),
        "seeds": {"training": [0, recipe.num_clips - 1], "held out": f"{PER_FAMILY} a family from {FIRST_SEED}"},
        "steps": run.step,
        "plans": run.plans,
        "hours": round(run.seconds / 3600, 3),
        "hardware": hardware(recipe.device),
        "parameters": sum(weight.numel() for weight in vae.parameters()),
        "curve": run.curve,
        "sha256": {name: sha256(folder / name) for name in ("config.json", WEIGHTS)},
    }
    save_json(folder / "card.json", card)
    stored = load_vae(folder).to(recipe.device)
    card["held_out"] = evaluate_vae(stored, clips.to(recipe.device), PER_FAMILY, latent_noise=recipe.latent_noise)
    save_json(folder / "card.json", card)
    draw(stored, folder / PICTURE)
    (folder / "README.md").write_text(card_text(card))
    return [f"wrote {folder}", *result_lines(card["held_out"])]


@torch.no_grad()
def latent_statistics(vae: AutoencoderKLWan, clips: UInt8[Tensor, "N T 3 H W"]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over clips."""
    z = torch.cat([encode(vae, some.float() / 255) for some in clips.split(4)])
    mean, std = z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))
    return [round(x, 4) for x in mean.tolist()], [round(x, 4) for x in std.tolist()]


def draw(vae: AutoencoderKLWan, path: Path) -> None:
    """Frames 0 and 10 of one held-out clip of each camera family: as they are (above) and as they come back (below)."""
    columns = []
    for family, motion in enumerate(MOTIONS):
        video = next(render_footage([FIRST_SEED + 1000 * family + family], motion)).float() / 255
        columns.append(_strip(video, reconstruct(vae, video.to(vae.device)).cpu()))
    half = len(columns) // 2
    sheet = torch.cat([torch.cat(columns[:half], dim=1), torch.cat(columns[half:], dim=1)], dim=0)
    Image.fromarray((255 * sheet.clamp(0, 1)).round().byte().numpy()).save(path, optimize=True)


def _strip(video: Float[Tensor, "1 T 3 H W"], seen: Float[Tensor, "1 T 3 H W"]) -> Float[Tensor, "height width 3"]:
    frames = [0, 10]
    pair = torch.cat([video[0, frames], seen[0, frames]], dim=-2).repeat_interleave(2, -2).repeat_interleave(2, -1)
    return torch.nn.functional.pad(torch.cat(list(pair), dim=-1), (0, 4, 0, 4), value=1.0).permute(1, 2, 0)


def hardware(device: str) -> str:
    """Processor or GPU, and the number of threads."""
    if device != "cpu":
        return str(torch.cuda.get_device_name(device))
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} thread(s)"
