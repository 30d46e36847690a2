"""Stand-ins for models that cannot be shipped: their block layout, names and raw outputs, at random narrow widths.

Each follows the model's public description, in our own words: what is called with what, in which order tokens and views
lie, which blocks mix views, what comes out in which convention. The weights are random, and so is what they see.
"""

import torch
import torch.nn.functional as F
from torch import nn

from geometry.models.convert import rotation_of
from tests.geometry.standins import Block, randomised

DIM, PATCH = 8, 14


class Unpermissive(Block):
    """Blocks of these models are called with positions and masks by keyword."""

    def forward(self, x, pos=None, xpos=None, attn_mask=None):
        return super().forward(x)


class Vit(nn.Module):
    def __init__(self, layers, registers):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, DIM, PATCH, PATCH)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, DIM)) if registers else None
        self.blocks = nn.ModuleList([Unpermissive(DIM) for _ in range(layers)])
        self.norm = nn.LayerNorm(DIM)

    def embedded(self, images):
        x = self.patch_embed.proj(images).flatten(2).mT
        x = x + 0.1 * torch.linspace(-1, 1, x.shape[1])[:, None]
        special = [self.cls_token] if self.register_tokens is None else [self.cls_token, self.register_tokens]
        return torch.cat([*(token.expand(len(x), -1, -1) for token in special), x], dim=1)

    def forward(self, images):
        x = self.embedded(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, -(images.shape[-2] // PATCH) * (images.shape[-1] // PATCH) :]


class Dense(nn.Module):
    """Tokens [n N C] -> maps [n channels H W]."""

    def __init__(self, dim, channels):
        super().__init__()
        self.out = nn.Linear(dim, channels * PATCH**2)

    def forward(self, x, size):
        h, w = size[0] // PATCH, size[1] // PATCH
        return F.pixel_shuffle(self.out(x).mT.unflatten(2, (h, w)), PATCH)


class VGGT(nn.Module):
    def __init__(self):
        super().__init__()
        self.aggregator = nn.Module()
        self.aggregator.patch_embed = Vit(4, 4)
        self.aggregator.frame_blocks = nn.ModuleList([Unpermissive(DIM) for _ in range(2)])
        self.aggregator.global_blocks = nn.ModuleList([Unpermissive(DIM) for _ in range(2)])
        self.aggregator.camera_token = nn.Parameter(torch.zeros(2, 1, DIM))
        self.camera_head, self.depth_head = nn.Linear(2 * DIM, 9), Dense(2 * DIM, 2)

    def forward(self, images):
        assert images.min() >= 0, "this model normalises images by itself"
        B, S, _, H, W = images.shape
        parts = self.aggregator
        x = parts.patch_embed((images.flatten(0, 1) - 0.45) / 0.225)
        camera = torch.cat([parts.camera_token[:1], parts.camera_token[1:].expand(S - 1, -1, -1)])
        x = torch.cat([camera.repeat(B, 1, 1), x], dim=1)
        for frame, world in zip(parts.frame_blocks, parts.global_blocks, strict=True):
            x = local = frame(x, pos=None)
            x = world(x.unflatten(0, (B, S)).flatten(1, 2), pos=None).unflatten(1, (S, -1)).flatten(0, 1)
        both = torch.cat([local, x], dim=-1)
        depth, confidence = self.depth_head(both[:, 1:], (H, W)).unflatten(0, (B, S)).unbind(2)
        code = self.camera_head(both[:, 0]).unflatten(0, (B, S))
        code = torch.cat([code[..., :7], 0.8 + 0.1 * code[..., 7:].tanh()], dim=-1)
        return {"pose_enc": code, "depth": depth.exp()[..., None], "depth_conf": 1 + confidence.exp(), "images": images}


class DepthAnything3(nn.Module):
    """Views are mixed by the encoder itself from `alt_start` on, where a camera token takes the class token's place."""

    def __init__(self, cameras=True):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.pretrained = Vit(6, 0)
        self.backbone.pretrained.alt_start, self.backbone.out_layers = 3, [4, 5]
        self.backbone.pretrained.camera_token = nn.Parameter(torch.zeros(1, 2, DIM))
        self.head, self.cam_dec = Dense(DIM, 2), nn.Linear(DIM, 9) if cameras else None

    def forward(self, images, ref_view_strategy="saddle_balanced"):
        assert ref_view_strategy == "first"
        B, S, _, H, W = images.shape
        vit = self.backbone.pretrained
        x = vit.embedded(images.flatten(0, 1)).unflatten(0, (B, S))
        for i, block in enumerate(vit.blocks):
            if i == vit.alt_start:
                first, rest = vit.camera_token[:, :1], vit.camera_token[:, 1:]
                x[:, :, 0] = torch.cat([first, rest.expand(-1, S - 1, -1)], dim=1).expand(B, -1, -1)
            mixed = i >= vit.alt_start and i % 2 == 1
            x = block(x.flatten(1, 2) if mixed else x.flatten(0, 1), pos=None, attn_mask=None).view(x.shape)
        depth, confidence = self.head(x.flatten(0, 1)[:, 1:], (H, W)).unflatten(0, (B, S)).unbind(2)
        code = self.cam_dec(x[:, :, 0])
        focal = W * (1 + 0.2 * code[..., 7].tanh())
        intrinsics = torch.eye(3).repeat(B, S, 1, 1)
        intrinsics[..., 0, 0] = intrinsics[..., 1, 1] = focal
        intrinsics[..., 0, 2], intrinsics[..., 1, 2] = W / 2, H / 2
        w2c = torch.cat([rotation_of(code[..., 3:7]), code[..., :3, None]], dim=-1)
        return {
            "depth": depth.exp(),
            "depth_conf": 1 + confidence.exp(),
            "extrinsics": w2c,
            "intrinsics": intrinsics,
        }


class Pi3(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Vit(3, 4)
        self.decoder = nn.ModuleList([Unpermissive(DIM) for _ in range(4)])
        self.register_token = nn.Parameter(torch.zeros(1, 2, DIM))
        self.point_decoder, self.point_head = Unpermissive(DIM), Dense(DIM, 3)
        self.conf_decoder, self.conf_head = Unpermissive(DIM), Dense(DIM, 1)
        self.camera_decoder, self.camera_head = Unpermissive(DIM), nn.Linear(DIM, 7)

    def forward(self, imgs):
        assert imgs.min() >= 0, "this model normalises images by itself"
        B, N, _, H, W = imgs.shape
        x = self.encoder((imgs.flatten(0, 1) - 0.45) / 0.225)
        x = torch.cat([self.register_token.expand(B * N, -1, -1), x], dim=1)
        for i, block in enumerate(self.decoder):
            x = x.unflatten(0, (B, N))
            x = block(x.flatten(0, 1) if i % 2 == 0 else x.flatten(1, 2), xpos=None).view(B * N, -1, DIM)
        maps = self.point_head(self.point_decoder(x)[:, 2:], (H, W)).unflatten(0, (B, N))
        u, v = (torch.arange(side) / side - 0.5 for side in (W, H))
        z = maps[:, :, 2].exp()
        local = torch.stack([(u + 0.1 * maps[:, :, 0]) * z, (v[:, None] + 0.1 * maps[:, :, 1]) * z, z], dim=-1)
        code = self.camera_head(self.camera_decoder(x).mean(1)).unflatten(0, (B, N))
        poses = torch.eye(4).repeat(B, N, 1, 1)
        poses[..., :3, :3], poses[..., :3, 3] = rotation_of(code[..., :4]), code[..., 4:]
        conf = self.conf_head(self.conf_decoder(x)[:, 2:], (H, W)).unflatten(0, (B, N)).movedim(2, -1)
        return {"local_points": local, "conf": conf, "camera_poses": poses}


class Any4D(nn.Module):
    """A list of views, which are stacked before clips."""

    def __init__(self):
        super().__init__()
        self.encoder, self.info_sharing = nn.Module(), nn.Module()
        self.encoder.model = Vit(3, 0)
        self.info_sharing.self_attention_blocks = nn.ModuleList([Unpermissive(DIM) for _ in range(4)])
        self.dense_head, self.scene_flow_dense_head = Dense(2 * DIM, 6), Dense(2 * DIM, 3)
        self.pose_head, self.scale_head = nn.Linear(2 * DIM, 7), nn.Linear(DIM, 1)
        self.scale_token = nn.Parameter(torch.zeros(DIM))

    def forward(self, views):
        V, B = len(views), len(views[0]["img"])
        assert all(view["data_norm_type"] == ["dinov2"] for view in views)
        size = views[0]["img"].shape[-2:]
        features = self.encoder.model(torch.cat([view["img"] for view in views]))
        x = torch.stack(features.chunk(V), dim=1)
        scale = self.scale_token.expand(B, 1, -1)
        for i, block in enumerate(self.info_sharing.self_attention_blocks):
            if i % 2 == 0:
                x = block(x.flatten(0, 1)).unflatten(0, (B, V))
            else:
                joint = block(torch.cat([x.flatten(1, 2), scale], dim=1))
                x, scale = joint[:, :-1].unflatten(1, (V, -1)), joint[:, -1:]
        metric = self.scale_head(scale[:, 0]).exp()[..., None, None]  # [B 1 1 1]
        res = []
        for i, feature in enumerate(features.chunk(V)):
            both = torch.cat([feature, x[:, i]], dim=-1)
            maps = self.dense_head(both, size).movedim(1, -1)
            u, v = (torch.arange(side) / side - 0.5 for side in (size[1], size[0]))
            across = torch.stack([u + 0.1 * maps[..., 0], v[:, None] + 0.1 * maps[..., 1]], dim=-1)
            ray = F.normalize(torch.cat([across, torch.ones_like(across[..., :1])], dim=-1), dim=-1)
            pose = self.pose_head(both.mean(1))
            flow = self.scene_flow_dense_head(both, size).movedim(1, -1)
            res.append(
                {
                    "ray_directions": ray,
                    "depth_along_ray": maps[..., 3:4].exp() * metric,
                    "cam_trans": pose[:, :3] * metric[..., 0, 0],
                    "cam_quats": pose[:, 3:],
                    "scene_flow": flow * metric,
                    "conf": 1 + maps[..., 4].exp(),
                    "non_ambiguous_mask": maps[..., 5].detach() > -1,
                    "metric_scaling_factor": metric[..., 0, 0],
                }
            )
        return res


def made(kind, seed=0):
    return randomised(kind(), seed)
