"""The embedded geometry model: VGGT in shape, small enough for one CPU core, with correspondence and a pose solver.

    video -> encoder blocks (DINOv2 with registers: the stitch points)      tokens, one per 4 x 4 pixels
          -> correlation of neighbouring frames' tokens                     flow, both ways, and its expected error
          -> frame / global blocks with camera and register tokens          depth and weights per token
          -> Gauss-Newton (solver.py)                                       camera motion
          -> what the motion says of each token (depth, parallax, residual) -> frame / global blocks -> dense heads
          -> Gauss-Newton again, on the final depth and weights             cameras

Everything after the encoder sees tokens only, so a latent that is stitched into it drives all of the rest. Depth is in
units of about the clip's median depth; intrinsics may be given, else a focal length is estimated.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from geometry.cameras import pixel_grid
from geometry.models.attention import Alternating
from geometry.models.correlation import Correlation, Correspondence
from geometry.models.dense import DenseHead
from geometry.models.solver import chain, solve_relative, triangulate

DEPTH_GRADIENT = 0.2
"""Share of the pose's gradient that reaches depth: poses can always be improved by bending depth, at first."""


@dataclass(frozen=True)
class TinyConfig:
    """Widths and depths of the network."""

    patch: int = 4
    """Pixels per token side."""
    encoder_dim: int = 64
    """Width of the encoder; at least the 48 numbers of a patch."""
    encoder_layers: int = 2
    """DINOv2 blocks: after each of them a latent can be stitched in."""
    dim: int = 96
    """Width of the frame and global blocks."""
    heads: int = 3
    """Attention heads there."""
    pairs: tuple[int, int] = (1, 2)
    """Frame and global blocks before and after the first pose."""
    registers: int = 2
    """Register tokens of the frame and global blocks."""
    features: int = 8
    """Channels per pixel that correspondence is found with."""


class Prediction(NamedTuple):
    """Everything that the losses ask for. h, w: tokens; poses are camera i+1 in camera i."""

    correspondence: Correspondence
    coarse_log_depth: Float[Tensor, "B T h w"]
    coarse_relative: Float[Tensor, "B pairs 4 4"]
    relative: Float[Tensor, "B pairs 4 4"]
    c2w: Float[Tensor, "B T 4 4"]
    intrinsics: Float[Tensor, "B T 3 3"]
    log_focal: Float[Tensor, " B"]
    """Estimated: log of focal / width, also where intrinsics were given."""
    log_depth: Float[Tensor, "B T H W"]
    confidence: Float[Tensor, "B T H W"]
    """Logit that the depth is within a factor 1.1."""
    dynamic: Float[Tensor, "B T H W"]
    """Logit that the point moves by itself."""
    motion: Float[Tensor, "B T H W 3"]
    """To the next frame, in the axes of the frame's own camera, if it does."""


class TinyGeometry(nn.Module):
    """Video -> `Prediction`; `geometry.backbone` turns that into a `Geometry`."""

    def __init__(self, config: TinyConfig = TinyConfig()) -> None:  # noqa: B008
        # Here, not above: `import geometry` must not load transformers.
        from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

        super().__init__()
        self.config = config
        dim, width = config.dim, config.encoder_dim
        self.encoder = Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(
                hidden_size=width,
                num_hidden_layers=config.encoder_layers,
                num_attention_heads=width // 32,
                mlp_ratio=2,
                image_size=16 * config.patch,
                patch_size=config.patch,
                num_register_tokens=4,
                layerscale_value=0.03,
                use_mask_token=False,
            )
        )
        self.correlation = Correlation(width, config.patch, config.features)
        self.merge = nn.Conv2d(width + 7, dim, 2, stride=2)
        self.camera = nn.Parameter(0.02 * torch.randn(2, 1 + config.registers, dim))
        self.from_class = nn.Linear(width, dim)
        self.from_focal = nn.Linear(2, dim)
        self.early = Alternating(dim, config.heads, config.pairs[0])
        self.norm = nn.LayerNorm(dim)
        self.coarse = nn.Linear(dim, 4 * 3)
        self.focal = nn.Linear(dim, 1)
        self.from_solved = nn.Conv2d(2 * 4 + 2, dim, 2, stride=2)
        self.late = Alternating(dim, config.heads, config.pairs[1])
        self.last_norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 4 * dim // 2)
        self.dense = DenseHead(dim // 2 + width + 2 * 4 + 7, config.patch, config.features)
        self.fine = nn.Linear(dim, 4 * 2)
        self._start()

    def _start(self) -> None:
        """Tokens begin as their pixels, and the correlation's features as the colours: it can follow them untrained."""
        patch = self.encoder.embeddings.patch_embeddings.projection
        nn.init.orthogonal_(patch.weight.view(len(patch.weight), -1), gain=2.0)
        nn.init.zeros_(patch.bias)
        colors = patch.weight.detach().flatten(1).T / 4.0  # the inverse: [3 * patch * patch, width]
        to_pixels = self.correlation.to_pixels
        nn.init.trunc_normal_(to_pixels.weight, std=0.01)
        with torch.no_grad():
            to_pixels.weight[: len(colors)] = 2 * colors  # pixel_shuffle takes channels first, as the patch does
            nn.init.zeros_(to_pixels.bias)
        for head in (self.coarse, self.fine, self.focal):
            nn.init.trunc_normal_(head.weight, std=0.005)
            nn.init.zeros_(head.bias)
        nn.init.zeros_(self.from_solved.weight)

    def forward(
        self, video: Float[Tensor, "B T 3 H W"], intrinsics: Float[Tensor, "B T 3 3"] | None = None
    ) -> Prediction:
        """Geometry of a clip.

        Args:
            video: RGB in [0, 1]; sides divisible by the patch.
            intrinsics: pixels of the video; None: a centred pinhole whose focal length is estimated.

        Raises:
            ValueError: a side that the patch does not divide.
        """
        B, T, _, H, W = video.shape
        patch = self.config.patch
        if H % patch or W % patch:
            raise ValueError(f"sides must be multiples of {patch}, got {H} x {W}: resize the video first")
        x = self.encoder.embeddings(2 * video.flatten(0, 1) - 1)
        for layer in self.encoder.encoder.layer:
            x = layer(x)
        x = x.unflatten(0, (B, T))
        return self._after_encoder(x[:, :, 0], x[:, :, 5:].unflatten(2, (H // patch, W // patch)), intrinsics)

    def _after_encoder(
        self,
        scene: Float[Tensor, "B T width"],
        tokens: Float[Tensor, "B T h w width"],
        intrinsics: Float[Tensor, "B T 3 3"] | None,
    ) -> Prediction:
        B, T, h, w, _ = tokens.shape
        patch = self.config.patch
        pair = self.correlation(tokens)
        image = torch.cat([tokens.movedim(-1, 2), _motion_maps(pair, patch)], dim=2).flatten(0, 1)
        x = self.merge(_even(image))
        size = (x.shape[-2], x.shape[-1])
        focal = x.new_zeros(B, T, 2) if intrinsics is None else _focal_code(intrinsics, w * patch)
        special = (
            torch.cat([self.camera[:1], self.camera[1:].expand(T - 1, -1, -1)])[None]
            + self.from_class(scene)[:, :, None]
        )
        special = special + self.from_focal(focal)[:, :, None]
        x = self.early(torch.cat([special, x.flatten(2).mT.unflatten(0, (B, T))], dim=2))
        y = self.norm(x)
        log_focal = self.focal(y[:, :, 0]).mean((1, 2)) - 0.1
        if intrinsics is None:
            intrinsics = _pinhole(log_focal, h * patch, w * patch)[:, None].expand(-1, T, -1, -1)
        log_depth, ahead, back = _grid(self.coarse(y[:, :, special.shape[2] :]), size, (h, w)).unbind(2)
        weight = torch.stack([ahead[:, :-1], back[:, 1:]], dim=2)
        relative, solved = self._pose(pair, log_depth, weight, intrinsics)
        found = torch.cat([_solved_maps(pair, solved, log_depth, intrinsics, patch), torch.stack([ahead, back], 2)], 2)
        found = found.detach()
        seen = self.from_solved(_even(found.flatten(0, 1))).flatten(2).mT.unflatten(0, (B, T))
        x = self.last_norm(self.late(torch.cat([x[:, :, : special.shape[2]], x[:, :, special.shape[2] :] + seen], 2)))
        x = x[:, :, special.shape[2] :]
        wide = _grid(self.expand(x), size, (h, w))
        stack = torch.cat([wide.flatten(0, 1), image, found[:, :, :8].flatten(0, 1)], dim=1)
        maps = self.dense(stack, pair.features.flatten(0, 1)).unflatten(0, (B, T))
        rough = F.interpolate(log_depth.detach(), scale_factor=float(patch), mode="bilinear", align_corners=False)
        final = rough + maps[:, :, 0]
        still = F.logsigmoid(-F.avg_pool2d(maps[:, :, 2], patch))[:, :, None] / 4
        weight = weight + torch.stack(_ends(_grid(self.fine(x), size, (h, w)) + still), dim=2)
        again, _ = self._pose(pair, F.avg_pool2d(final, patch), weight, intrinsics)
        motion = 0.1 * maps[:, :, 3:6].movedim(2, -1) * torch.exp(final.detach())[..., None]
        return Prediction(
            pair, log_depth, relative, again, chain(again), intrinsics, log_focal, final, maps[:, :, 1], maps[:, :, 2],
            motion,
        )  # fmt: skip

    def _pose(
        self, pair: Correspondence, log_depth: Tensor, weight: Tensor, intrinsics: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Camera i+1 in camera i, and the motions of points that each direction found."""
        depth = log_depth.exp()
        depth = DEPTH_GRADIENT * depth + (1 - DEPTH_GRADIENT) * depth.detach()
        both = torch.stack([depth[:, :-1], depth[:, 1:]], dim=2).flatten(3)
        rays, there, _ = _rays(pair, intrinsics, self.config.patch)
        trust = pair.information * (4 * weight).clamp(-8, 8).exp()[..., None, None]
        return solve_relative(both, rays, there, trust.flatten(3, 4))


def _ends(maps: Float[Tensor, "B T 2 h w"]) -> tuple[Tensor, Tensor]:
    return maps[:, :-1, 0], maps[:, 1:, 1]


def _even(x: Tensor) -> Tensor:
    """Padded at the right and the bottom to even sides, for 2 x 2 merging."""
    return F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2), mode="replicate")


def _grid(x: Float[Tensor, "B T n fours"], size: tuple[int, int], whole: tuple[int, int]) -> Tensor:
    """Merged tokens back to `[B T fours/4 h w]`."""
    flat = x.flatten(0, 1).mT.unflatten(-1, size)
    return F.pixel_shuffle(flat, 2)[..., : whole[0], : whole[1]].unflatten(0, x.shape[:2])


def _focal_code(intrinsics: Float[Tensor, "B T 3 3"], width: int) -> Float[Tensor, "B T 2"]:
    log_focal = torch.log(intrinsics[..., 0, 0] / width)
    return torch.stack([torch.ones_like(log_focal), log_focal], dim=-1)


def _pinhole(log_focal: Float[Tensor, " B"], height: int, width: int) -> Float[Tensor, "B 3 3"]:
    focal, one = width * log_focal.exp(), torch.ones_like(log_focal)
    zero = torch.zeros_like(one)
    rows = [focal, zero, one * width / 2, zero, focal, one * height / 2, zero, zero, one]
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def _rays(pair: Correspondence, intrinsics: Tensor, patch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised positions of the tokens `[B pairs N 2]`, of what they correspond to `[B pairs 2 N 2]`, and focal."""
    h, w = pair.flow.shape[3:5]
    centres = patch * pixel_grid(h, w, pair.flow)
    focal = torch.stack([intrinsics[:, :, 0, 0], intrinsics[:, :, 1, 1]], dim=-1)
    middle = intrinsics[:, :, :2, 2]
    rays = (centres - middle[:, :-1, None, None]) / focal[:, :-1, None, None]
    # A clip has one lens: the second frame of a pair is taken to have the intrinsics of the first.
    there = (centres + pair.flow - middle[:, :-1, None, None, None]) / focal[:, :-1, None, None, None]
    return rays.flatten(2, 3), there.flatten(3, 4), focal[:, :-1, 0]


def _motion_maps(pair: Correspondence, patch: int) -> Float[Tensor, "B T 7 h w"]:
    """Flow to the next and the previous frame and its expected error, zero at the ends; and one constant."""
    flow = torch.cat([pair.flow.movedim(-1, 3) / 4, pair.spread[:, :, :, None]], dim=3).detach()
    nothing = flow.new_zeros(len(flow), 1, *flow.shape[3:])  # not a slice: a clip of one frame has no pairs
    ahead, back = torch.cat([flow[:, :, 0], nothing], 1), torch.cat([nothing, flow[:, :, 1]], 1)
    return torch.cat([ahead, back, torch.ones_like(ahead[:, :, :1])], dim=2)


def _solved_maps(
    pair: Correspondence, solved: Float[Tensor, "B pairs 2 4 4"], log_depth: Tensor, intrinsics: Tensor, patch: int
) -> Float[Tensor, "B T 8 h w"]:
    """What the first poses say of each token, to the next and the previous frame (zero at the ends).

    Triangulated log-depth less the coarse one (damped where parallax is small), parallax, epipolar residual in pixels,
    residual of the coarse depth.
    """
    rays, there, focal = _rays(pair, intrinsics, patch)
    source = rays[:, :, None].expand_as(there)
    nearness, parallax, off = triangulate(solved, source, there)
    pixels = focal[..., None, None]
    depth = torch.stack([log_depth[:, :-1], log_depth[:, 1:]], dim=2).flatten(3)
    prior = torch.exp(-depth)
    trust = parallax.square() / (parallax.square() + (0.3 / pixels).square())
    ratio = torch.log(((nearness * trust + prior * (1 - trust)) / prior).clamp(0.1, 10))
    maps = torch.stack([ratio, parallax * pixels / 4, (off * pixels / 2).clamp(max=4), trust], dim=3)
    maps = maps.unflatten(-1, pair.flow.shape[3:5])
    nothing = maps.new_zeros(len(maps), 1, *maps.shape[3:])
    return torch.cat([torch.cat([maps[:, :, 0], nothing], 1), torch.cat([nothing, maps[:, :, 1]], 1)], dim=2)
