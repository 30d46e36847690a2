"""The shipped assets, measured again on fresh seeds, beside the bars for what is trained on a CPU.

A stage is a function that returns rows; one more is one more entry of `MEASURES`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from vggrpo.bootstrap import generator_card, vae_card
from vggrpo.bootstrap.assets import read_card
from vggrpo.bootstrap.captions import draw_captions
from vggrpo.bootstrap.footage import render_footage
from vggrpo.bootstrap.generator import load_generator
from vggrpo.bootstrap.generator_eval import Sampling, evaluate_generator, load_reader
from vggrpo.bootstrap.geometry_eval import Model, measure, predict
from vggrpo.bootstrap.geometry_publish import BARS, held_out, load_geometry
from vggrpo.bootstrap.referee_publish import load_referee
from vggrpo.bootstrap.text import load_text
from vggrpo.bootstrap.text_train import probe
from vggrpo.bootstrap.vae import load_vae
from vggrpo.bootstrap.vae_eval import evaluate_vae
from vggrpo.stitch.clips import latents_of
from vggrpo.stitch.judge import RATIO_BAR, in_parts, ratios
from vggrpo.stitch.load import load_lgm

ASSETS = Path("assets")


class Row(NamedTuple):
    """One number of an asset."""

    what: str
    value: float
    bar: float | None = None
    """What was asked for, if anything was."""
    sign: int = 1
    """1: the bar is a least value; -1: a greatest."""

    def missed(self) -> bool:
        """Whether it falls short of its bar; NaN does."""
        return self.bar is not None and not self.sign * (self.value - self.bar) >= 0


Measure = Callable[[Path, int], list[Row]]
"""What the assets below a folder measure on seeds from a first one on."""


def vae_rows(assets: Path, first_seed: int) -> list[Row]:
    """80 clips."""
    vae = load_vae(assets / "tiny-wan/vae")
    found = evaluate_vae(vae, torch.cat(list(render_footage(range(64)))), per_family=8, first_seed=first_seed)
    return [
        Row("PSNR, dB", found["psnr"], vae_card.BAR),
        Row("PSNR, bodies move", found["dynamic"]),
        Row("PSNR, control: 16 principal components", found["controls"]["linear_after_first_frame"]),
    ]


def text_rows(assets: Path, first_seed: int) -> list[Row]:
    """256 captions."""
    stage, training = load_text(assets / "tiny-wan"), draw_captions(range(1024))
    fresh = draw_captions(range(first_seed, first_seed + 256))
    found, control = (probe(stage, training, fresh, shuffled) for shuffled in (False, True))
    rows = [Row(f"linear probe of the mean embedding: {fact}", found[fact]) for fact in ("camera", "direction", "pace")]
    return [*rows, Row("control: direction, shuffled facts", control["direction"])]


def geometry_rows(assets: Path, first_seed: int) -> list[Row]:
    """80 steady clips."""
    return _cameras(load_geometry(assets / "tiny-geometry"), first_seed)


def referee_rows(assets: Path, first_seed: int) -> list[Row]:
    """80 steady clips."""
    return _cameras(load_referee(assets / "tiny-referee"), first_seed)


def generator_rows(assets: Path, first_seed: int) -> list[Row]:
    """50 samples."""
    recipe = read_card(assets / "tiny-wan")["recipe"]
    pipe, reader = load_generator(assets / "tiny-wan"), load_reader(assets / "tiny-referee")
    data = recipe["training"]["data"]
    found = evaluate_generator(
        pipe, reader, 50, Sampling(**recipe["sampling"]), data["scenes"], first_seed, data["sway"]
    )
    return [
        Row("camera as told (motion and side)", found["verb"], generator_card.VERBS),
        Row("ceiling: rendered clips through the VAE", found["ceiling"]["verb"]),
        Row("control: against other captions", found["controls"]["other captions"]),
        Row("sharpness beside the VAE's, |ratio - 1|", abs(found["sharpness"] - 1), generator_card.SHARPNESS, -1),
    ]


def stitch_rows(assets: Path, first_seed: int) -> list[Row]:
    """80 steady clips."""
    geometry, wan = assets / "tiny-geometry", assets / "tiny-wan/vae"
    model, teacher, vae = load_lgm(assets / "tiny-lgm", geometry, wan), load_geometry(geometry), load_vae(wan)
    lessons, _ = held_out(4, first=first_seed)
    video, known = lessons.video.float() / 255, lessons.intrinsics
    mine = measure(in_parts(model, latents_of(vae, video), known), lessons)
    errors = ratios(mine, measure(in_parts(teacher, video, known), lessons))
    barred = [(what, errors[name]) for name, (what, bar, _) in BARS.items() if bar is not None]
    return [Row(f"{what}, in the teacher's error", error, RATIO_BAR, -1) for what, error in barred]


MEASURES: dict[str, Measure] = {
    "text": text_rows,
    "vae": vae_rows,
    "geometry": geometry_rows,
    "referee": referee_rows,
    "generator": generator_rows,
    "stitch": stitch_rows,
}


def evaluate(
    stages: Sequence[str], first_seed: int, say: Callable[[str], None], assets: Path = ASSETS
) -> dict[str, list[Row]]:
    """The rows of some stages, or of all if none is named. `say` hears which is being measured.

    Raises:
        ValueError: an unknown stage; an asset that is missing or damaged.
    """
    unknown = [stage for stage in stages if stage not in MEASURES]
    if unknown:
        raise ValueError(f"no stage {unknown[0]!r}: choose from {', '.join(MEASURES)}")
    found = {}
    for stage in stages or MEASURES:
        say(f"measuring {stage}")
        found[stage] = MEASURES[stage](assets, first_seed)
    return found


def lines(found: dict[str, list[Row]]) -> list[str]:
    """One line a row."""
    width = max(len(row.what) for rows in found.values() for row in rows)
    said = [f"{'stage':<9}  {'measured on fresh seeds':<{width}}  {'value':>7}  bar"]
    for stage, rows in found.items():
        for row in rows:
            end = (
                f"{'>=' if row.sign > 0 else '<='} {row.bar:g} {'missed' if row.missed() else 'met'}" if row.bar else ""
            )
            said.append(f"{stage:<9}  {row.what:<{width}}  {row.value:>7.3f}  {end}".rstrip())
    return said


def _cameras(model: Model, first_seed: int) -> list[Row]:
    lessons, _ = held_out(4, first=first_seed)
    found = measure(predict(model, lessons), lessons)
    return [Row(what, found[name], bar, sign) for name, (what, bar, sign) in BARS.items()]
