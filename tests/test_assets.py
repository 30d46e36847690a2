"""The shipped assets are whole, small, and made by commands that exist."""

import subprocess
from pathlib import Path

import pytest

from vggrpo.bootstrap.assets import read_card
from vggrpo.bootstrap.captions import draw_captions
from vggrpo.bootstrap.evaluation import MEASURES, Row, evaluate, lines
from vggrpo.cli import main

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "assets"
CARDS = sorted(path.parent.relative_to(ASSETS).as_posix() for path in ASSETS.rglob("card.json"))


def test_all_assets_together_are_at_most_40_megabytes():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 40 * 2**20


@pytest.mark.parametrize("folder", CARDS)
def test_every_asset_is_what_its_card_says_and_its_card_says_how_it_was_made(folder):
    card = read_card(ASSETS / folder)
    assert {"command", "seeds", "steps", "hours", "hardware"} <= set(card)
    assert {"held_out", "report"} & set(card), "what it measured"
    recipes = [word for word in card["command"].split() if word.endswith(".yaml")]
    assert (ROOT / recipes[0]).is_file()
    assert (ASSETS / folder / "README.md").is_file()


def test_every_weight_is_named_by_a_card():
    named = {(ASSETS / folder / name).resolve() for folder in CARDS for name in read_card(ASSETS / folder)["sha256"]}
    weights = set(ASSETS.rglob("*.safetensors"))
    assert weights
    assert not weights - named


def test_make_assets_runs_recipes_that_exist_after_what_they_need():
    done = subprocess.run(["make", "-n", "assets"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    recipes = [word for line in done.splitlines() for word in line.split() if word.endswith(".yaml")]
    order = [Path(recipe).stem for recipe in recipes]
    geometry = ["geometry", "geometry_clip", "geometry_adjusted", "geometry_adjusted"]
    assert order == ["text", "vae", *geometry, "referee", "generator", "generator_hand_held", "tiny"]
    assert all((ROOT / recipe).is_file() for recipe in recipes)
    assert all("=runs/assets/" in line for line in done.splitlines() if ".yaml" in line), "an old run would be taken up"


def test_make_assets_does_not_pass_off_an_old_build_as_a_new_one(tmp_path):
    (tmp_path / "old").mkdir()
    command = ["make", "assets", f"NEW={tmp_path / 'old'}", "INSTALLED=", "BOOTSTRAP=echo ran", "BIN=/nonexistent"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "RESUME=1" in done.stdout
    assert "ran" not in done.stdout.replace("RESUME", "").split()
    done = subprocess.run([*command, "RESUME=1"], cwd=ROOT, capture_output=True, text=True)
    assert "ran text launch/recipes/bootstrap/text.yaml" in done.stdout


def test_rows_stand_beside_their_bars_and_only_a_strict_eval_fails_for_a_missed_one(monkeypatch, capsys):
    rows = [Row("PSNR", 27.5, 27.0), Row("error", 0.3, 0.2, -1), Row("nothing", float("nan"), 0.5), Row("control", 0.1)]
    assert [row.missed() for row in rows] == [False, True, True, False]
    monkeypatch.setattr("vggrpo.bootstrap.evaluation.MEASURES", {"one": lambda assets, seed: rows, "two": None})
    assert main(["bootstrap", "eval", "one", "--seed", "7"]) == 0
    said = capsys.readouterr().out
    assert "seeds from 7" in said
    assert [line.split()[-1] for line in said.splitlines()[2:]] == ["met", "missed", "missed", "0.100"]
    assert main(["bootstrap", "eval", "one", "--seed", "7", "--strict"]) == 1
    monkeypatch.setattr("vggrpo.bootstrap.evaluation.MEASURES", {"one": lambda assets, seed: rows[:1]})
    assert main(["bootstrap", "eval", "--strict"]) == 0


def test_an_unknown_stage_or_a_missing_asset_is_one_line(tmp_path, capsys):
    assert main(["bootstrap", "eval", "vea"]) == 2
    assert "no stage 'vea': choose from" in capsys.readouterr().err
    for stage in MEASURES:
        with pytest.raises(ValueError, match=r"no card\.json in"):
            evaluate([stage], 0, print, tmp_path)


def test_a_measure_reads_the_shipped_asset_on_the_seeds_it_is_given(monkeypatch):
    monkeypatch.setattr("vggrpo.bootstrap.evaluation.draw_captions", lambda seeds: draw_captions(seeds[:48]))
    one, other = (evaluate(["text"], seed, print, ASSETS)["text"] for seed in (10**8, 10**8 + 500))
    assert [row.what for row in one] == [row.what for row in other]
    assert one != other
    assert lines({"text": one})[1].startswith("text ")
