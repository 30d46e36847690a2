"""The shipped numbers are the shipped weights': measured again on fresh seeds."""

from pathlib import Path

import pytest
import torch

from vggrpo.bootstrap.assets import read_card
from vggrpo.bootstrap.geometry_eval import measure
from vggrpo.bootstrap.geometry_publish import BARS, held_out
from vggrpo.bootstrap.vae import load_vae
from vggrpo.stitch.clips import latents_of
from vggrpo.stitch.judge import in_parts
from vggrpo.stitch.load import load_lgm

ASSETS = Path(__file__).parents[3] / "assets"


@pytest.mark.slow
def test_the_shipped_numbers_hold_on_fresh_seeds():
    """Other seeds than the card's: within sampling error of its numbers, and on its side of a constant answer."""
    card = read_card(ASSETS / "tiny-lgm")["held_out"]
    vae = load_vae(ASSETS / "tiny-wan" / "vae")
    model = load_lgm(ASSETS / "tiny-lgm", ASSETS / "tiny-geometry", ASSETS / "tiny-wan" / "vae")
    first = int(torch.randint(20_000_000, 2**31, ()))
    print("first seed", first)
    lessons, _ = held_out(4, first=first)
    found = measure(in_parts(model, latents_of(vae, lessons.video.float() / 255), lessons.intrinsics), lessons)
    for name, (_, _, sign) in BARS.items():
        shipped, control = card["all"]["distilled"][name], card["control: constant"]["distilled"][name]
        # A third of the way to the constant answer is more than 80 clips differ from 80 others; but for cameras that do
        # not turn, as half of them do not, that answer is right.
        still = name in ("rotation", "clip_rotation")
        assert sign * (found[name] - shipped) > -(shipped if still else abs(control - shipped) / 3), name
