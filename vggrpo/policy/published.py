"""The Wan models that are published, as numbers: what their folders on the hub say in config.json, without weights.

For plans of models that are not here yet, for narrow stand-ins of the same make (`tiny_random.py`), and for benchmarks,
since random weights cost what trained ones do. Names are those of the folders (`Wan-AI/...-Diffusers`).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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

    @property
    def transformer(self) -> dict[str, Any]:
        """Arguments of `WanTransformer3DModel`."""
        channels = self.vae["z_dim"]
        return {
            "patch_size": [1, 2, 2], "num_attention_heads": self.heads, "attention_head_dim": 128,
            "in_channels": channels, "out_channels": channels, "text_dim": 4096, "freq_dim": 256, "ffn_dim": self.ffn,
            "num_layers": self.layers, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6,
        }  # fmt: skip


PUBLISHED = {
    "Wan2.1-T2V-1.3B-Diffusers": Published(heads=12, ffn=8960, layers=30, shift=3.0),
    "Wan2.1-T2V-14B-Diffusers": Published(heads=40, ffn=13824, layers=40, shift=3.0),
    "Wan2.2-TI2V-5B-Diffusers": Published(heads=24, ffn=14336, layers=30, shift=5.0, vae=WAN22_VAE, per_token=True),
}


def find(folder: str | Path) -> Published | None:
    """The published model that a folder is named after, whether it is there or not."""
    return PUBLISHED.get(Path(folder).name)
