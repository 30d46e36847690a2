"""Sample videos of a run under way: the one place of training where the VAE is loaded, and it does not stay."""

from pathlib import Path

import torch

from vggrpo.config import Recipe, VideoConfig
from vggrpo.data import read_prompts, write_video
from vggrpo.policy.flow_policy import FlowPolicy
from vggrpo.types import Condition, Streams

FPS = 8


def preview(recipe: Recipe, video: VideoConfig, policy: FlowPolicy, folder: Path, writes: bool) -> None:
    """The first prompts as the policy paints them now, into folder/000.mp4 and so on: always from the same noise.

    All ranks call it, for the network may be in parts; only those that `writes` decode.
    """
    prompts, frames = read_prompts(video.prompts), None
    if video.first_frames is not None:
        from vggrpo.policy.first_frame import read_first_frames

        frames = read_first_frames(video.first_frames, prompts, video.height, video.width)
    z0 = policy.sample(Condition(prompts, frames)[: video.sample_prompts], Streams(recipe.grpo.seed, -1))
    if not writes:
        return
    from diffusers import AutoencoderKLWan

    from vggrpo.bootstrap.vae import decode, denormalise

    vae = AutoencoderKLWan.from_pretrained(Path(video.model) / "vae", local_files_only=True).to(z0.device).eval()
    folder.mkdir(parents=True, exist_ok=True)
    for number, one in enumerate(z0):
        with torch.no_grad():
            frames = decode(vae, denormalise(vae, one[None]))[0].clamp(0, 1)
        write_video(folder / f"{number:03d}.mp4", (255 * frames).round().byte().cpu(), FPS)
