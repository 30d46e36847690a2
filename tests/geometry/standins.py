"""Two small geometry transformers that no one trained, shaped like the real ones, and a linear video autoencoder.

`vgglike`: a Hugging Face DINOv2 with registers, then frame and global blocks, a camera head and dense heads: the layout
of VGGT. `omegalike`: blocks that take and return lists of [B, T, N, C], with an extra keyword, one prefix token, and
checkpointing of its own: the layouts of DA3 and VGGT-Omega. Random weights, with LayerScale far from its usual 1.
"""

from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from geometry.backbone import BackboneSpec, HookedBackbone
from geometry.cameras import anchored, pinhole, rigid, so3_exp, unproject
from geometry.latent import LatentSpec
from geometry.types import Geometry
from geometry.world import make_clips

DENSE = ("log_depth", "confidence", "flow_x", "flow_y", "flow_z")


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        return x + self.mlp(self.norm2(x))


class Heads(nn.Module):
    def __init__(self, dim, patch, num_prefix):
        super().__init__()
        self.patch, self.num_prefix = patch, num_prefix
        self.camera, self.dense = nn.Linear(dim, 7), nn.Linear(dim, len(DENSE) * patch**2)

    def forward(self, x, h, w, intrinsics):
        """[B T N C] -> raw outputs; the camera reads the first token."""
        patches = x[:, :, self.num_prefix :].unflatten(2, (h, w))
        maps = F.pixel_shuffle(self.dense(patches).movedim(-1, 2).flatten(0, 1), self.patch)
        maps = maps.unflatten(0, x.shape[:2])
        return {"camera": 0.3 * self.camera(x[:, :, 0]), "intrinsics": intrinsics} | dict(
            zip(DENSE, maps.unbind(2), strict=True)
        )


def parse(raw, size):
    camera = raw["camera"]
    c2w = anchored(rigid(so3_exp(camera[..., :3]), camera[..., 3:6]))
    intrinsics = raw["intrinsics"]
    if intrinsics is None:
        intrinsics = pinhole(60 + 10 * torch.tanh(camera[..., 6]), *size)
    depth = 3 * torch.exp(0.3 * torch.tanh(raw["log_depth"]))
    flow = 0.1 * torch.stack([raw[name] for name in DENSE[2:]], dim=-1)
    points = unproject(depth, intrinsics, c2w)
    confidence = raw["confidence"].sigmoid()
    valid = torch.ones_like(depth, dtype=torch.bool)
    return Geometry(c2w, intrinsics, depth, points, confidence, valid, flow, "frame")


class VGGLike(nn.Module):
    def __init__(self, dim=48, layers=4, registers=2, patch=8):
        super().__init__()
        config = Dinov2WithRegistersConfig(
            hidden_size=dim,
            num_hidden_layers=layers,
            num_attention_heads=2,
            mlp_ratio=2,
            patch_size=patch,
            image_size=4 * patch,
            num_register_tokens=registers,
        )
        self.encoder = Dinov2WithRegistersModel(config)
        self.frame_block, self.global_block = Block(dim), Block(dim)
        self.heads = Heads(dim, patch, 1 + registers)

    def forward(self, images, intrinsics):
        B, T, _, H, W = images.shape
        x = self.encoder(images.flatten(0, 1)).last_hidden_state
        x = self.frame_block(x)
        x = self.global_block(x.unflatten(0, (B, T)).flatten(1, 2)).unflatten(1, (T, -1))
        return self.heads(x, H // self.heads.patch, W // self.heads.patch, intrinsics)


class ListBlock(Block):
    def forward(self, xs, *, pos):
        return [super(ListBlock, self).forward(x + 0.01 * pos) for x in xs]


class OmegaLike(nn.Module):
    def __init__(self, dim=32, layers=3, patch=4, reentrant=None):
        super().__init__()
        self.patch, self.reentrant = patch, reentrant
        self.embed, self.cls = nn.Conv2d(3, dim, patch, patch), nn.Parameter(torch.randn(dim))
        self.blocks = nn.ModuleList([ListBlock(dim) for _ in range(layers)])
        self.heads = Heads(dim, patch, 1)

    def forward(self, images, intrinsics):
        B, T, _, H, W = images.shape
        x = self.embed(images.flatten(0, 1)).flatten(2).mT.unflatten(0, (B, T))
        x = torch.cat([self.cls.expand(B, T, 1, -1), x], dim=2)
        pos = torch.linspace(-1, 1, x.shape[2])[:, None]
        for block in self.blocks:
            if self.reentrant is None:
                (x,) = block([x], pos=pos)
            else:  # as VGGT and DA3 do: the whole block, hooks included, is recomputed
                x = checkpoint(lambda x, b=block: b([x], pos=pos)[0], x, use_reentrant=self.reentrant)
        return self.heads(x, H // self.patch, W // self.patch, intrinsics)


def call(module, images, intrinsics):
    return module(images, intrinsics)


def randomised(module, seed):
    """Weights large enough that every block, LayerScale and token matters, and every output moves."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "lambda1" in name:
            p.data = 0.5 + torch.rand(p.shape, generator=generator)
        elif "norm" in name and name.endswith("weight"):
            p.data = 1 + 0.2 * noise
        elif p.ndim == 4:  # patch embeddings, like trained ones, look at low frequencies: cells of 4 pixels
            noise = torch.randn(*p.shape[:2], p.shape[2] // 4, p.shape[3] // 4, generator=generator)
            p.data = F.interpolate(noise, p.shape[2:]) * (4 / p[0].numel()) ** 0.5
        elif p.ndim >= 2 and "token" not in name and "position" not in name:
            p.data = noise / p[0].numel() ** 0.5
        else:
            p.data = 0.3 * noise
    return module.eval().requires_grad_(False)


def vgglike(seed=0, layers=4, patch=8):
    blocks = tuple(f"encoder.encoder.layer.{k}" for k in range(layers))
    spec = BackboneSpec(patch, 48, 3, (*blocks, "frame_block", "global_block"), blocks[:3], "imagenet")
    return HookedBackbone(randomised(VGGLike(layers=layers, patch=patch), seed), spec, call, parse)


def omegalike(seed=0, reentrant=None):
    blocks = tuple(f"blocks.{k}" for k in range(3))
    spec = BackboneSpec(4, 32, 1, blocks, blocks[:2], "unit")
    return HookedBackbone(randomised(OmegaLike(reentrant=reentrant), seed), spec, call, parse)


class LinearVAE:
    """Time stride 4, space stride 8: a fixed orthonormal map of each block's low frequencies, causal in time."""

    def __init__(self, channels=24, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.mix = torch.linalg.qr(torch.randn(channels, channels, generator=generator))[0]
        raw = self.raw(make_clips(range(900, 908), frames=9, size=(32, 32)).video).movedim(1, -1).flatten(0, -2)
        self.spec = LatentSpec(channels, 4, 8, tuple(raw.mean(0).tolist()), tuple(raw.std(0).tolist()))

    def raw(self, video):
        """[B T 3 H W] -> [B C L h w]: colour means of 2 x 2 cells of each block at both ends of each group."""
        cells = F.avg_pool2d(video.flatten(0, 1), 4).unflatten(0, video.shape[:2])
        blocks = F.pixel_unshuffle(cells.flatten(0, 1), 2).unflatten(0, video.shape[:2])  # B T 12 h w
        first, last = torch.cat([blocks[:, :1], blocks[:, 1::4]], 1), torch.cat([blocks[:, :1], blocks[:, 4::4]], 1)
        return torch.einsum("cd,blchw->bdlhw", self.mix, torch.cat([first, last], dim=2))

    def encode(self, video):
        return self.spec.normalised(self.raw(video))


def outputs(scene):
    return {f.name: getattr(scene, f.name) for f in fields(scene) if isinstance(getattr(scene, f.name), torch.Tensor)}


def largest_difference(a, b):
    a, b = outputs(a), outputs(b)
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).detach().abs().max()) for name in a)


def random_projection(scene, seed=0):
    """A plain sum of a rotation can have no gradient."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (x * torch.randn(x.shape, generator=generator)).sum()
        for name, x in outputs(scene).items()
        if x.is_floating_point()
    }
