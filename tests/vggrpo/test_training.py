"""What a run keeps beside its weights: an average, numbers for trackers, a line that says how far it is."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from tests.vggrpo.test_session import RECIPE, SHORT, lines, same_end, train
from vggrpo import cli
from vggrpo.average import follow, start_average
from vggrpo.build import build
from vggrpo.checkpoint import load_checkpoint, trained_weights
from vggrpo.progress import bar, shares
from vggrpo.recipe import load_recipe
from vggrpo.signals import Interrupted, Signals

AVERAGED = "optimizer.ema=0.6"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("averaged")
    assert train(folder, AVERAGED, "checkpoint_every=1", "keep=9") == 0
    return folder


def test_the_average_is_that_of_the_weights_after_every_iteration(whole):
    average = start_average(trained_weights(build(load_recipe(RECIPE, SHORT), Accelerator(cpu=True)).network))
    for number in range(1, 7):
        (whole / "checkpoints/latest").write_text(f"step-{number:06d}\n")
        tensors = load_checkpoint(whole / "checkpoints").tensors
        follow(average, tensors["weights"], 0.6)
        assert tensors["average"].keys() == average.keys()
        for name, value in average.items():
            assert torch.equal(tensors["average"][name], value), (number, name)
    assert not torch.equal(average["head.weight"], tensors["weights"]["head.weight"])


def test_a_resumed_run_has_the_average_of_an_unbroken_one_to_the_bit(whole, tmp_path):
    assert train(tmp_path, AVERAGED, "grpo.num_iterations=3") == 0
    assert train(tmp_path, AVERAGED, "--resume") == 0
    assert "average" in load_checkpoint(tmp_path / "checkpoints").tensors
    assert same_end(whole, tmp_path)


def test_a_signal_leaves_the_average_of_whole_iterations(whole, tmp_path, monkeypatch):
    polled: list[int] = []

    def poll(self):
        polled.append(1)
        if len(polled) == 60:
            raise Interrupted

    monkeypatch.setattr(Signals, "poll", poll)
    assert train(tmp_path, AVERAGED) == 143
    monkeypatch.undo()
    assert 0 < len(lines(tmp_path)) < 6
    assert train(tmp_path, AVERAGED, "--resume") == 0
    assert same_end(whole, tmp_path)


def test_an_average_is_not_begun_in_the_middle(whole, capsys):
    assert train(whole, "--resume") == 2
    assert "optimizer.ema: 0.6 there, None here" in capsys.readouterr().err


def test_a_checkpoint_from_before_a_key_existed_can_be_resumed(tmp_path, capsys):
    """The key has its default there; if it differs here, that is said."""
    import hashlib
    import json

    assert train(tmp_path, "grpo.num_iterations=2") == 0
    folder = tmp_path / "checkpoints" / (tmp_path / "checkpoints/latest").read_text().strip()
    state = json.loads((folder / "state.json").read_text())
    del state["recipe"]["launch"], state["recipe"]["optimizer"]["ema"]
    (folder / "state.json").write_text(json.dumps(state))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["state.json"] = hashlib.sha256((folder / "state.json").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert train(tmp_path, AVERAGED, "--resume") == 2
    assert "optimizer.ema: None there, 0.6 here" in capsys.readouterr().err
    assert train(tmp_path, "--resume") == 0


def test_the_line_and_the_last_line_say_where_time_goes(whole, tmp_path, capsys):
    seconds = [{"seconds/rollout": 9.0, "seconds/update": 9.0}, *[{"seconds/rollout": 1.5, "seconds/update": 0.5}] * 3]
    assert shares(seconds) == "30.0 iterations/min  rollout 75 %  update 25 %"
    said = bar(4, 16, seconds, {"reward/near/mean": 0.5, "reward/near/std": 0.1, "loss": 3.0})
    assert said == "[#####               ] 4/16  2.00 s  0 min left  near 0.5"
    assert train(tmp_path) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "iterations/min  rollout" in last
    assert last.count("%") == 4


def test_trackers_hear_every_number(tmp_path, monkeypatch):
    heard: list[tuple] = []
    run = SimpleNamespace(
        log=lambda values, step, **_: heard.append((step, values)), finish=lambda: heard.append(("finish",))
    )
    wandb = ModuleType("wandb")
    wandb.__spec__ = ModuleSpec("wandb", None)
    wandb.init = lambda **kwargs: (heard.append(("init", kwargs)), run)[1]
    wandb.config = SimpleNamespace(update=lambda values, **_: heard.append(("config", values)))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert train(tmp_path / "mine", "trackers=[wandb]", "grpo.num_iterations=2") == 0
    assert heard[0] == ("init", {"project": "vggrpo", "name": "mine"})
    assert heard[1][1]["grpo"]["group_size"] == 8
    assert heard[-1] == ("finish",)
    assert [step for step, _ in heard[2:-1]] == [0, 1]
    assert heard[2][1] == lines(tmp_path / "mine")[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trackers=[trackio]"], "trackers: trackio is not installed: pip install trackio, or leave it out"),
        (["trackers=[wandbb]"], "trackers must be one of wandb, trackio, got 'wandbb'"),
        (["optimizer.ema=1"], "ema must be in (0, 1), got 1.0"),
    ],
)
def test_what_cannot_be_is_one_line(words, message, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trackio" else find(name))
    assert cli.main(["train", RECIPE, *SHORT, *words, f"out={tmp_path / 'run'}"]) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert message in said
    assert not Path(tmp_path / "run").exists()
