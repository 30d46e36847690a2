"""The Wan models that are published, as numbers: what their folders on the hub say in config.json, without weights.

For plans of models that are not here yet, for narrow stand-ins of the same make (`tiny_random.py`), and for benchmarks,
since random weights cost what trained ones do. Names are those of the folders (`Wan-AI/...-Diffusers`).
Numbers of I2V and A14B are from diffusers' scripts/convert_wan_to_diffusers.py, which made these folders, and those of
CLIP's view from Wan2.1's wan/modules/clip.py.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vggrpo.policy.first_frame import Way
from vggrpo.policy.wan_folder import Layout, told_channels

WAN21_VAE = {"base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
"""8 x 8 pixels and 4 frames to a latent of 16 numbers; what else it has are the class's own defaults."""
WAN22_VAE = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
    "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16,
}  # fmt: skip
"""16 x 16 pixels and 4 frames to a latent of 48 numbers. Its means and deviations are not here: they cost nothing."""


@dataclass(frozen=True)
class Published:
    """One model."""

    heads: int
    ffn: int
    layers: int
    shift: float
    """Of its own time grid."""
    vae: dict[str, Any] = field(default_factory=lambda: WAN21_VAE)
    """Arguments of `AutoencoderKLWan`."""
    per_token: bool = False
    """Every token has a time of its own (`expand_timesteps`)."""
    channels: bool = False
    """A first frame's mask and latents are further channels of the input."""
    sight: bool = False
    """It reads CLIP's view of the first frame, too."""
    boundary: float | None = None
    """Between two transformers of this size (`boundary_ratio`)."""

    @property
    def transformer(self) -> dict[str, Any]:
        """Arguments of `WanTransformer3DModel`."""
        z_dim, width = self.vae["z_dim"], 128 * self.heads
        image = {"image_dim": 1280, "added_kv_proj_dim": width} if self.sight else {}
        return {
            "patch_size": [1, 2, 2], "num_attention_heads": self.heads, "attention_head_dim": 128,
            "in_channels": told_channels(z_dim) if self.channels else z_dim, "out_channels": z_dim, "text_dim": 4096,
            "freq_dim": 256, "ffn_dim": self.ffn, "num_layers": self.layers, "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads", "eps": 1e-6,
        } | image  # fmt: skip

    @property
    def layout(self) -> Layout:
        """What its folder says."""
        way: Way | None = "channels" if self.channels else "kept" if self.per_token else None
        return Layout(self.per_token, self.boundary, way, self.sight, (1, 2, 2))


IMAGE_TOKENS = (224 // 14) ** 2 + 1
"""Of CLIP's view (ViT-H/14): what `first_frame.num_seen` reads of a folder that is here."""
WAN_14B = Published(heads=40, ffn=13824, layers=40, shift=3.0)
PUBLISHED = {
    "Wan2.1-T2V-1.3B-Diffusers": Published(heads=12, ffn=8960, layers=30, shift=3.0),
    "Wan2.1-T2V-14B-Diffusers": WAN_14B,
    "Wan2.1-I2V-14B-480P-Diffusers": replace(WAN_14B, channels=True, sight=True),
    "Wan2.1-I2V-14B-720P-Diffusers": replace(WAN_14B, channels=True, sight=True),
    "Wan2.2-TI2V-5B-Diffusers": Published(heads=24, ffn=14336, layers=30, shift=5.0, vae=WAN22_VAE, per_token=True),
    "Wan2.2-T2V-A14B-Diffusers": replace(WAN_14B, boundary=0.875),
    "Wan2.2-I2V-A14B-Diffusers": replace(WAN_14B, channels=True, boundary=0.9),
}


def find(folder: str | Path) -> Published | None:
    """The published model that a folder is named after, whether it is there or not."""
    return PUBLISHED.get(Path(folder).name)
