"""The shipped latent geometry model, from files that are what its card says."""

from pathlib import Path

from geometry.latent import LatentGeometryModel
from geometry.stored import load_latent_model
from vggrpo.bootstrap.assets import read_card
from vggrpo.bootstrap.geometry_publish import load_geometry


def load_lgm(folder: str | Path, geometry: str | Path, vae: str | Path) -> LatentGeometryModel:
    """Normalised latents -> `Geometry`, in evaluation mode and with nothing to train.

    Args:
        folder: of the latent geometry model, as `vggrpo stitch` writes it.
        geometry: of the geometry model whose tail it uses.
        vae: of the VAE whose latents it reads; its files are compared with what the model was made from.

    Raises:
        ValueError: a file that is missing or changed, or a geometry model or VAE that it was not made from.
    """
    folder = Path(folder)
    card = read_card(folder)
    if "made_from" not in card:
        raise ValueError(f"{folder} is no latent geometry model: give the folder that vggrpo stitch wrote")
    made_from = card["made_from"]
    for name, path in (("geometry", Path(geometry)), ("vae", Path(vae))):
        if read_card(path)["sha256"] != made_from[name]:
            raise ValueError(f"{folder} was made from another {name} than {path}: restore it, or run vggrpo stitch")
    return load_latent_model(folder, load_geometry(geometry))
