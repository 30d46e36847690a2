"""A checkpoint is whole or not there, and what is read back is what was written."""

import errno
import json

import pytest
import torch

from vggrpo import checkpoint
from vggrpo.checkpoint import (
    Checkpoint,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    restore_weights,
    save_checkpoint,
    trained_weights,
)


def some(step: int) -> Checkpoint:
    rng = torch.Generator().manual_seed(step)
    return Checkpoint(
        {"iteration": step, "recipe": {"seed": 3}},
        {"weights": {"a.b": torch.randn(3, 2, generator=rng)}, "optimizer": {"step.a.b": torch.tensor(float(step))}},
    )


def same(a: Checkpoint, b: Checkpoint) -> bool:
    return a.state == b.state and all(
        torch.equal(x, b.tensors[file][name]) for file, tensors in a.tensors.items() for name, x in tensors.items()
    )


def test_what_was_written_comes_back_and_old_ones_go(tmp_path):
    assert load_checkpoint(tmp_path) is None
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, some(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000002", "step-000003"]
    found = load_checkpoint(tmp_path)
    assert same(found, some(3))
    assert not same(found, some(2))


@pytest.mark.parametrize("file", ["weights.safetensors", "state.json", "optimizer.safetensors"])
def test_damage_is_one_line_that_names_the_one_before(tmp_path, file):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, some(step))
    path = tmp_path / "step-000002" / file
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"damaged \({file} is not what was written\): write step-000001 into"
    ) as error:
        load_checkpoint(tmp_path)
    assert "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(tmp_path)
    (tmp_path / "latest").write_text("step-000001\n")
    assert same(load_checkpoint(tmp_path), some(1))


@pytest.mark.parametrize("name", ["step-000009", "../elsewhere", ""])
def test_a_pointer_that_leads_nowhere_is_refused(tmp_path, name):
    save_checkpoint(tmp_path / "run", 1, some(1))
    (tmp_path / "run" / "latest").write_text(name)
    with pytest.raises(ValueError, match="which is no checkpoint: write step-000001"):
        load_checkpoint(tmp_path / "run")


@pytest.mark.parametrize("when", ["save_file", "_write", "_sync"])
def test_a_full_disk_leaves_the_one_before_as_it_was(tmp_path, monkeypatch, when):
    save_checkpoint(tmp_path, 1, some(1))

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, when, full)
    with pytest.raises(
        OSError, match=r"cannot write .*step-000002 \(.*No space left.*\): those before it are untouched"
    ):
        save_checkpoint(tmp_path, 2, some(2), keep=1)
    monkeypatch.undo()
    assert same(load_checkpoint(tmp_path), some(1))
    assert [path.name for path in tmp_path.glob("*unfinished*")] == []


def test_a_kill_before_the_move_leaves_the_one_before_and_is_cleaned_up(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, some(1))

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, some(2))
    monkeypatch.undo()
    assert same(load_checkpoint(tmp_path), some(1))
    save_checkpoint(tmp_path, 2, some(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000001", "step-000002"]


def test_files_are_no_pickles(tmp_path):
    folder = save_checkpoint(tmp_path, 1, some(1))
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".json", ".safetensors", ".safetensors"]
    assert set(json.loads((folder / "manifest.json").read_text())) == {
        "optimizer.safetensors", "state.json", "weights.safetensors",
    }  # fmt: skip


def test_an_optimiser_goes_on_as_if_nothing_had_happened():
    def steps(network, optimizer, seeds):
        for seed in seeds:
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            network(x).square().sum().backward()
            optimizer.step()

    def made(seed):
        torch.manual_seed(seed)
        network = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1))
        network[0].bias.requires_grad_(False)
        return network, torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=0.1)

    network, optimizer = made(0)
    steps(network, optimizer, range(3))
    other, fresh = made(0)
    restore_weights(other, trained_weights(network))
    restore_optimizer(other, fresh, optimizer_tensors(network, optimizer))
    steps(network, optimizer, range(3, 6))
    steps(other, fresh, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
    forgetful, empty = made(0)
    restore_weights(forgetful, trained_weights(other))
    steps(other, fresh, [9])
    steps(forgetful, empty, [9])
    assert not torch.equal(forgetful[0].weight, other[0].weight)  # the control: without moments it goes elsewhere


def test_another_network_is_refused():
    small, large = torch.nn.Linear(3, 5), torch.nn.Linear(4, 5)
    with pytest.raises(ValueError, match=r"another network: weight is \(5, 3\) there, \(5, 4\) here"):
        restore_weights(large, trained_weights(small))
    with pytest.raises(ValueError, match="moments of other"):
        restore_optimizer(small, torch.optim.AdamW(small.parameters()), {"exp_avg.other": torch.zeros(1)})
