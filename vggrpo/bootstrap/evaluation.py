"""The shipped assets, measured again on fresh seeds, beside the bars for what is trained on a CPU.

A stage is a function that returns rows; one more is one more entry of `MEASURES`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from vggrpo.bootstrap import generator_card, geometry_publish, vae_card
from vggrpo.bootstrap.assets import read_card
from vggrpo.bootstrap.captions import draw_captions
from vggrpo.bootstrap.footage import render_footage
from vggrpo.bootstrap.generator import load_generator
from vggrpo.bootstrap.generator_eval import Sampling, evaluate_generator, load_reader
from vggrpo.bootstrap.geometry_eval import Model, measure, predict
from vggrpo.bootstrap.referee_publish import load_referee
from vggrpo.bootstrap.text import load_text
from vggrpo.bootstrap.text_train import probe
from vggrpo.bootstrap.vae import load_vae
from vggrpo.bootstrap.vae_eval import evaluate_vae

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
    return _cameras(geometry_publish.load_geometry(assets / "tiny-geometry"), first_seed)


def referee_rows(assets: Path, first_seed: int) -> list[Row]:
    """80 steady clips."""
    return _cameras(load_referee(assets / "tiny-referee"), first_seed)


def generator_rows(assets: Path, first_seed: int) -> list[Row]:
    """50 samples."""
    recipe = read_card(assets / "tiny-wan")["recipe"]
    pipe, reader = load_generator(assets / "tiny-wan"), load_reader(assets / "tiny-referee")
    found = evaluate_generator(pipe, reader, 50, Sampling(**recipe["sampling"]), first_seed)
    return [
        Row("camera as told (motion and side)", found["verb"], generator_card.VERBS),
        Row("ceiling: rendered clips through the VAE", found["ceiling"]["verb"]),
        Row("control: against other captions", found["controls"]["other captions"]),
        Row("sharpness beside the VAE's, |ratio - 1|", abs(found["sharpness"] - 1), generator_card.SHARPNESS, -1),
    ]


MEASURES: dict[str, Measure] = {
    "text": text_rows,
    "vae": vae_rows,
    "geometry": geometry_rows,
    "referee": referee_rows,
    "generator": generator_rows,
}


def evaluate(stages: Sequence[str], first_seed: int, assets: Path = ASSETS) -> dict[str, list[Row]]:
    """The rows of some stages, or of all if none is named.

    Raises:
        ValueError: an unknown stage; an asset that is missing or damaged.
    """
    unknown = [stage for stage in stages if stage not in MEASURES]
    if unknown:
        raise ValueError(f"no stage {unknown[0]!r}: choose from {', '.join(MEASURES)}")
    return {stage: MEASURES[stage](assets, first_seed) for stage in stages or MEASURES}


def lines(found: dict[str, list[Row]]) -> list[str]:
    """One line a row."""
    head = [f"{'stage':<10} {'measured on fresh seeds':<44} {'value':>8} {'bar':>10}"]
    for stage, rows in found.items():
        for row in rows:
            bar = "" if row.bar is None else f"{'>=' if row.sign > 0 else '<='} {row.bar:g}"
            verdict = "" if row.bar is None else "missed" if row.missed() else "met"
            head.append(f"{stage:<10} {row.what:<44} {row.value:>8.3f} {bar:>10} {verdict}".rstrip())
    return head


def _cameras(model: Model, first_seed: int) -> list[Row]:
    lessons, _ = geometry_publish.held_out(4, first=first_seed)
    found = measure(predict(model, lessons), lessons)
    return [Row(what, found[name], bar, sign) for name, (what, bar, sign) in geometry_publish.BARS.items()]
