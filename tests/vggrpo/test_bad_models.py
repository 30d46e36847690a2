"""Models that are not there, not whole, or not made for each other: one line with cause and remedy, by all commands."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import save_file

from tests.vggrpo import test_wan as wan
from vggrpo import cli
from vggrpo.policy.lora import WEIGHTS

ROOT = Path(__file__).parents[2]
RECIPE = "launch/recipes/tiny.yaml"
HUB = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A Wan whose latents have 48 channels."""
    return wan.wan22(WanPipeline, tmp_path_factory.mktemp("wide"))


def commands(model: str, tmp_path: Path) -> dict[str, list[str]]:
    """Every command that a model is given to."""
    (tmp_path / "stitch.yaml").write_text(
        f"wan: {model}\ngeometry: assets/tiny-geometry\nout: {tmp_path}/stitch\n"
        f"clips: {{videos: {tmp_path}/videos, ranking: 1, held_out: 1}}\n"
    )
    (tmp_path / "videos").mkdir(exist_ok=True)
    for name in "abc":
        (tmp_path / f"videos/{name}.mp4").touch()
    run, out = [RECIPE, f"video.model={model}", f"out={tmp_path}/run"], ["--out", str(tmp_path / "out")]
    return {
        "train": ["train", *run],
        "check": ["check", *run],
        "sft": ["sft", "launch/recipes/sft/lora.yaml", f"model={model}", f"out={tmp_path}/sft"],
        "sample": ["sample", "--model", model, "--prompts", "assets/prompts/held_out.txt", *out],
        "evaluate": ["evaluate", "--base", model, "--best-of", "2", *out],
        "score": ["score", str(tmp_path / "videos/a.mp4"), "--through", "latent", "--model", model],
        "stitch": ["stitch", str(tmp_path / "stitch.yaml")],
    }


def said(words: list[str], capsys) -> str:
    """What a refused command says, without what the libraries that it loads say about themselves."""
    capsys.readouterr()
    assert cli.main(words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vggrpo")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("command", ["train", "check", "sft", "sample", "evaluate", "score", "stitch"])
def test_a_hub_id_without_its_folder_says_how_to_fetch_it(command, tmp_path, capsys):
    line = said(commands(HUB, tmp_path)[command], capsys)
    assert f"there is no folder {HUB}: if this is a hub id, fetch it first where there is a network" in line
    assert f"hf download {HUB} --local-dir DIR" in line


@pytest.mark.parametrize("command", ["train", "check", "sft", "sample", "evaluate", "score", "stitch"])
def test_a_folder_that_is_no_wan_says_what_is_missing(command, tmp_path, capsys):
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux/README.md").write_text("something else")
    line = said(commands(str(tmp_path / "flux"), tmp_path)[command], capsys)
    assert "Wan" in line
    assert "diffusers layout" in line


@pytest.mark.parametrize("command", ["train", "sample", "evaluate", "score"])
def test_a_latent_geometry_model_of_another_vae_says_so_by_its_latents(command, wide, tmp_path, capsys):
    line = said(commands(str(wide), tmp_path)[command], capsys)
    assert "assets/tiny-lgm was stitched for latents of 16 channels, 8 times smaller, 4 frames each, and" in line
    assert (
        "makes those of 48 channels, 16 times smaller, 4 frames each: stitch one for this VAE (vggrpo stitch)" in line
    )


@pytest.mark.parametrize("command", ["train", "check", "plan", "sample", "evaluate"])
def test_a_vae_of_16_and_patches_of_2_take_multiples_of_32(command, wide, tmp_path, capsys):
    words = commands(str(wide), tmp_path)["train" if command == "plan" else command]
    side = "--height={}" if command in ("sample", "evaluate") else "video.height={}"
    line = said([command, *words[1:], side.format(48)], capsys)
    assert line.endswith(f"{wide} takes 4 n + 1 frames with sides that are multiples of 32, got 17 of 48 x 64")
    # The controls: 64 is refused for another reason, and so is 48 where the VAE's stride is 8.
    assert "was stitched for latents of" in said([command, *words[1:], side.format(64)], capsys)
    narrow = tmp_path / "narrow"
    shutil.copytree("assets/tiny-wan", narrow, ignore=shutil.ignore_patterns("tokenizer"))
    assert "multiples" not in said(
        [word.replace(str(wide), str(narrow)) for word in (command, *words[1:], side.format(48))], capsys
    )


@pytest.mark.parametrize("command", ["train", "sample"])
def test_a_vae_and_a_transformer_of_two_models_are_refused(command, wide, tmp_path, capsys):
    torch.manual_seed(0)
    mixed = shutil.copytree(wide, tmp_path / "mixed")
    shutil.rmtree(mixed / "vae")
    wan.vae().save_pretrained(mixed / "vae")
    line = said(commands(str(mixed), tmp_path)[command], capsys)
    assert "the VAE has latents of 16 channels, the transformer takes 48 and gives 48" in line
    assert "these are parts of two models" in line


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        ("vggt:facebook/VGGT-1B", "cannot import VGGT from vggt.models.vggt"),
        ("da3-smal:folder", "did you mean 'da3-small'"),
        ("any4d:my.module:build", "give --allow-import if you trust it"),
        ("assets/tiny-wan", "no card.json"),
        (
            "assets/tiny-referee",
            "assets/tiny-referee is not an embedded geometry model (KeyError: 'pairs'): give assets/tiny-geom",
        ),
    ],
)
def test_another_geometry_model_is_refused(geometry, message, tmp_path, capsys):
    if geometry == "assets/tiny-wan":
        geometry = str(shutil.copytree(geometry, tmp_path / "none", ignore=shutil.ignore_patterns("card.json")))
    line = said(["train", RECIPE, f"video.geometry={geometry}", f"out={tmp_path}/run"], capsys)
    assert message in line


def test_a_lora_of_another_model_is_refused_by_sample_and_evaluate(tmp_path, capsys):
    save_file({"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.zeros(4, 1536)}, tmp_path / WEIGHTS)
    prompts = ["--prompts", "assets/prompts/held_out.txt", "--out", str(tmp_path / "out")]
    for words in (["sample", "--lora", str(tmp_path)], ["evaluate", "--lora", f"a={tmp_path}", "--referee", "None"]):
        size = ["--num-steps", "1", "--frames", "5", "--height", "32", "--width", "32"]
        if words[0] == "evaluate":
            size += ["--num-prompts", "1"]
        line = said([*words, *prompts, *size], capsys)
        assert "is a LoRA of another model: blocks.0.attn1.to_q has 1536 channels in it, and this transformer" in line


def test_a_run_is_not_resumed_with_a_lora_of_another_rank(tmp_path, capsys):
    small = ["grpo.group_size=2", "grpo.num_iterations=1", "sampling.num_steps=2", "sampling.window={size: 1, stop: 1}"]
    small += ["video.frames=5", "video.height=32", "video.width=32", "video.motion_samples=0", f"out={tmp_path}"]
    assert cli.main(["train", RECIPE, *small]) == 0
    rank = json.loads((tmp_path / "checkpoints/step-000001/state.json").read_text())["recipe"]["video"]["lora"]["rank"]
    line = said(["train", RECIPE, *small, f"video.lora.rank={rank + 1}", "--resume"], capsys)
    assert "was made by another recipe" in line
    assert "rank" in line
