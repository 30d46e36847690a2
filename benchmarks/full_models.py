"""The published Wan models and a geometry model of VGGT's size with random weights, at full width or narrow."""

from dataclasses import dataclass, replace

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from benchmarks.vggt_sized import TINY, VGGT_1B, VggtSized
from geometry.latent import Connector, LatentGeometryModel, LatentSpec, TimeMode
from geometry.models import vggt
from vggrpo.policy.published import PUBLISHED, Published
from vggrpo.policy.wan import in_dtype, latents_of
from vggrpo.tiny_random import TEXT, narrow_transformer, narrow_vae, narrow_wide_vae


@dataclass(frozen=True)
class Case:
    """A model, and the video that it makes."""

    name: str
    frames: int
    height: int
    width: int
    stride: int
    """Latents per token side of the connector."""
    tiny: bool = False

    @property
    def published(self) -> Published:
        return PUBLISHED[self.name]

    @property
    def latent(self) -> tuple[int, int, int, int]:
        return latents_of(self.published.vae, self.name, self.frames, self.height, self.width)

    @property
    def words(self) -> tuple[int, int]:
        """Tokens of a prompt and their width."""
        return (8, TEXT) if self.tiny else (512, 4096)

    def __str__(self) -> str:
        return f"{self.name.removesuffix('-Diffusers')}, {self.frames} x {self.height} x {self.width}"


CASES = {
    "wan21": Case("Wan2.1-T2V-1.3B-Diffusers", 81, 480, 832, 2),
    "wan22": Case("Wan2.2-TI2V-5B-Diffusers", 81, 704, 1280, 2),
    "wan22-480": Case("Wan2.2-TI2V-5B-Diffusers", 81, 480, 832, 1),
}


def tiny(case: Case) -> Case:
    """The same at narrow widths, with a video of a few tokens."""
    return replace(case, frames=9, height=64, width=64, tiny=True)


def transformer_of(case: Case, device: str, dtype: torch.dtype) -> WanTransformer3DModel:
    """With random weights; in bf16, times, norms and modulation are fp32, as `from_pretrained` holds them."""
    with torch.device(device):
        made = narrow_transformer(case.latent[0]) if case.tiny else WanTransformer3DModel(**case.published.transformer)
    return in_dtype(made, dtype)


def vae_of(case: Case, device: str, dtype: torch.dtype) -> AutoencoderKLWan:
    """With random weights, and latents that have mean 0 and variance 1 already."""
    z_dim = case.published.vae["z_dim"]
    statistics = {"latents_mean": [0.0] * z_dim, "latents_std": [1.0] * z_dim}
    if case.tiny:
        made = narrow_wide_vae() if case.published.per_token else narrow_vae()
    else:
        with torch.device(device):
            made = AutoencoderKLWan(**case.published.vae, **statistics)
    made = made.to(device)
    for weight in made.parameters():  # the class's own .to(dtype) warns of modules that it does not have
        weight.data = weight.data.to(dtype)
    return made.eval().requires_grad_(False)


def lgm_of(case: Case, device: str, dtype: torch.dtype, mode: TimeMode) -> LatentGeometryModel:
    """Stitched after a twelfth of the encoder, as VIST3A found best; what comes before is skipped."""
    config, size = case.published.vae, TINY if case.tiny else VGGT_1B
    C = config["z_dim"]
    latent = LatentSpec(C, 4, config.get("scale_factor_spatial", 8), (0.0,) * C, (1.0,) * C)
    with torch.device(device):
        backbone = vggt.backbone(VggtSized(size))
        connector = Connector(latent, size.dim, mode=mode, stride=case.stride)
    point = backbone.spec.stitch_points[size.encoder // 12]
    lgm = LatentGeometryModel(backbone, point, connector).to(device, dtype)
    return lgm.eval().requires_grad_(False)
