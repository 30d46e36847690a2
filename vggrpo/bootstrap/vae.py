"""The tiny video VAE: a diffusers AutoencoderKLWan of 7 million parameters, and how videos go through it.

Latents have 16 channels, a quarter of the frames (T = 4(L-1) + 1) and an eighth of the height and width. The
convolutions see patches of 2 x 2 pixels, which makes them cheap enough for a CPU.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from jaxtyping import Float
from torch import Tensor

from vggrpo.bootstrap.assets import read_card

Z_DIM = 16
PATCH = 2


def build_vae(width: int = 32) -> AutoencoderKLWan:
    """An untrained VAE of `width`, 2 `width`, 4 `width` channels at a half, a quarter and an eighth of the size."""
    return AutoencoderKLWan(
        base_dim=width,
        z_dim=Z_DIM,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        patch_size=PATCH,
        scale_factor_temporal=4,
        scale_factor_spatial=4 * PATCH,
        latents_mean=[0.0] * Z_DIM,
        latents_std=[1.0] * Z_DIM,
    )


def encode(vae: AutoencoderKLWan, video: Float[Tensor, "B T 3 H W"]) -> Float[Tensor, "B C L h w"]:
    """The latents' mode, as the network gives them (not normalised). Video in [0, 1].

    Raises:
        ValueError: T is not 4n + 1, or a side is no multiple of 8.
    """
    T, _, H, W = video.shape[1:]
    stride = vae.config.scale_factor_spatial
    if T % 4 != 1 or H % stride or W % stride:
        raise ValueError(
            f"the VAE takes 4n + 1 frames with sides that are multiples of {stride}, got {T} frames of {H} x {W}"
        )
    z: Tensor = vae.encode(2 * video.transpose(1, 2) - 1).latent_dist.mode()
    return z


def decode(vae: AutoencoderKLWan, z: Float[Tensor, "B C L h w"]) -> Float[Tensor, "B T 3 H W"]:
    """Video in [0, 1] of latents as `encode` gives them."""
    video: Tensor = vae.decode(z).sample
    return (video.transpose(1, 2) + 1) / 2


def decode_open(vae: AutoencoderKLWan, z: Float[Tensor, "B C L h w"]) -> Float[Tensor, "B T 3 H W"]:
    """As `decode`, but values beyond [0, 1] stay: training needs their gradient, which the VAE's own clamp stops."""
    chunks: list[Tensor] = []
    handle = vae.decoder.register_forward_hook(lambda module, args, out: chunks.append(out))
    try:
        vae.decode(z)
    finally:
        handle.remove()
    video = unpatchify(torch.cat(chunks, dim=2), patch_size=vae.config.patch_size)
    return (video.transpose(1, 2) + 1) / 2


def normalise(vae: AutoencoderKLWan, z: Float[Tensor, "B C L h w"]) -> Float[Tensor, "B C L h w"]:
    """Latents as diffusion models hold them: zero mean and unit variance in each channel, over the training clips."""
    mean, std = _statistics(vae, z)
    return (z - mean) / std


def denormalise(vae: AutoencoderKLWan, z0: Float[Tensor, "B C L h w"]) -> Float[Tensor, "B C L h w"]:
    """The inverse of `normalise`: latents as `decode` takes them."""
    mean, std = _statistics(vae, z0)
    return z0 * std + mean


def load_vae(folder: Path) -> AutoencoderKLWan:
    """The VAE of an asset folder, frozen, in fp32, from files that are what their card says.

    Raises:
        ValueError: a file is missing or has been changed (`assets.read_card`).
    """
    read_card(folder)
    vae = AutoencoderKLWan.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    vae.eval().requires_grad_(False)
    return vae


def _statistics(vae: AutoencoderKLWan, z: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = (z.new_tensor(values).view(-1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    return mean, std
