"""A latent geometry model, from files that are what its card says, for the geometry model and VAE it was made from."""

import json
from pathlib import Path
from typing import Any

from geometry.latent import LatentGeometryModel, LatentSpec
from geometry.stored import CARD, load_latent_model
from vggrpo.bootstrap.assets import read_card, sha256
from vggrpo.geometry_model import identity, load_geometry_model


def load_lgm(
    folder: str | Path, geometry: str | Path, vae: str | Path, allow_import: bool = False
) -> LatentGeometryModel:
    """Normalised latents -> `Geometry`, in evaluation mode and with nothing to train.

    Args:
        folder: of the latent geometry model, as `vggrpo stitch` writes it.
        geometry: the geometry model whose tail it uses, as in `geometry_model`.
        vae: folder of the VAE whose latents it reads; its files are compared with what the model was made from.
        allow_import: see `geometry_model`.

    Raises:
        ValueError: a file that is missing or changed, or a geometry model or VAE that it was not made from.
    """
    folder, vae = Path(folder), Path(vae)
    card = read_card(folder)
    if "made_from" not in card:
        raise ValueError(f"{folder} is no latent geometry model: give the folder that vggrpo stitch wrote")
    made_from = card["made_from"]
    _check_latents(folder, vae)
    if weights_of(vae) != {name: x for name, x in made_from["vae"].items() if name.endswith(".safetensors")}:
        raise ValueError(_another(folder, "vae", vae))
    backbone = load_geometry_model(geometry, allow_import)
    if identity(geometry, backbone) != made_from["geometry"]:
        raise ValueError(_another(folder, "geometry", geometry))
    return load_latent_model(folder, backbone)


def read_latent_spec(vae: Path) -> LatentSpec:
    """What the latents of a Wan VAE's folder are, by its config.json.

    Raises:
        ValueError: no VAE of Wan's there.
    """
    path = vae / "config.json"
    if not vae.parent.is_dir():
        raise ValueError(
            f"there is no folder {vae.parent}: if this is a hub id, fetch it first where there is a network "
            f"(hf download {vae.parent} --local-dir DIR) and give DIR"
        )
    if not path.is_file():
        raise ValueError(f"{vae} has no config.json: it must be the vae/ of a Wan model in diffusers layout")
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        mean, std = (tuple(float(x) for x in config[f"latents_{name}"]) for name in ("mean", "std"))
        strides = config.get("scale_factor_temporal", 4), config.get("scale_factor_spatial", 8)
        return LatentSpec(config["z_dim"], *strides, mean, std)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not that of an AutoencoderKLWan ({error}): fetch the folder again") from None


def weights_of(vae: Path) -> dict[str, str]:
    """sha256 of a VAE's weight files; from its card where it has one, which is compared with them first.

    Raises:
        ValueError: from `read_card`; no weights there.
    """
    if (vae / "card.json").is_file():
        return {name: x for name, x in read_card(vae)["sha256"].items() if name.endswith(".safetensors")}
    found = {path.name: sha256(path) for path in sorted(vae.glob("*.safetensors"))}
    if not found:
        raise ValueError(f"{vae} has no *.safetensors: it must be the vae/ of a Wan model in diffusers layout")
    return found


def _check_latents(folder: Path, vae: Path) -> None:
    """Refuse latents of another kind before anything is loaded."""
    theirs = read_latent_spec(vae)
    latent = json.loads((folder / CARD).read_text())["latent"]
    ours = LatentSpec(**(latent | {name: tuple(latent[name]) for name in ("mean", "std")}))
    if _kind(ours) != _kind(theirs):
        raise ValueError(
            f"{folder} was stitched for latents of {_kind(ours)}, and {vae} makes those of {_kind(theirs)}: "
            "stitch one for this VAE (vggrpo stitch), or give the Wan folder that it is for"
        )
    gap = max(abs(a - b) for a, b in zip(ours.mean + ours.std, theirs.mean + theirs.std, strict=True))
    if gap > 1e-6:
        raise ValueError(
            f"{folder} was stitched for latents of another mean and deviation than those in {vae}/config.json "
            f"(by up to {gap:.3g}): stitch one for this VAE (vggrpo stitch), or restore the file"
        )


def _kind(spec: LatentSpec) -> str:
    return f"{spec.channels} channels, {spec.space_stride} times smaller, {spec.time_stride} frames each"


def _another(folder: Path, name: str, given: str | Path) -> str:
    return f"{folder} was made from another {name} than {given}: restore it, or run vggrpo stitch"
