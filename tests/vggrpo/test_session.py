"""A run that was stopped goes on as if it had not been, to the bit, and its folder says what happened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from vggrpo import cli
from vggrpo.checkpoint import load_checkpoint
from vggrpo.recipe import load_recipe
from vggrpo.signals import Interrupted, Signals

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "launch/recipes/mixture.yaml")
SHORT = ["grpo.num_iterations=6", "checkpoint_every=2", "grpo.group_size=8", "sampling.window.kind=random",
         "sampling.window.size=3"]  # fmt: skip


def train(folder: Path, *more: str) -> int:
    return cli.main(["train", RECIPE, *SHORT, f"out={folder}", *more])


def lines(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def same_end(a: Path, b: Path) -> bool:
    one, other = (load_checkpoint(folder / "checkpoints") for folder in (a, b))
    return all(
        torch.equal(x, other.tensors[file][name])
        for file, tensors in one.tensors.items()
        for name, x in tensors.items()
    )


def told(numbers: dict) -> dict:
    """What does not depend on the clock."""
    return {name: x for name, x in numbers.items() if "second" not in name}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder) == 0
    return folder


def test_a_folder_says_what_was_asked_for_and_what_happened(whole):
    assert [numbers["step"] for numbers in lines(whole)] == list(range(6))
    assert load_recipe(whole / "recipe.yaml") == load_recipe(RECIPE, [*SHORT, f"out={whole}"])
    (start,) = [json.loads(line) for line in (whole / "run.jsonl").read_text().splitlines()]
    assert start["first_iteration"] == 0
    assert start["versions"]["torch"] == torch.__version__
    assert list((whole / "tensorboard").iterdir())
    assert load_checkpoint(whole / "checkpoints").state["iteration"] == 6
    assert len(list((whole / "checkpoints").glob("step-*"))) == 2


def test_a_resumed_run_ends_as_an_unbroken_one_to_the_bit(whole, tmp_path):
    assert train(tmp_path, "grpo.num_iterations=3") == 0
    assert train(tmp_path, "--resume") == 0
    assert same_end(whole, tmp_path)
    assert [told(numbers) for numbers in lines(tmp_path)] == [told(numbers) for numbers in lines(whole)]
    assert train(tmp_path / "other", "grpo.seed=1") == 0
    assert not same_end(whole, tmp_path / "other")  # the control: another seed ends elsewhere


@pytest.mark.parametrize("when", [1, 3, 17, 40])
def test_a_signal_anywhere_leaves_a_run_that_ends_the_same(whole, tmp_path, monkeypatch, when):
    """The signal comes at the n-th forward pass: in a rollout, in a replay, right after an update."""
    polled = 0

    def poll(self):
        nonlocal polled
        polled += 1
        if polled == when:
            raise Interrupted

    monkeypatch.setattr(Signals, "poll", poll)
    assert train(tmp_path) == 143
    monkeypatch.undo()
    begun = load_checkpoint(tmp_path / "checkpoints").state["iteration"]
    assert begun == len(lines(tmp_path)) < 6
    assert train(tmp_path, "--resume") == 0
    assert same_end(whole, tmp_path)
    assert [numbers["step"] for numbers in lines(tmp_path)] == list(range(6))


def test_two_updates_per_rollout_are_never_torn_apart(tmp_path, monkeypatch):
    """The first update of an iteration has been made: the run can be left only after the second."""
    more = ["grpo.num_updates=2", "grpo.clip=0.2"]
    assert train(tmp_path / "whole", *more) == 0
    asked = []
    received = property(lambda self: "SIGTERM" if len(asked) > 30 else None, lambda self, value: None)
    monkeypatch.setattr(Signals, "received", received, raising=False)
    poll = Signals.poll
    monkeypatch.setattr(Signals, "poll", lambda self: (asked.append(1), poll(self)))
    assert train(tmp_path / "cut", *more) == 143
    monkeypatch.undo()
    assert train(tmp_path / "cut", *more, "--resume") == 0
    assert same_end(tmp_path / "whole", tmp_path / "cut")


def test_sigterm_exits_143_with_a_checkpoint_within_seconds(tmp_path):
    command = [sys.executable, "-m", "vggrpo", "train", RECIPE, f"out={tmp_path}", "grpo.num_iterations=100000"]
    run = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert run.stdout is not None
    assert any(line.startswith(b"step 0 ") for line in run.stdout), "an iteration is done; DeepSpeed may talk before"
    run.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    _, said = run.communicate(timeout=60)
    assert run.returncode == 143, said
    assert b"SIGTERM: stopping" in said
    assert time.monotonic() - begin < 30
    assert load_checkpoint(tmp_path / "checkpoints").state["iteration"] == len(lines(tmp_path)) > 0


def test_a_second_signal_leaves_at_once(monkeypatch):
    left, before = [], signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("vggrpo.signals.os._exit", left.append)
    with Signals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received == "SIGINT"
        assert left == []
        with pytest.raises(Interrupted):
            signals.poll()
        signal.raise_signal(signal.SIGTERM)
        assert left == [143]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "holds a run already: --resume it, or give another `out`"),
        (["--resume", "grpo.beta=0.5"], r"made by another recipe (grpo.beta: 0.004 there, 0.5 here): restore it"),
        (
            ["--resume", "--optimizer.lr=1", "grpo.seed=2"],
            "(grpo.seed: 0 there, 2 here; optimizer.lr: 0.003 there, 1.0 here)",
        ),
    ],
)
def test_a_run_is_neither_overwritten_nor_mixed_with_another(whole, capsys, more, message):
    before = (whole / "metrics.jsonl").read_text()
    assert train(whole, *more) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert (whole / "metrics.jsonl").read_text() == before


def test_nothing_to_resume_is_said(tmp_path, capsys):
    assert train(tmp_path, "--resume") == 2
    assert "has no checkpoint to resume: start without --resume" in capsys.readouterr().err


def test_a_recipe_on_disk_is_plain_yaml(whole):
    assert yaml.safe_load((whole / "recipe.yaml").read_text())["grpo"]["group_size"] == 8


def test_a_run_that_takes_too_long_ends_whole_and_can_go_on(whole, tmp_path):
    folder = tmp_path / "short"
    assert train(folder, "max_minutes=1e-6") == 0
    assert len(lines(folder)) == 1, "the iteration under way is finished"
    assert train(folder, "--resume") == 0
    assert same_end(folder, whole)
