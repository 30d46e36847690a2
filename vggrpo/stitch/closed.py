"""Every connector at every stitch point in closed form, ranked on held-out clips, kept on disk."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from geometry.backbone import HookedBackbone
from geometry.latent import Connector, LatentGeometryModel, LatentSpec, TimeMode
from geometry.stitch import rank_layers, stitch
from geometry.stored import load_latent_model, save_latent_model
from vggrpo.bootstrap.assets import save_json
from vggrpo.bootstrap.geometry_publish import load_geometry
from vggrpo.bootstrap.progress import Progress
from vggrpo.stitch.clips import Clips
from vggrpo.stitch.recipe import ConnectorRecipe, StitchRecipe


@dataclass(frozen=True)
class Ranked:
    """A closed-form model and how far its outputs are from the teacher's on held-out clips."""

    mode: TimeMode
    kernel: list[int]
    point: str
    r2: float
    """Of the connector."""
    total: float
    """Weighted sum of `distances`."""
    distances: dict[str, float]
    folder: str
    """Where the model is kept, below the recipe's `out`."""


def build_connector(backbone: HookedBackbone, latent: LatentSpec, how: ConnectorRecipe) -> Connector:
    """A connector from latents to tokens of their own size: several tokens per latent side, or the other way round."""
    tokens, pixels = backbone.spec.patch, latent.space_stride
    return Connector(
        latent,
        backbone.spec.dim,
        mode=how.mode,
        kernel=None if how.kernel is None else (how.kernel[0], how.kernel[1], how.kernel[2]),
        stride=max(1, round(tokens / pixels)),
        split=max(1, round(pixels / tokens)),
    )


def solve_and_rank(recipe: StitchRecipe, latent: LatentSpec, clips: Sequence[Clips], held_out: Clips) -> list[Ranked]:
    """All connectors of the recipe at all stitch points, best of all first; what is on disk already is not redone."""
    backbone, progress = load_geometry(recipe.geometry), Progress()
    found: list[Ranked] = []
    for number, how in enumerate(recipe.connectors):
        folder = Path(recipe.out) / "closed" / str(number)
        if not (folder / "ranked.json").exists():
            progress(f"closed form {number + 1} of {len(recipe.connectors)}: {how.mode}")
            samples = (sample for some in clips for sample in some.batches())
            models = stitch(backbone, build_connector(backbone, latent, how), samples, ridge=recipe.ridge)
            ranked = []
            for k, layer in enumerate(rank_layers(models, held_out.batches(), recipe.distil.weights)):
                save_latent_model(layer.model, folder / str(k), {})
                kernel = list(layer.model.connector.conv.kernel_size)
                place = f"closed/{number}/{k}"
                ranked.append(Ranked(how.mode, kernel, layer.point, layer.r2, layer.total, layer.distances, place))
            save_json(folder / "ranked.json", {"layers": [asdict(layer) for layer in ranked]})
        found += [Ranked(**layer) for layer in json.loads((folder / "ranked.json").read_text())["layers"]]
    return sorted(found, key=lambda layer: layer.total)


def choose(ranked: Sequence[Ranked], modes: Sequence[TimeMode], point: str | None) -> Ranked:
    """The best of some time modes, at a stitch point if one is given.

    Raises:
        ValueError: there is no such model.
    """
    fitting = [layer for layer in ranked if layer.mode in modes and point in (None, layer.point)]
    if not fitting:
        points = ", ".join(sorted({layer.point for layer in ranked}))
        raise ValueError(f"no connector in {', '.join(modes)} at {point}: the stitch points are {points}")
    return min(fitting, key=lambda layer: layer.total)


def load_closed(recipe: StitchRecipe, layer: Ranked) -> LatentGeometryModel:
    """A closed-form model around a backbone of its own, so that training it leaves all others as they are."""
    return load_latent_model(Path(recipe.out) / layer.folder, load_geometry(recipe.geometry))
