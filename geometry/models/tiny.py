"""The embedded geometry model: VGGT in shape, small enough for one CPU core, with correspondence and a pose solver.

    video -> encoder blocks (DINOv2 with registers: the stitch points)      tokens, one per 4 x 4 pixels
          -> correlation of tokens of frames 1, 2 and 4 apart               flow, and its expected error
          -> frame / global blocks with camera and register tokens          depth and weights per token
          -> Gauss-Newton on neighbours (solver.py)                         camera motion
          -> what the motion says of each token (depth, parallax, residual) -> frame / global blocks -> dense heads
          -> Gauss-Newton on the whole clip (path.py), on the final depth and weights   cameras
          -> if so configured, bundle adjustment on the features (adjustment.py)        cameras and depth

Everything after the encoder sees tokens only, so a latent that is stitched into it drives all of the rest. Depth is in
units of about the clip's median depth; intrinsics may be given, else a focal length is estimated.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from geometry.backbone import BackboneSpec
from geometry.cameras import relative, unproject
from geometry.models.adjustment import adjust
from geometry.models.attention import Alternating
from geometry.models.correlation import SPANS, Correlation
from geometry.models.cues import (
    MOTION_CUES,
    SOLVED_CUES,
    focal_code,
    motion_cues,
    pinhole_of,
    sideways,
    solved_cues,
)
from geometry.models.dense import DenseHead
from geometry.models.grid import even, whole_grid
from geometry.models.prediction import Prediction
from geometry.models.sightings import TRUST, clip_cameras, edges, pair_cameras
from geometry.models.solver import chain
from geometry.types import Geometry


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
    adjust: bool = False
    """Whether cameras and depth are adjusted on the features at the end (`adjustment.py`)."""


NUM_PREFIX = 5
"""Class token and registers of the encoder."""
SKY = 5.0
"""Units of depth beyond which is sky: that is trained to be at 15, and all but an open ground's rim is below 4."""


class TinyGeometry(nn.Module):
    """Video -> `Prediction`; `geometry.backbone` turns that into a `Geometry`."""

    def __init__(self, config: TinyConfig = TinyConfig()) -> None:
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
                num_register_tokens=NUM_PREFIX - 1,
                layerscale_value=0.03,
            )
        )
        self.correlation = Correlation(width, config.patch, config.features)
        self.merge = nn.Conv2d(width + MOTION_CUES, dim, 2, stride=2)
        self.camera = nn.Parameter(0.02 * torch.randn(2, 1 + config.registers, dim))
        self.from_class = nn.Linear(width, dim)
        self.from_focal = nn.Linear(2, dim)
        self.early = Alternating(dim, config.heads, config.pairs[0])
        self.norm = nn.LayerNorm(dim)
        self.coarse = nn.Linear(dim, 4 * 4)
        self.focal = nn.Linear(dim, 1)
        self.from_solved = nn.Conv2d(SOLVED_CUES + 2, dim, 2, stride=2)
        self.late = Alternating(dim, config.heads, config.pairs[1])
        self.last_norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 4 * dim // 2)
        self.dense = DenseHead(dim // 2 + width + MOTION_CUES + SOLVED_CUES, config.patch, config.features)
        self.fine = nn.Linear(dim, 4 * 2)
        self.apart = nn.Parameter(torch.zeros(len(SPANS)))
        self.trust: nn.Parameter | None = nn.Parameter(torch.zeros(())) if config.adjust else None
        self._start()

    def _start(self) -> None:
        """Tokens begin as their pixels, and the correlation's features as the colours: it can follow them untrained."""
        patch = self.encoder.embeddings.patch_embeddings.projection
        nn.init.orthogonal_(patch.weight.view(len(patch.weight), -1), gain=2.0)
        assert patch.bias is not None
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
        return self._after_encoder(x[:, :, 0], x[:, :, NUM_PREFIX:].unflatten(2, (H // patch, W // patch)), intrinsics)

    def _after_encoder(
        self,
        scene: Float[Tensor, "B T width"],
        tokens: Float[Tensor, "B T h w width"],
        intrinsics: Float[Tensor, "B T 3 3"] | None,
    ) -> Prediction:
        B, T, h, w, _ = tokens.shape
        patch = self.config.patch
        pair = self.correlation(tokens)
        image = torch.cat([tokens.movedim(-1, 2), motion_cues(pair)], dim=2).flatten(0, 1)
        x = self.merge(even(image))
        size = (x.shape[-2], x.shape[-1])
        focal = x.new_zeros(B, T, 2) if intrinsics is None else focal_code(intrinsics, w * patch)
        special = (
            torch.cat([self.camera[:1], self.camera[1:].expand(T - 1, -1, -1)])[None]
            + self.from_class(scene)[:, :, None]
        )
        special = special + self.from_focal(focal)[:, :, None]
        x = self.early(torch.cat([special, x.flatten(2).mT.unflatten(0, (B, T))], dim=2))
        y = self.norm(x)
        log_focal = self.focal(y[:, :, 0]).mean((1, 2)) - 0.1
        if intrinsics is None:
            intrinsics = pinhole_of(log_focal, h * patch, w * patch)[:, None].expand(-1, T, -1, -1)
        maps = whole_grid(self.coarse(y[:, :, special.shape[2] :]), size, (h, w))
        log_depth, moving = maps[:, :, 0], maps[:, :, 3]
        ahead, back = (maps[:, :, k] + F.logsigmoid(-moving) / TRUST for k in (1, 2))
        weight = torch.stack([ahead[:, :-1], back[:, 1:]], dim=2)
        coarse, solved = pair_cameras(pair, log_depth, weight, intrinsics, patch)
        found = torch.cat([solved_cues(pair, solved, log_depth, intrinsics, patch), torch.stack([ahead, back], 2)], 2)
        found = found.detach()
        seen = self.from_solved(even(found.flatten(0, 1))).flatten(2).mT.unflatten(0, (B, T))
        x = self.last_norm(self.late(torch.cat([x[:, :, : special.shape[2]], x[:, :, special.shape[2] :] + seen], 2)))
        x = x[:, :, special.shape[2] :]
        wide = whole_grid(self.expand(x), size, (h, w))
        stack = torch.cat([wide.flatten(0, 1), image, found[:, :, :SOLVED_CUES].flatten(0, 1)], dim=1)
        maps = self.dense(stack, pair.features.flatten(0, 1)).unflatten(0, (B, T))
        whole = partial(F.interpolate, scale_factor=float(patch), mode="bilinear", align_corners=False)
        final = whole(log_depth.detach()) + maps[:, :, 0]
        still = F.logsigmoid(-F.avg_pool2d(maps[:, :, 2], patch))[:, :, None] / TRUST
        weight = weight + torch.stack(_ends(whole_grid(self.fine(x), size, (h, w)) + still), dim=2)
        guess, pooled = final, F.avg_pool2d(final, patch)
        seen = edges(pair, weight, self.apart)
        if self.trust is None:
            c2w = clip_cameras(seen, pooled, intrinsics, patch, chain(coarse))
        else:
            with torch.no_grad():
                start = clip_cameras(seen, pooled, intrinsics, patch, chain(coarse))
            c2w, depth = adjust(pair.features, seen, pooled, intrinsics, start, self.trust)
            final, pooled = final + whole(depth - pooled), depth
        across = sideways(pair, relative(c2w), pooled, intrinsics, patch).detach().clamp(-0.5, 0.5)
        across = whole(across.flatten(0, 1)).unflatten(0, (B, T))
        motion = (across + 0.1 * maps[:, :, 3:6] * torch.exp(final.detach())[:, :, None]).movedim(2, -1)
        return Prediction(
            pair, log_depth, moving, coarse, relative(c2w), c2w, intrinsics, log_focal,
            guess, final, maps[:, :, 1], maps[:, :, 2], motion,
        )  # fmt: skip


def spec(config: TinyConfig) -> BackboneSpec:
    """Every encoder block is a stitch point; no head reads an encoder block's output but the last one's."""
    encoder = tuple(f"encoder.encoder.layer.{k}" for k in range(config.encoder_layers))
    tail = [
        f"{stage}.{kind}.{k}"
        for stage, pairs in zip(("early", "late"), config.pairs, strict=True)
        for k in range(pairs)
        for kind in ("frame", "world")
    ]
    heads = ("correlation", "merge", "from_class", "from_focal", "coarse", "focal", "from_solved", "expand")
    return BackboneSpec(
        config.patch,
        config.encoder_dim,
        NUM_PREFIX,
        (*encoder, *tail),
        encoder,
        "unit",
        (*heads, "dense", "fine"),
        ("correlation",),
    )


def call(module: nn.Module, images: Tensor, intrinsics: Tensor | None) -> Prediction:
    """Run it as `HookedBackbone` does."""
    found: Prediction = module(images, intrinsics)
    return found


def parse(found: Prediction, size: tuple[int, int]) -> Geometry:
    """In the conventions of `geometry/types.py`; scene flow is weighed by the probability that there is any."""
    depth = found.log_depth.exp()
    flow = torch.einsum("btij,bthwj->bthwi", found.c2w[..., :3, :3], found.motion)
    return Geometry(
        found.c2w,
        found.intrinsics,
        depth,
        unproject(depth, found.intrinsics, found.c2w),
        confidence=found.confidence.sigmoid(),
        scene_flow=flow * found.dynamic.sigmoid()[..., None],
        flow_grid="frame",
        valid=depth.detach() < SKY,
    )


def _ends(maps: Float[Tensor, "B T 2 h w"]) -> tuple[Tensor, Tensor]:
    return maps[:, :-1, 0], maps[:, 1:, 1]
