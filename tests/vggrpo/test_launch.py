"""A launch is what was asked for, or refused; and what it is changes no result.

Real launches, as they are typed: `vggrpo train --accelerate`, `accelerate launch`, two launchers for two machines.
"""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from tests.vggrpo.test_distributed import spawn
from vggrpo import cli
from vggrpo.checkpoint import load_checkpoint, optimizer_tensors, save_checkpoint, trained_weights
from vggrpo.config import LaunchConfig
from vggrpo.launch import Asked, check, configuration, engine_in, engine_of, launchers, start
from vggrpo.sharded import restore_moments, whole_moments, whole_weights

ROOT = Path(__file__).parents[2]
MIXTURE, TINY = "launch/recipes/mixture.yaml", "launch/recipes/tiny.yaml"
SHORT = ["grpo.num_iterations=3", "grpo.group_size=8", "grpo.num_prompts=2", "sampling.window.size=3",
         "optimizer.lr=0.01", "optimizer.weight_decay=0.1"]  # fmt: skip
SMALL = ["grpo.group_size=4", "grpo.beta=0.1", "grpo.num_iterations=2", "sampling.num_steps=3",
         "sampling.window.size=1", "sampling.window.stop=2", "video.frames=5", "video.height=32",
         "video.width=32", "video.motion_samples=0", "optimizer.lr=1e-3"]  # fmt: skip
# Two processes sum in another order: fp32 rounding, which AdamW's first steps, g / |g|, do not let shrink. Losses are
# differences of numbers near 1; three updates of 0.01 move weights by some 0.03.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-5}
CONFIGS = {"ddp": "ddp", "zero2": "zero2", "zero3": "zero3", "fsdp2": "fsdp2", "multi_node": "ddp"}
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is an extra: pip install 'vggrpo[deepspeed]'"
)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def begin(*words: str) -> subprocess.Popen:
    """A command in a process of its own, without what pytest's own process was launched with."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    env = clean | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(*runs: subprocess.Popen) -> str:
    """What they said; all of them must have succeeded."""
    said = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0] * len(runs), "\n".join(said)
    return "\n".join(said)


def train(out: Path, *more: str) -> subprocess.Popen:
    return begin("-m", "vggrpo", "train", MIXTURE, *SHORT, f"out={out}", *more)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(folder: Path, other: Path, rtol: float = TOLERANCE["rtol"], strays: float = 0.0) -> None:
    """Losses, rewards and gradients of every iteration; trained weights and moments within 1 %, but for some strays."""
    ours, theirs = lines(folder), lines(other)
    assert len(ours) == len(theirs) > 1
    for one, two in zip(ours, theirs, strict=True):
        for name in one:
            if "second" not in name:
                assert one[name] == pytest.approx(two[name], rel=rtol, abs=TOLERANCE["atol"]), name
    a, b = (load_checkpoint(each / "checkpoints").tensors for each in (folder, other))
    assert {file: set(tensors) for file, tensors in a.items()} == {file: set(tensors) for file, tensors in b.items()}
    for file, tensors in a.items():
        for name, value in tensors.items():
            close = torch.isclose(value, b[file][name], rtol=1e-2, atol=1e-5)
            assert (~close).double().mean() <= strays, name


def started(folder: Path) -> tuple[int, str]:
    first = json.loads((folder / "run.jsonl").read_text().splitlines()[0])
    return first["num_processes"], first["engine"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    patch = pytest.MonkeyPatch()
    patch.chdir(ROOT)
    assert cli.main(["train", MIXTURE, *SHORT, f"out={folder}"]) == 0
    patch.undo()
    assert started(folder) == (1, "single")
    return folder


def test_two_processes_by_the_shorthand_train_as_one_does(alone, tmp_path):
    ended(train(tmp_path, "--accelerate", "ddp", "--main_process_port", port()))
    assert started(tmp_path) == (2, "ddp")
    assert_same_run(tmp_path, alone)
    recipe = (tmp_path / "recipe.yaml").read_text()
    assert "num_processes: 2" in recipe  # what was asked for is on record
    another = [dict(one, loss=one["loss"] + 1e-3) for one in lines(alone)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(one) for one in another))
    with pytest.raises(AssertionError):  # the control: other losses are told apart
        assert_same_run(tmp_path, alone)


@pytest.mark.slow
def test_two_machines_train_as_one_process_does(alone, tmp_path):
    """Two launchers on this machine, each with its own rank, stand in for two machines."""
    where = ["--accelerate", "multi_node", "--main_process_port", port()]
    ended(*(train(tmp_path, *where, "--machine_rank", str(rank)) for rank in range(2)))
    assert started(tmp_path) == (2, "ddp")
    assert_same_run(tmp_path, alone)


@pytest.fixture(scope="module", params=["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def unbroken(request, tmp_path_factory):
    """A run under DeepSpeed, and its engine."""
    folder = tmp_path_factory.mktemp(request.param)
    ended(train(folder, "--accelerate", request.param, "--main_process_port", port()))
    assert started(folder) == (2, request.param)
    return folder, request.param


@needs_deepspeed
def test_deepspeed_trains_as_one_process_does(alone, unbroken):
    assert_same_run(unbroken[0], alone)


def equal_bits(folder: Path, other: Path) -> bool:
    """Whether weights and moments of the newest checkpoints are the same."""
    a, b = (load_checkpoint(each / "checkpoints").tensors for each in (folder, other))
    assert {file: set(tensors) for file, tensors in a.items()} == {file: set(tensors) for file, tensors in b.items()}
    return all(torch.equal(value, b[file][name]) for file, tensors in a.items() for name, value in tensors.items())


@needs_deepspeed
def test_a_resumed_run_under_deepspeed_ends_as_an_unbroken_one_to_the_bit(alone, unbroken, tmp_path):
    """And so does one that goes on in one process, as far as one process and two are the same."""
    whole, name = unbroken
    cut, here, bare = (tmp_path / place for place in ("cut", "here", "bare"))
    engine = ("--accelerate", name, "--main_process_port")
    ended(train(cut, "grpo.num_iterations=2", *engine, port()))
    for place in (here, bare):
        shutil.copytree(cut, place)
    left = load_checkpoint(cut / "checkpoints")
    assert {float(x) for name, x in left.tensors["optimizer"].items() if name.startswith("step.")} == {2}
    ended(train(cut, "--resume", *engine, port()))
    assert equal_bits(cut, whole)
    assert [one["loss"] for one in lines(cut)] == [one["loss"] for one in lines(whole)]
    assert cli.main(["train", MIXTURE, *SHORT, f"out={here}", "--resume"]) == 0
    assert_same_run(here, alone)
    # The control: the same, without the moments.
    save_checkpoint(bare / "checkpoints", 2, replace(left, tensors=left.tensors | {"optimizer": {}}))
    ended(train(bare, "--resume", *engine, port()))
    assert not equal_bits(bare, whole)
    with pytest.raises(AssertionError):
        assert_same_run(bare, alone)


@pytest.mark.slow
@needs_deepspeed
def test_a_run_of_one_process_goes_on_under_deepspeed(alone, unbroken, tmp_path):
    assert cli.main(["train", MIXTURE, *SHORT, f"out={tmp_path}", "grpo.num_iterations=2"]) == 0
    ended(train(tmp_path, "--resume", "--accelerate", unbroken[1], "--main_process_port", port()))
    assert_same_run(tmp_path, alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", pytest.param("zero2", marks=needs_deepspeed)])
def test_two_processes_train_a_published_model_s_stand_in(tmp_path, name):
    """In bf16, with one noise per group; one of them encodes the prompts, and the other finds them."""
    more = ["--accelerate", name, "--main_process_port", port(), f"video.prompt_cache={tmp_path / 'prompts'}"]
    recipe, out = "launch/recipes/wan21_1b_fast.yaml", tmp_path / "run"
    said = ended(begin("-m", "vggrpo", "train", recipe, "--tiny-random", f"out={out}", *more))
    assert said.count("Loading weights: 100%") == 1  # of the text encoder, by one process
    assert started(out) == (2, name)
    assert all(0 < one["grad_norm"] < float("inf") for one in lines(out))
    assert lines(out)[1]["kl"] > 0
    assert (out / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", pytest.param("zero2", marks=needs_deepspeed)])
def test_two_processes_train_the_video_model_as_one_does(tmp_path, name):
    assert cli.main(["train", TINY, *SMALL, f"out={tmp_path / 'alone'}"]) == 0
    more = ["--accelerate", name, "--main_process_port", port()]
    ended(begin("-m", "vggrpo", "train", TINY, *SMALL, f"out={tmp_path / 'two'}", *more))
    assert started(tmp_path / "two") == (2, name)
    # Rewards see a cloud rendered into pixels, which rounding moves by steps. Of a weight whose gradient is all but 0,
    # AdamW's first steps follow the sign: one in a hundred may go elsewhere.
    assert_same_run(tmp_path / "two", tmp_path / "alone", rtol=5e-3, strays=1e-2)


def test_a_launcher_that_silently_starts_one_process_is_refused(tmp_path):
    """What accelerate 1.15 does with --cpu, whatever --num_processes says."""
    words = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "vggrpo", "train", MIXTURE]
    run = begin(*words, *SHORT, f"out={tmp_path / 'run'}")
    said, _ = run.communicate(timeout=300)
    assert run.returncode != 0
    (ours,) = [line for line in said.splitlines() if line.startswith("vggrpo: ")]
    assert "accelerate launch asks for 2 process(es), and 1 run(s): start it with" in ours
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["launch.num_processes=2"], "the recipe's `launch` asks for 2 process(es), and 1 run(s)"),
        (["launch.engine=zero2"], "the recipe's `launch` asks for zero2, and single runs"),
        (["launch.engine=zero4"], "launch.engine must be one of single, ddp, zero1, zero2, zero3, fsdp2, got 'zero4'"),
        (["launch.num_processes=0"], "num_processes must be >= 1, got 0"),
        (["--accelerate", "ddp", "--num_processes", "3"], "cannot be shared by 3 ranks"),
        (["--accelerate", "ddp", "--num_processes", "two"], "num_processes must be a number >= 1, got 'two'"),
        (["--accelerate", "zero4"], "no launch configuration at launch/accelerate/zero4.yaml: give a path, or one of"),
        (["--accelerate", "README.yaml"], "no launch configuration at README.yaml"),
        (["--accelerate", TINY], "has no distributed_type"),
        (["--machine_rank", "1"], "--machine_rank is for accelerate: give --accelerate NAME with it"),
    ],
)
def test_a_launch_that_cannot_be_is_one_line(more, message, tmp_path, capsys):
    assert cli.main(["train", MIXTURE, *SHORT, f"out={tmp_path / 'run'}", *more]) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("vggrpo: ")
    assert message in said
    assert not (tmp_path / "run").exists()


def fake(kind: DistributedType, num: int = 2, **state: object) -> SimpleNamespace:
    return SimpleNamespace(distributed_type=kind, num_processes=num, state=SimpleNamespace(**state))


def test_engines_are_told_apart(as_users_run):
    assert engine_of(fake(DistributedType.NO, 1)) == engine_of(fake(DistributedType.MULTI_CPU, 1)) == "single"
    assert engine_of(fake(DistributedType.MULTI_CPU)) == engine_of(fake(DistributedType.MULTI_GPU)) == "ddp"
    assert engine_of(fake(DistributedType.DEEPSPEED, deepspeed_plugin=SimpleNamespace(zero_stage=3))) == "zero3"
    assert engine_of(fake(DistributedType.FSDP, fsdp_plugin=SimpleNamespace(fsdp_version=2))) == "fsdp2"


def test_plain_ddp_in_place_of_what_was_asked_for_is_refused(as_users_run, monkeypatch):
    """As accelerate does on a CPU with DeepSpeed and FSDP."""
    for engine in ("zero", "fsdp2"):
        with pytest.raises(ValueError, match=rf"somebody asks for {engine}, and ddp runs: start it with"):
            check(fake(DistributedType.MULTI_CPU), [Asked(2, engine, "somebody")])
    check(fake(DistributedType.MULTI_CPU), [Asked(2, "ddp", "somebody"), Asked(None, None, "nobody")])
    accelerator = start(LaunchConfig(), cpu=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"the launcher's environment asks for fsdp, and single runs"):
        check(accelerator, launchers())


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_deepspeed_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match=r"DeepSpeed, which is not installed: pip install 'vggrpo\[deepspeed\]'"):
        start(LaunchConfig())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_shipped_configuration_is_one_for_accelerate(name):
    """accelerate refuses keys that it does not know; the engine is what the file's name says."""
    path, settings = configuration(name)
    config = load_config_from_file(str(path))
    assert config.num_processes == settings["num_processes"] == 2
    assert engine_in(settings) == CONFIGS[name]
    assert name in path.read_text()
    if name.startswith("zero"):
        file = json.loads((ROOT / config.deepspeed_config["deepspeed_config_file"]).read_text())
        assert file["zero_optimization"]["stage"] == int(name[-1])
        assert file["gradient_accumulation_steps"] == 1  # Run counts its own micro-batches


def test_fsdp2_cuts_what_its_configuration_names():
    from diffusers import WanTransformer3DModel

    wanted = configuration("fsdp2")[1]["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"]
    assert wanted in WanTransformer3DModel._no_split_modules


def cut_up(accelerator, path: str) -> None:
    """Two updates of a small network in halves; its weights and moments, put together, and again after a restart."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def made(whole: bool) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        network = torch.nn.Linear(6, 4)
        if not whole:
            fully_shard(network, mesh=init_device_mesh("cpu", (2,)))
        return network, torch.optim.AdamW(network.parameters(), lr=0.1)

    def update(network, optimizer) -> None:
        network(torch.arange(12.0).reshape(2, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    whole, halves = made(True), made(False)
    for _ in range(2):
        update(*whole)
        update(*halves)
    restarted = made(False)
    moments = whole_moments(*halves, "fsdp2")
    restore_moments(*restarted, moments, "fsdp2")
    again = whole_moments(*restarted, "fsdp2")
    torch.save(
        {
            "expected": (trained_weights(whole[0]), optimizer_tensors(*whole)),
            "found": (whole_weights(halves[0], "fsdp2"), moments),
            "again": again,
            "cut": [tuple(p.to_local().shape) for p in halves[0].parameters()],
            "kinds": [type(x).__name__ for x in restarted[1].state[restarted[0].weight].values()],
        },
        f"{path}.{accelerator.process_index}",
    )


def test_what_fsdp2_cuts_up_is_whole_in_a_checkpoint(tmp_path):
    """On torch's own fully_shard, which runs on a CPU; accelerate's FSDP does not."""
    spawn(cut_up, 2, str(tmp_path / "out"))
    for rank in range(2):
        told = torch.load(tmp_path / f"out.{rank}")
        assert told["cut"] == [(2, 6), (2,)]
        for found, expected in zip(told["found"], told["expected"], strict=True):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, msg=name)
        for name, value in told["found"][1].items():
            assert torch.equal(told["again"][name], value)
        assert sorted(told["kinds"]) == ["DTensor", "DTensor", "Tensor"]


def test_weights_that_were_updated_unequally_often_are_not_resumed_under_deepspeed():
    network = torch.nn.Linear(1, 1)
    moments = {f"{key}.{name}": torch.zeros(1) for key in ("exp_avg", "exp_avg_sq") for name in ("weight", "bias")}
    steps = {"step.weight": torch.tensor(2.0), "step.bias": torch.tensor(3.0)}
    with pytest.raises(ValueError, match=r"not all updated equally often, and zero2 counts .* resume it under ddp"):
        restore_moments(network, torch.optim.AdamW(network.parameters()), moments | steps, "zero2")
