"""The full-size benchmark does all that it says, at tiny widths; what it builds has the real models' sizes."""

import re

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from benchmarks import full_size
from benchmarks.full_models import CASES, lgm_of, tiny
from benchmarks.vggt_sized import TINY, VGGT_1B, VggtSized
from geometry.models import vggt
from tests.geometry.standins import largest_difference


def tables(said: str) -> dict[str, list[list[str]]]:
    """The rows of each table below their heading, without that of the columns."""
    found: dict[str, list[list[str]]] = {}
    title = ""
    for part in said.split("\n\n")[1:]:
        if part.startswith("|"):
            rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in part.strip().splitlines()]
            found[title] = rows[2:]
        else:
            title = part.strip()
    return found


def number(cell: str) -> float:
    return float(re.sub(r"[^0-9.e-].*", "", cell.replace(",", "")))


@pytest.mark.parametrize("name", ["wan21", "wan22"])
def test_all_parts_run_at_tiny_widths(name, capsys, as_users_run):
    torch.manual_seed(0)
    assert full_size.main(["--tiny", "--models", name]) == 0
    said = capsys.readouterr().out
    assert said.startswith("TINY: these numbers say nothing.")
    found = {title.split(": ")[1]: rows for title, rows in tables(said).items()}
    assert list(found) == ["reward", "dit", "step", "memory"]
    assert [row[0] for row in found["reward"]] == [
        "through the video",
        "LGM, a map a frame",
        "LGM, a map a latent frame",
    ]
    for row in found["reward"]:
        assert all(number(cell) > 0 for cell in row[1:5])
    assert re.match(r"VAE \d+%, camera_head \d+%, depth_head \d+%$", found["reward"][0][5])
    # What is counted needs no clock: 9 steps of 10, guidance, 2 videos; then each saving by itself.
    counted = {row[0]: number(row[-1]) for row in found["step"]}
    work = {
        (size, twice, shared): twice * ((2 * 10 if not shared else 4 + 2 * 6) + 2 * size + 4 * 2 * size)
        for size in (2, 9) for twice in (1, 2) for shared in (False, True)
    }  # fmt: skip
    whole = work[9, 2, False]
    assert counted == pytest.approx(
        {
            "all steps, guidance": 1, "no guidance": 2, "window of 2": whole / work[2, 2, False],
            "window, shared prefix": work[2, 2, False] / work[2, 2, True], "all three": whole / work[2, 1, True],
        },
        abs=0.006,
    )  # fmt: skip
    assert all(number(cell) >= 0 for row in found["step"] for cell in row[1:7])
    (row,) = found["memory"]
    assert number(row[1]) > 0
    assert number(row[3]) == pytest.approx(number(row[1]) / number(row[2]), abs=0.2)


def test_full_sizes_are_refused_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert full_size.main([]) == 2
    assert "the full sizes need a GPU: give --tiny" in capsys.readouterr().err


def test_the_geometry_model_has_the_size_of_vggt():
    """VGGT has 1.26 billion parameters, a tenth of a billion of them in heads that are not here (points, tracks)."""
    with torch.device("meta"):
        module = VggtSized(VGGT_1B)
    assert sum(p.numel() for p in module.parameters()) == pytest.approx(1.16e9, rel=0.05)
    spec = vggt.spec(module)
    assert (spec.patch, spec.dim, spec.num_prefix, len(spec.blocks), len(spec.stitch_points)) == (14, 1024, 5, 72, 24)


def test_it_is_entered_at_a_block_without_a_difference():
    torch.manual_seed(0)
    backbone = vggt.backbone(VggtSized(TINY))
    video = torch.rand(1, 3, 3, 28, 42)
    point = backbone.spec.stitch_points[0]
    tokens = backbone.tokens_at([point], video)[point]
    whole = backbone(video)
    assert largest_difference(backbone.forward_from(point, tokens), whole) == 0
    moved = tokens._replace(patch=tokens.patch + 0.1)
    assert largest_difference(backbone.forward_from(point, moved), whole) > 0  # the control
    backbone.module.depth_head.chunk = 1
    assert largest_difference(backbone(video), whole) < 1e-5  # frames do not meet in the head


@pytest.mark.parametrize("name", CASES)
def test_latents_and_tokens_are_those_of_the_reference_table(name):
    expected = {
        "wan21": ((16, 21, 60, 104), (30, 52)),
        "wan22": ((48, 21, 44, 80), (22, 40)),
        "wan22-480": ((48, 21, 30, 52), (30, 52)),
    }
    case = CASES[name]
    latent, grid = expected[name]
    assert case.latent == latent
    connector = lgm_of(tiny(case), "cpu", torch.float32, "latent").connector
    assert connector.grid(*latent[2:]) == grid
    with torch.device("meta"):
        transformer = WanTransformer3DModel(**case.published.transformer)
        z_dim = case.published.vae["z_dim"]
        AutoencoderKLWan(**case.published.vae, latents_mean=[0.0] * z_dim, latents_std=[1.0] * z_dim)
    billions = {"Wan2.1-T2V-1.3B-Diffusers": 1.419, "Wan2.2-TI2V-5B-Diffusers": 5.0}[case.name]
    assert sum(p.numel() for p in transformer.parameters()) / 1e9 == pytest.approx(billions, rel=1e-3)
