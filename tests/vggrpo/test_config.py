"""A recipe is read strictly; what is wrong is one line that names the file and the key; nothing is computed first."""

import subprocess
import sys
from pathlib import Path

import pytest

from vggrpo import build, cli
from vggrpo.config import GrpoConfig, Recipe
from vggrpo.recipe import load_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "launch/recipes").glob("*.yaml"))


@pytest.fixture
def recipe_file(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_loads_and_says_how_to_run_it(path):
    load_recipe(path)
    header = path.read_text().split("\nmixture:")[0]
    assert f"vggrpo train launch/recipes/{path.name}" in header


def test_an_empty_recipe_is_the_default_and_an_override_wins(recipe_file):
    path = recipe_file("grpo: {beta: 0.5, clip: 1e-3}\n")
    assert load_recipe(recipe_file("")) == Recipe()
    path = recipe_file("grpo: {beta: 0.5, clip: 1e-3}\nsampling: {window: {kind: random, size: 3}}\n")
    recipe = load_recipe(path, ["grpo.beta=1e-2", "grpo.weights={a: 1, b: 2}", "sampling.window.size=4"])
    assert recipe.grpo == GrpoConfig(beta=0.01, clip=0.001, weights={"a": 1.0, "b": 2.0})
    assert (recipe.sampling.window.kind, recipe.sampling.window.size) == ("random", 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grpo: {bta: 1}", "unknown key 'grpo.bta': did you mean 'beta'?"),
        ("gpro: {beta: 1}", "unknown key 'gpro': did you mean 'grpo'?"),
        ("sampling: {window: {sise: 1}}", "unknown key 'sampling.window.sise': did you mean 'size'?"),
        ("grpo: {zzz: 1}", "unknown key 'grpo.zzz': the keys are"),
        ("grpo: {group_size: 4.5}", "grpo.group_size must be int, got 4.5"),
        ("grpo: {beta: high}", "grpo.beta must be float, got 'high'"),
        ("grpo: {beta: true}", "grpo.beta must be float, got True"),
        ("grpo: {ratio: fancy}", "grpo.ratio must be one of plain, norm, got 'fancy'"),
        ("mixture: {prompts: east}", "mixture.prompts must be"),
        ("grpo: 3", "grpo must be a section of keys, got 3"),
        ("[1, 2]", "the recipe must be a section of keys"),
        ("grpo: {beta: [", "is not YAML"),
        ("grpo: {group_size: 1}", "grpo: group_size must be >= 2"),
        ("grpo: {num_updates: 2, accumulate: 2}", "cannot both exceed 1"),
        ("grpo: {clip: 0}", "clip must be > 0"),
        ("sampling: {sde: flow_sdee}", "sampling: unknown sde 'flow_sdee'"),
        ("sampling: {noise: 0}", "noise must be > 0 where steps are trained"),
        ("sampling: {num_steps: 5, window: {size: 5}}", "does not fit"),
        ("sampling: {num_steps: 5, window: {size: 2, stop: 5}}", "last of 5 steps"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(recipe_file, text, message):
    with pytest.raises(ValueError) as error:
        load_recipe(recipe_file(text))
    assert message in str(error.value)
    assert "recipe.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_bad_override_are_refused(recipe_file):
    with pytest.raises(ValueError, match="no recipe at nowhere"):
        load_recipe("nowhere.yaml")
    for override in ("grpo.beta", "=3"):
        with pytest.raises(ValueError, match=r"an override is section\.key=value"):
            load_recipe(recipe_file(""), [override])
    with pytest.raises(ValueError, match=r"with overrides: unknown key 'grpo\.bta'"):
        load_recipe(recipe_file(""), ["grpo.bta=1"])


def test_the_command_checks_trains_and_refuses(capsys, tmp_path):
    recipe = str(ROOT / "launch/recipes/mixture.yaml")
    assert cli.main(["check", recipe]) == 0
    assert "ratio error, step 0" in capsys.readouterr().out
    assert cli.main(["train", recipe, "grpo.num_iterations=2", f"out={tmp_path}"]) == 0
    *each, last = capsys.readouterr().out.splitlines()
    assert len(each) == 2
    assert "iterations/min" in last
    for bad, message in (
        ("grpo.bta=1", "did you mean"),
        ("grpo.group_size=1", "group_size must be >= 2"),
        ("mixture.wanted=up", "no mode 'up'"),
        ("mixture.prompts=[up]", "'up' is no mode"),
        ("sampling.negative_prompt=up", "'up' is no mode"),
    ):
        assert cli.main(["check", recipe, bad]) == 2
        printed = capsys.readouterr()
        assert message in printed.err
        assert len(printed.err.splitlines()) == 1
        assert printed.out == ""


def test_a_failed_check_is_status_1(capsys, monkeypatch):
    monkeypatch.setattr(build, "nearness", lambda mode, z0: z0[..., 0] * 0)
    assert cli.main(["check", str(ROOT / "launch/recipes/mixture.yaml")]) == 1
    assert "PROBLEM: the gradient's norm is 0" in capsys.readouterr().out


def test_the_module_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "vggrpo", "check", "nowhere.yaml"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == "vggrpo: no recipe at nowhere.yaml"
