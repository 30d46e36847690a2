"""Pixels for the rewards that need them: the VAE is loaded when the first asks, and not before."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor


class Decoder:
    """Latents -> video, some at a time; the last rollout's video is kept, for several rewards may ask for it."""

    def __init__(self, folder: Path, at_once: int) -> None:
        """
        Args:
            folder: of a Wan model in diffusers layout.
            at_once: videos that the VAE decodes together.
        """
        self.folder, self.at_once = folder, at_once
        self._vae: torch.nn.Module | None = None
        self._last: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def __call__(self, z0: Float[Tensor, "B K C L h w"]) -> Float[Tensor, "B K T 3 H W"]:
        """Video in [0, 1] of latents as samplers hold them."""
        from diffusers import AutoencoderKLWan

        from vggrpo.bootstrap.vae import decode, denormalise

        if self._last is None or self._last[0] is not z0:
            if self._vae is None:
                vae = AutoencoderKLWan.from_pretrained(self.folder / "vae", local_files_only=True)
                self._vae = vae.to(z0.device).eval().requires_grad_(False)
            some = z0.flatten(0, 1).split(self.at_once)
            video = torch.cat([decode(self._vae, denormalise(self._vae, z)).clamp(0, 1) for z in some])
            self._last = z0, video.unflatten(0, z0.shape[:2])
        return self._last[1]
