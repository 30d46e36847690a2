"""A start for the video VAE that no training has touched: the network computes a linear code, solved in closed form.

From an ordinary initialisation a small AutoencoderKLWan stays grey for longer than a CPU can wait. Here every residual
branch starts at zero, so that what is left is a chain of linear maps; they are filled with nested principal components
of pixel blocks on the way down (2 x 2 pixels, then 2 x 2 of those, pairs of frames) and least squares on the way up.

Two things in the way of a linear map are made harmless:
    RMS norm    one constant channel per stage, three times as long as all the others together, keeps the norm constant
    SiLU        before both heads every feature comes as +x and -x, and silu(x) - silu(-x) = x

Features are kept in pixel units (orthonormal components), so that a later stage drops what costs the fewest pixels. The
network holds them divided by the square root of their own size, which evens them out for the residual branches.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResample, WanResidualBlock, patchify
from jaxtyping import Float
from torch import Tensor, nn

from vggrpo.bootstrap.linear import least_squares, principal

Conv = Any
"""nn.Conv2d or nn.Conv3d; with a bias, which their type does not promise."""
CONSTANT = 3.0
"""Length of the constant channel over that of all features together."""
MEANS = 0.6
"""Of a stage's channels, the share that describes the mean of two frames; the rest describes their difference."""


@torch.no_grad()
def linear_start(vae: AutoencoderKLWan, video: Float[Tensor, "B 3 T H W"], latent_noise: float) -> None:
    """Overwrite every weight that carries the picture with the linear code of `video`, values in [-1, 1].

    Args:
        vae: as `vae.build_vae` makes it.
        video: about 32 clips of the data, T = 4n + 1 >= 5. Nothing is drawn at random: same video, same weights.
        latent_noise: the posterior's standard deviation, constant until something trains it.
    """
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            _clear(module.conv2)
            if isinstance(module.conv_shortcut, nn.Conv3d):
                _clear(module.conv_shortcut)
        elif isinstance(module, WanAttentionBlock):
            _clear(module.proj)
    _identity(vae.quant_conv)
    _identity(vae.post_quant_conv)
    frames, merged = _start_encoder(vae, video, latent_noise)
    z = vae.encode(video).latent_dist.mode()
    _start_decoder(vae, z, frames, merged)


def _start_encoder(vae: AutoencoderKLWan, video: Tensor, latent_noise: float) -> tuple[list[Tensor], list[Tensor]]:
    """Fill the encoder. Returns, as the network holds them and channels last, every stage's frames and merged pairs.

    The first of the merged are the patches that come in, in pixel units.
    """
    encoder = vae.encoder
    patches = _last(patchify(video, vae.config.patch_size))
    axes, size = principal(patches, min(patches.shape[-1], encoder.conv_in.out_channels - 1))
    even = size**-0.25
    _clear(encoder.conv_in)
    encoder.conv_in.weight[: len(axes), :, 2, 1, 1] = even[:, None] * axes
    _set_constant(encoder.conv_in, size.sqrt())
    x = patches @ axes.T

    all_frames, all_merged = [], [patches]
    downs = [layer for layer in encoder.down_blocks if isinstance(layer, WanResample)]
    wider = [layer.conv_shortcut for layer in encoder.down_blocks if isinstance(layer, WanResidualBlock)][1:]
    for down, shortcut in zip(downs, wider, strict=True):
        frames, frames_even, x, even = _start_down(down, x, even)
        all_frames.append(frames * frames_even)
        all_merged.append(x * even)
        n = x.shape[-1]
        shortcut.weight[:n, :n, 0, 0, 0] = torch.eye(n)
        _set_constant(shortcut, (x * even).square().mean((0, 1, 2, 3)))

    # The last one splits into +x and -x for the head.
    shortcut.weight[n : 2 * n, :n, 0, 0, 0] = -torch.eye(n)
    _make_linear(encoder.norm_out, shortcut, x * even)
    axes, size = principal(x, vae.config.z_dim)
    head = size[:, None] ** -0.5 * axes / even
    _clear(encoder.conv_out)
    encoder.conv_out.weight[: len(head), :n, 2, 1, 1] = head
    encoder.conv_out.weight[: len(head), n : 2 * n, 2, 1, 1] = -head
    encoder.conv_out.bias[len(head) :] = 2 * math.log(latent_noise)
    return all_frames, all_merged


def _start_down(down: WanResample, x: Tensor, even: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """2 x 2 pixels into one, then two frames into one; the first frame stays alone and is all mean, no difference.

    `x` and what comes back are in pixel units, each followed by the factor that the network holds it with.
    """
    conv, time = down.resample[1], down.time_conv
    width, n = conv.out_channels - 1, x.shape[-1]
    B, T, H, W, _ = x.shape
    blocks = x.reshape(B, T, H // 2, 2, W // 2, 2, n).permute(0, 1, 2, 4, 3, 5, 6).flatten(4)
    num_means = min(int(width * MEANS), 4 * n)
    axes, size = principal(blocks, num_means)
    frames, frames_even = blocks @ axes.T, size**-0.25
    kernel = (frames_even[:, None] * axes).view(-1, 2, 2, n) / even
    _clear(conv)
    conv.weight[:num_means, :n, :2, :2] = kernel.permute(0, 3, 1, 2)
    _set_constant(conv, size.sqrt())

    a, b = frames[:, 1::2], frames[:, 2::2]
    turn, turn_size = principal((a - b) / 2, min(width - num_means, num_means))
    turn_even = turn_size**-0.25
    mean = torch.eye(num_means) / 2
    difference = turn_even[:, None] * turn / frames_even / 2
    num = num_means + len(turn)
    _clear(time)
    time.weight[:num, :num_means, 1, 0, 0] = torch.cat([mean, difference])
    time.weight[:num, :num_means, 2, 0, 0] = torch.cat([mean, -difference])
    _set_constant(time, torch.cat([size, turn_size]).sqrt())
    alone = F.pad(frames[:, :1], (0, len(turn)))
    merged = torch.cat([alone, torch.cat([(a + b) / 2, (a - b) / 2 @ turn.T], dim=-1)], dim=1)
    return frames, frames_even, merged, torch.cat([frames_even, turn_even])


def _start_decoder(vae: AutoencoderKLWan, z: Tensor, frames: list[Tensor], merged: list[Tensor]) -> None:
    """Fill the decoder, each stage fitted to what the stages before it really put out."""
    decoder = vae.decoder
    ups = [block.upsamplers[0] for block in decoder.up_blocks if block.upsamplers is not None]
    x = _fit_conv(decoder.conv_in, _last(z), merged.pop())
    patches = merged[0]
    axes, _ = principal(patches, min(patches.shape[-1], (decoder.norm_out.gamma.numel() - 1) // 2))
    merged[0] = patches @ axes.T
    for up in ups:
        x = _fit_split(up.time_conv, x, frames.pop())
        x = _fit_conv(up.resample[1], x, merged.pop())
    # The last one gives +x and -x for the head.
    conv, n = ups[-1].resample[1], len(axes)
    conv.weight[n : 2 * n], conv.bias[n : 2 * n] = -conv.weight[:n], -conv.bias[:n]
    _make_linear(decoder.norm_out, conv, x)
    _clear(decoder.conv_out)
    decoder.conv_out.weight[:, :n, 2, 1, 1] = axes.T
    decoder.conv_out.weight[:, n : 2 * n, 2, 1, 1] = -axes.T


def _fit_conv(conv: Conv, x: Tensor, target: Tensor) -> Tensor:
    """A 3 x 3 convolution in space, after nearest-neighbour enlargement where the target is larger."""
    B, T, _, _, n = x.shape
    H, W, k = target.shape[2:]
    large = F.interpolate(x.flatten(0, 1).permute(0, 3, 1, 2), size=(H, W), mode="nearest-exact")
    around = F.unfold(large, 3, padding=1).mT
    weight, bias = least_squares(around, target.reshape(B * T, H * W, k))
    kernel = weight.view(k, n, 3, 3)
    _clear(conv)
    if isinstance(conv, nn.Conv3d):
        conv.weight[:k, :n, 2] = kernel
    else:
        conv.weight[:k, :n] = kernel
    conv.bias[:k] = bias
    fitted = F.linear(around, weight, bias).view(B, T, H, W, k)
    _set_constant(conv, fitted.square().mean((0, 1, 2, 3)))
    return fitted


def _fit_split(time: Conv, x: Tensor, target: Tensor) -> Tensor:
    """One frame into two; the first frame passes by and is what it is."""
    width, n, k = time.out_channels // 2, x.shape[-1], target.shape[-1]
    _clear(time)
    halves = []
    for first in (0, 1):
        weight, bias = least_squares(x[:, 1:], target[:, 1 + first :: 2])
        rows = slice(first * width, first * width + k)
        time.weight[rows, :n, 2, 0, 0], time.bias[rows] = weight, bias
        halves.append(F.linear(x[:, 1:], weight, bias))
    fitted = torch.cat([x[:, :1, ..., :k], torch.stack(halves, dim=2).flatten(1, 2)], dim=1)
    length = CONSTANT * math.sqrt(fitted.square().mean((0, 1, 2, 3)).sum())
    time.bias[width - 1] = time.bias[2 * width - 1] = length
    return fitted


def _make_linear(norm: Any, conv: Conv, x: Tensor) -> None:
    """Scale a head's norm so that, with x coming in twice and the constant that `conv` adds, it changes nothing."""
    total = 2 * x.square().mean((0, 1, 2, 3)).sum().item()
    conv.bias[-1] = CONSTANT * math.sqrt(total)
    norm.gamma.fill_(math.sqrt((CONSTANT**2 + 1) * total / norm.gamma.numel()))


def _set_constant(conv: Conv, squares: Tensor) -> None:
    """The last channel: a constant, from the mean squares of the others."""
    conv.bias[-1] = CONSTANT * math.sqrt(squares.sum().item())


def _clear(conv: Conv) -> None:
    conv.weight.zero_()
    conv.bias.zero_()


def _identity(conv: Conv) -> None:
    _clear(conv)
    conv.weight[:, :, 0, 0, 0] = torch.eye(len(conv.weight))


def _last(x: Tensor) -> Tensor:
    """Channels last: [B C T H W] -> [B T H W C]."""
    return x.movedim(1, -1)
