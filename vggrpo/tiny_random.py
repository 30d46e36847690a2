"""`--tiny-random`: a recipe for a published Wan, or samples of one, with the same classes at a fraction of their width.

The stand-ins have random weights and are written to disk as the hub's folders are, and read from there like them:

    runs/tiny-random/NAME/wan         transformer, or two; VAE (16 channels and 8 x 8, or 48 and 16 x 16), UMT5,
                                      tokenizer, and CLIP where it is read
    runs/tiny-random/NAME/geometry    a geometry model
    runs/tiny-random/NAME/lgm         a latent geometry model: a connector for that VAE, and the tail of that

What comes out is worth nothing. What it shows is that all of a recipe runs: its window, guidance, rewards, precision,
checkpoints and LoRA, under the launch that it is meant for; and what samples are made from it, by the words that one
will type.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerBase,
    UMT5Config,
    UMT5EncoderModel,
)

from geometry.backbone import HookedBackbone
from geometry.latent import Connector, LatentGeometryModel, LatentSpec
from geometry.models.tiny import TinyConfig, TinyGeometry, call, parse, spec
from geometry.stored import CARD, WEIGHTS, save_latent_model
from vggrpo.bootstrap.assets import read_card, save_json, save_tensors, sha256
from vggrpo.bootstrap.geometry_publish import CONFIG
from vggrpo.bootstrap.geometry_publish import WEIGHTS as MODEL
from vggrpo.bootstrap.text import build_tokenizer
from vggrpo.config import Recipe
from vggrpo.data import read_prompts
from vggrpo.policy.first_frame import WORDS
from vggrpo.policy.published import PUBLISHED, Published, find
from vggrpo.sample_config import SampleConfig

FOLDER = Path("runs/tiny-random")
TOKENS = 16
"""Of a prompt; beside what CLIP sees, `WORDS`."""
TEXT = 12
"""Width of the text encoder."""
SIGHT, PIXELS = 16, 28
"""Width of what CLIP sees, and of its picture: four patches."""
GEOMETRY = TinyConfig(dim=48, pairs=(1, 1), registers=1)
SIZE = {"frames": 9, "height": 32, "width": 64}
SMALL = {"num_iterations": 2, "num_prompts": 2, "group_size": 4}
"""Upper limits of what a recipe asks for, as `SIZE` is of its videos."""


MODELS = ("video.model", "video.geometry", "video.lgm")
"""Keys of a recipe that what stands in is named by, whatever else they are said to be."""


def stand_in(recipe: Recipe, path: str | Path) -> list[str]:
    """Build what a recipe needs, unless it is there, and say what is to be changed in it, as `section.key=value`.

    Args:
        path: of the recipe, which names the folder of the run.

    Raises:
        ValueError: a recipe without a video model, or of one that is not published under the name of its folder.
    """
    video = recipe.video
    if video is None:
        raise ValueError(_no_stand_in("no video model"))
    size = _size(video.model) | {"motion_samples": 1}
    made = _models(video.model, video.prompts) | _limited(video, size)
    return [
        f"out={FOLDER / Path(path).stem}",
        *(f"video.{key}={value}" for key, value in made.items()),
        *(f"grpo.{key}={value}" for key, value in _limited(recipe.grpo, SMALL).items()),
    ]


def stand_in_samples(cfg: SampleConfig) -> SampleConfig:
    """The same samples from stand-ins, which are built unless they are there, at the size that suits them.

    Raises:
        ValueError: a model that is not published under the name of its folder; no prompts.
    """
    return replace(cfg, **_models(cfg.model, cfg.prompts), **_limited(cfg, _size(cfg.model)))


def narrow_transformer(channels: int = 16, **others: Any) -> WanTransformer3DModel:
    """A Wan transformer of two layers of width 24; `others` go to the class."""
    settings: dict[str, Any] = {
        "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "text_dim": TEXT,
        "freq_dim": 16, "in_channels": channels, "out_channels": channels,
    }  # fmt: skip
    return WanTransformer3DModel(**settings | others)


def narrow_vae() -> AutoencoderKLWan:
    """Wan 2.1's at a fraction of its width: 16 channels, 8 times smaller."""
    return AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


def narrow_wide_vae() -> AutoencoderKLWan:
    """Wan 2.2's at a fraction of its width: 48 channels, 16 times smaller, in patches of two."""
    torch.manual_seed(1)
    return AutoencoderKLWan(
        base_dim=4, decoder_base_dim=4, z_dim=48, dim_mult=[1, 1, 1, 1], num_res_blocks=1, is_residual=True,
        in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16,
        latents_mean=(0.1 * torch.randn(48)).tolist(), latents_std=(1 + torch.rand(48)).tolist(),
    )  # fmt: skip


def narrow_sight() -> dict[str, Any]:
    """CLIP's image tower and what makes its input, by their names in a pipeline."""
    config = CLIPVisionConfig(
        hidden_size=SIGHT, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=PIXELS,
        patch_size=14,
    )  # fmt: skip
    processor = CLIPImageProcessor(size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS})
    return {"image_encoder": CLIPVisionModel(config), "image_processor": processor}


def save_pipeline(
    folder: Path, make: type, words: PreTrainedTokenizerBase, shift: float = 3.0, **parts: object
) -> Path:
    """A folder as the hub has it: these parts, and a narrow text encoder for that tokenizer."""
    text = UMT5EncoderModel(UMT5Config(vocab_size=len(words), d_model=TEXT, d_kv=6, d_ff=16, num_layers=1, num_heads=2))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    make(tokenizer=words, text_encoder=text, scheduler=scheduler, **parts).save_pretrained(folder)
    return folder


def save_lgm(folder: Path, vae: Path, seed: int = 0) -> None:
    """A geometry model and a latent one for the latents of this VAE, below `folder`, with the cards that tie them."""
    torch.manual_seed(seed)
    net = TinyGeometry(GEOMETRY)
    made = folder / "geometry"
    save_tensors(made / MODEL, {name: x.contiguous() for name, x in net.state_dict().items()})
    save_json(made / CONFIG, asdict(GEOMETRY))
    _card(made, [MODEL, CONFIG])
    _card(
        vae,
        [path.name for path in vae.iterdir() if path.suffix in (".json", ".safetensors") and path.name != "card.json"],
    )
    config = AutoencoderKLWan.load_config(vae)
    stride = config["scale_factor_spatial"]
    latent = LatentSpec(
        config["z_dim"], config["scale_factor_temporal"], stride,
        tuple(config["latents_mean"]), tuple(config["latents_std"]),
    )  # fmt: skip
    backbone = HookedBackbone(net, spec(GEOMETRY), call, parse)
    connector = Connector(latent, GEOMETRY.encoder_dim, split=stride // GEOMETRY.patch)
    nn.init.normal_(connector.conv.weight, std=0.1)
    save_latent_model(LatentGeometryModel(backbone, backbone.spec.stitch_points[-1], connector), folder / "lgm", {})
    made_from = {name: read_card(path)["sha256"] for name, path in (("geometry", made), ("vae", vae))}
    _card(folder / "lgm", [WEIGHTS, CARD], made_from=made_from)


def _build(folder: Path, published: Published, prompts: Sequence[str]) -> None:
    """All of a folder, or nothing."""
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    torch.manual_seed(0)
    wide, layout = published.vae.get("is_residual", False), published.layout
    channels = {name: published.transformer[name] for name in ("in_channels", "out_channels")}
    image = {"image_dim": SIGHT, "added_kv_proj_dim": 24} if layout.sight else {}
    parts: dict[str, Any] = {"transformer": narrow_transformer(**channels, **image)}
    if layout.boundary is not None:
        parts |= {"transformer_2": narrow_transformer(**channels, **image), "boundary_ratio": layout.boundary}
    save_pipeline(
        part / "wan",
        WanImageToVideoPipeline if layout.way == "channels" else WanPipeline,
        build_tokenizer([*prompts, ""], _words(published)),
        published.shift,
        vae=narrow_wide_vae() if wide else narrow_vae(),
        expand_timesteps=layout.per_token,
        **parts,
        **(narrow_sight() if layout.sight else {}),
    )
    save_lgm(part, part / "wan/vae")
    try:
        os.rename(part, folder)
    except OSError:  # somebody else was faster
        shutil.rmtree(part)


def _models(model: str, prompts: str) -> dict[str, Any]:
    """Where the stand-ins are, by the fields that name models."""
    published = _published(model)
    folder = FOLDER / Path(model).name
    if not folder.is_dir():
        _build(folder, published, read_prompts(prompts))
    return {"model": str(folder / "wan"), "geometry": str(folder / "geometry"), "lgm": str(folder / "lgm")}


def _published(model: str) -> Published:
    found = find(model)
    if found is None:
        raise ValueError(_no_stand_in(model))
    return found


def _words(published: Published) -> int:
    return WORDS if published.sight else TOKENS


def _size(model: str) -> dict[str, int]:
    """Upper limits of a stand-in's videos and prompts."""
    return SIZE | {"max_len": _words(_published(model))}


def _no_stand_in(model: str) -> str:
    return (
        f"--tiny-random stands in for {', '.join(PUBLISHED)}, and this is of {model}: name the folder as the hub does"
    )


def _limited(config: object, limits: Mapping[str, int]) -> dict[str, Any]:
    return {key: min(value, getattr(config, key)) for key, value in limits.items()}


def _card(folder: Path, files: Sequence[str], **more: Any) -> None:
    save_json(folder / "card.json", {"sha256": {name: sha256(folder / name) for name in files}, **more})
