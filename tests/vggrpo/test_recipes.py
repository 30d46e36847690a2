"""Recipes of the published models run end to end with narrow stand-ins, and their headers say what the commands say."""

import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file

from vggrpo import cli, tiny_random
from vggrpo.checkpoint import load_checkpoint
from vggrpo.data import read_prompts
from vggrpo.launch import command, configuration, num_processes
from vggrpo.policy.published import PUBLISHED, find
from vggrpo.policy.wan import WanVelocity, latent_shape, latents_of
from vggrpo.policy.wan_folder import read_layout
from vggrpo.recipe import load_recipe
from vggrpo.runtime import share_of

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.relative_to(ROOT) for path in (ROOT / "launch/recipes").glob("wan2*.yaml"))
FAST = "launch/recipes/wan21_1b_fast.yaml"


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Where they are built, once."""
    return tmp_path_factory.mktemp("tiny-random")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch, stand_ins):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(tiny_random, "FOLDER", stand_ins)


def run(recipe: Path | str, out: Path, *more: str) -> int:
    cache = out.with_name("prompts")
    return cli.main(["train", str(recipe), "--tiny-random", f"out={out}", f"video.prompt_cache={cache}", *more])


def test_there_are_four_of_them():
    assert [path.stem for path in RECIPES] == ["wan21_1b_fast", "wan21_1b_one_gpu", "wan21_1b_paper", "wan22_5b"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_and_its_lora_loads_and_tells(recipe, tmp_path, stand_ins):
    out = tmp_path / "run"
    assert run(recipe, out) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for numbers in lines:
        assert 0 < numbers["grad_norm"] < float("inf")
        assert numbers["advantage/std"] > 0
        assert numbers["reward/motion_smoothness/nan"] == 0
    assert lines[0]["ratio/max"] == 1
    assert lines[1]["kl"] > 0
    found = load_checkpoint(out / "checkpoints")
    assert found is not None
    assert found.state["iteration"] == 2
    asked, made = load_recipe(recipe), load_recipe(out / "recipe.yaml")
    assert made.sampling == asked.sampling
    assert made.optimizer == asked.optimizer
    narrow = {key: getattr(made.grpo, key) for key in tiny_random.SMALL}
    assert made.grpo == replace(asked.grpo, **narrow)
    assert (made.video.dtype, made.video.lora, made.video.reward_form) == (
        "bfloat16",
        asked.video.lora,
        asked.video.reward_form,
    )
    # The LoRA goes to a folder of the hub's layout, is found there, at its scale, and changes what is said.
    folder = stand_ins / Path(asked.video.model).name / "wan"
    pipe = WanPipeline.from_pretrained(folder)
    latent = torch.randn(1, *latent_shape(folder, 9, 32, 64), generator=torch.Generator().manual_seed(0))
    told = (latent, torch.tensor([0.5]), torch.randn(1, 16, 12, generator=torch.Generator().manual_seed(1)))
    velocity = WanVelocity(pipe.transformer, per_token=read_layout(folder).per_token)
    with torch.no_grad():
        base = velocity(*told)
        pipe.load_lora_weights(out)
        tuned = velocity(*told)
    assert pipe.transformer.blocks[0].attn1.to_q.scaling == {"default_0": made.video.lora.alpha / made.video.lora.rank}
    assert not torch.equal(tuned, base)
    torch.testing.assert_close(tuned, base, atol=0.1, rtol=0)


def test_a_run_with_stand_ins_is_resumed_and_sampled_from(tmp_path, stand_ins):
    out = tmp_path / "run"
    recipe = "launch/recipes/wan22_5b.yaml"
    assert run(recipe, out, "grpo.num_iterations=1", "video.motion_samples=0") == 0
    assert run(recipe, out, "grpo.num_iterations=2", "video.motion_samples=0", "--resume") == 0
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    folder = stand_ins / "Wan2.2-TI2V-5B-Diffusers"
    by_hand = {
        "model": folder / "wan", "geometry": folder / "geometry", "lgm": folder / "lgm", "frames": 9, "height": 32,
        "width": 64, "max-len": 16,
    }  # fmt: skip
    z0 = sampled(tmp_path, lora=out, **by_hand)
    # The words for the whole model, with stand-ins: the same, and not without the LoRA.
    whole = {"model": f"elsewhere/{folder.name}", "frames": 121, "height": 704, "width": 1280, "max-len": 512}
    assert torch.equal(sampled(tmp_path, "--tiny-random", lora=out, **whole), z0)
    assert not torch.equal(sampled(tmp_path, "--tiny-random", **whole), z0)


def sampled(tmp_path: Path, *flags: str, **told: object) -> torch.Tensor:
    """Latents of one video."""
    (tmp_path / "prompts.txt").write_text("a walk through a garden\n")
    told |= {"prompts": tmp_path / "prompts.txt", "out": tmp_path / "samples", "num-steps": 3}
    told |= {"prompt-cache": tmp_path / "prompts"}
    shutil.rmtree(tmp_path / "samples", ignore_errors=True)
    words = [word for key, value in told.items() for word in (f"--{key}", str(value))]
    assert cli.main(["sample", *words, *flags]) == 0
    assert (tmp_path / "samples/000.mp4").is_file()
    return load_file(tmp_path / "samples/000.safetensors")["z0"]


@pytest.mark.parametrize("name", ["Wan2.1-T2V-1.3B-Diffusers", "Wan2.2-T2V-A14B-Diffusers"])
def test_samples_of_a_published_model_that_is_not_here_are_made_by_stand_ins(name, tmp_path):
    z0 = sampled(tmp_path, "--tiny-random", model=f"Wan-AI/{name}", frames=81, height=480, width=832)
    assert z0.shape == (16, 3, 4, 8)
    assert z0.isfinite().all()


KNOWN = {
    "Wan2.1-T2V-1.3B-Diffusers": 1.42, "Wan2.1-T2V-14B-Diffusers": 14.29, "Wan2.1-I2V-14B-480P-Diffusers": 16.39,
    "Wan2.1-I2V-14B-720P-Diffusers": 16.39, "Wan2.2-TI2V-5B-Diffusers": 5.00, "Wan2.2-T2V-A14B-Diffusers": 14.29,
    "Wan2.2-I2V-A14B-Diffusers": 14.29,
}  # fmt: skip
"""Billions of parameters of a transformer, as the hub counts them."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A first frame for each of the fast recipe's prompts."""
    folder = tmp_path_factory.mktemp("pictures")
    for n in range(len(read_prompts(str(ROOT / load_recipe(ROOT / FAST).video.prompts)))):
        Image.new("RGB", (128, 64), (8 * n % 256, 100, 200)).save(folder / f"{n:03d}.png")
    return folder


def asking(name: str, pictures: Path) -> list[str]:
    """What a recipe says of a model of this name: what it cannot go without."""
    layout = PUBLISHED[name].layout
    given = [f"video.first_frames={pictures}", "video.motion_samples=0"] if layout.way == "channels" else []
    sides = ["video.lora_on=both"] if layout.boundary is not None else []
    return [f"video.model=somewhere/{name}", *given, *sides]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_stand_in_has_the_layout_of_what_it_stands_for(name, pictures):
    published = PUBLISHED[name]
    recipe = load_recipe(FAST, asking(name, pictures))
    settings = dict(word.split("=", 1) for word in tiny_random.stand_in(recipe, FAST))
    folder = Path(settings["video.model"])
    assert read_layout(folder) == published.layout
    size = (9, 32, 64)
    assert latent_shape(folder, *size) == latents_of(published.vae, name, *size)
    built = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert tiny_random.stand_in(recipe, FAST) == [f"{key}={value}" for key, value in settings.items()]
    assert {path: path.stat().st_mtime_ns for path in built} == built  # it is built once


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_plan_counts_the_parameters_of_a_published_model_that_is_not_here(name, pictures, capsys):
    published = PUBLISHED[name]
    with torch.device("meta"):
        whole = WanTransformer3DModel(**published.transformer)
        AutoencoderKLWan(
            **published.vae, latents_mean=[0.0] * published.vae["z_dim"], latents_std=[1.0] * published.vae["z_dim"]
        )
    number = sum(p.numel() for p in whole.parameters())
    assert round(number / 1e9, 2) == KNOWN[name]
    assert cli.main(["plan", FAST, "--no-step", "--rate", "400", *asking(name, pictures)]) == 0
    said = capsys.readouterr().out
    two = published.boundary is not None
    assert f": {'2 x ' if two else ''}{number:,} parameters" in said
    assert (f"ask the one from {published.boundary or 0:g} on" in said) == two
    assert ("257 tokens of what CLIP sees" in said) == published.sight
    frame = 20 * 21 * 60 * 104  # a mask of 4 channels, and 16 of latents
    assert (f"first frame  {frame:,} numbers" in said) == published.channels


def test_a_plan_of_a_published_model_refuses_what_its_folder_would(pictures, capsys):
    for name, left_out, message in (
        (
            "Wan2.1-I2V-14B-480P-Diffusers",
            "video.first_frames",
            "makes videos of a first frame: set video.first_frames",
        ),
        ("Wan2.2-T2V-A14B-Diffusers", "video.lora_on", "of the boundary 0.875: set video.lora_on=both"),
    ):
        words = [word for word in asking(name, pictures) if not word.startswith(left_out)]
        assert cli.main(["plan", FAST, "--no-step", "--rate", "400", *words]) == 2
        (said,) = capsys.readouterr().err.strip().splitlines()
        assert message in said


@pytest.mark.parametrize(
    "name", ["Wan2.1-I2V-14B-480P-Diffusers", "Wan2.2-T2V-A14B-Diffusers", "Wan2.2-I2V-A14B-Diffusers"]
)
def test_a_plan_makes_a_step_with_stand_ins_of_first_frames_and_of_two_transformers(name, pictures, capsys, tmp_path):
    more = ["video.motion_samples=0", f"video.prompt_cache={tmp_path}"]
    assert cli.main(["plan", FAST, "--tiny-random", *asking(name, pictures), *more]) == 0
    said = capsys.readouterr().out
    assert "9x32x64, latents 16x3x4x8: 24 tokens" in said
    assert re.search(r"measured +ratio error, step 1 +0.0e\+00", said)
    assert "PROBLEM" not in said


def test_what_has_no_stand_in_is_refused_in_one_line(capsys, tmp_path):
    prompts = ["--prompts", "assets/prompts/held_out.txt", "--out", str(tmp_path / "out")]
    assert cli.main(["sample", *prompts, "--tiny-random"]) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert "and this is of assets/tiny-wan: name the folder as the hub does" in said
    assert not (tmp_path / "out").exists()
    for recipe, what in (("launch/recipes/tiny.yaml", "assets/tiny-wan"), ("launch/recipes/mixture.yaml", "no video")):
        assert cli.main(["train", recipe, "--tiny-random"]) == 2
        (said,) = capsys.readouterr().err.strip().splitlines()
        assert said.startswith("vggrpo: --tiny-random stands in for Wan2.1-T2V-1.3B-Diffusers, ")
        assert what in said


def test_a_plan_makes_a_step_with_stand_ins(capsys, tmp_path):
    assert cli.main(["plan", FAST, "--tiny-random", "video.motion_samples=0", f"video.prompt_cache={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "9x32x64, latents 16x3x4x8: 24 tokens" in said
    assert re.search(r"measured +ratio error, step 1 +0.0e\+00", said)
    assert "PROBLEM" not in said


@pytest.mark.parametrize("rate", ["0", "-1", "nan"])
def test_a_rate_that_cannot_be_is_refused_in_one_line(rate, capsys):
    assert cli.main(["plan", FAST, "--no-step", f"--rate={rate}"]) == 2
    assert "vggrpo: --rate must be > 0" in capsys.readouterr().err


def test_a_model_that_is_not_here_is_planned_by_its_name_alone(capsys):
    assert cli.main(["plan", FAST, "--no-step", "video.model=models/Wan3"]) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert "models/Wan3" in said
    assert cli.main(["plan", FAST, "--rate", "400"]) == 2  # the plan is printed, but there is nothing to step with
    assert "there is no folder models/Wan2.1-T2V-1.3B-Diffusers" in capsys.readouterr().err


def header(recipe: Path) -> str:
    """A recipe's comments, with lines that were broken put together."""
    lines = (line[1:].strip() for line in recipe.read_text().splitlines() if line.startswith("#"))
    return re.sub(r" \\\n", " ", "\n".join(lines))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_header_says_what_plan_says(recipe, capsys):
    text = header(recipe)
    (words,) = re.findall(r"^vggrpo (plan .*)$", text, re.M)
    assert cli.main(shlex.split(words)) == 0
    said = capsys.readouterr().out
    (memory,) = re.findall(r"memory +(\S+) MiB", said)
    seconds, rate, hours = re.findall(
        r"time +(\S+) s an iteration.*\((\S+) T operations/s, as assumed\); (\S+) h", said
    )[0]
    assert f"says {memory} MiB at an update's peak and {seconds} s an iteration, {hours} h in all" in text
    assert f"{rate} T operations/s" in text
    assert "assumed, not measured" in text
    (number,) = {*re.findall(r"launch.num_processes=(\d+)", words)} or {"1"}
    if number != "1":
        assert f"{float(hours) * int(number):,.0f} GPU-hours" in text


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_header_has_a_launch_for_every_engine_that_can_be_shared(recipe):
    text, asked = header(recipe), load_recipe(recipe)
    lines = re.findall(rf"^vggrpo train {recipe} --accelerate (\S+) (.*)$", text, re.M)
    assert [name for name, _ in lines] == ["ddp", "zero2", "fsdp2"]
    for name, flags in lines:
        number = num_processes(configuration(name)[1], flags.split())
        share_of(0, number, asked.grpo.num_prompts, asked.grpo.group_size)
        assert command(name, ["train", str(recipe)], flags.split())[-2:] == [
            f"launch.num_processes={number}", f"launch.engine={name}",
        ]  # fmt: skip
    nodes, more, script = re.findall(r"^sbatch --nodes=(\d+)(.*) (launch/slurm/\S+) \S+ ddp$", text, re.M)[0]
    gpus = int((re.findall(r"--gpus-per-node=(\d+)", more) or ["8"])[0])
    share_of(0, int(nodes) * gpus, asked.grpo.num_prompts, asked.grpo.group_size)
    assert os.access(ROOT / script, os.X_OK)
    assert find(asked.video.model) is not None
    assert f"hf download Wan-AI/{Path(asked.video.model).name} --local-dir {asked.video.model}" in text


def test_a_slurm_job_starts_a_launch_on_every_machine(tmp_path):
    """With stand-ins for SLURM's commands: srun runs what it is given once for each machine."""
    stubs = {
        "scontrol": 'printf "node7\\nnode8\\n"',
        "srun": 'shift; for id in 0 1; do SLURM_NODEID=$id "$@"; done',
        "python": f'printf "%s\\n" "$*" >> {tmp_path}/said',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4",
        "SLURM_JOB_NODELIST": "node[7-8]", "RESUME": "1",
    }  # fmt: skip
    script = ROOT / "launch/slurm/train.sh"
    subprocess.run([script, FAST, "zero2", "video.frames=17"], env=env, check=True)
    said = (tmp_path / "said").read_text().splitlines()
    expected = (
        f"-m vggrpo train {FAST} video.frames=17 --accelerate zero2 --resume --num_processes 8 --num_machines 2 "
        "--machine_rank {} --main_process_ip node7 --main_process_port 29500"
    )
    assert said == [expected.format(0), expected.format(1)]
    del env["RESUME"]
    subprocess.run([script, FAST], env=env, check=True)
    assert "--accelerate ddp --num_processes 8" in (tmp_path / "said").read_text().splitlines()[2]
    assert subprocess.run([script], env=env, capture_output=True).returncode == 2
