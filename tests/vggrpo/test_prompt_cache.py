"""A prompt that was encoded once is read from disk, bit for bit, and by the encoder that it came from alone."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.vggrpo.test_wan import TOKENIZER, saved, transformer, vae
from vggrpo import cli
from vggrpo.build import build
from vggrpo.policy import prompt_cache
from vggrpo.policy.encoders import load_encoders
from vggrpo.policy.prompt_cache import prompt_encoder
from vggrpo.recipe import load_recipe
from vggrpo.sample import load_models
from vggrpo.sample_config import SampleConfig
from vggrpo.types import Condition

PROMPTS = ["the camera pans right", "a red cube on a checkered ground under the sky", ""]
TOKENS = 12
ROOT = TOKENIZER.parents[2]


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    from diffusers import WanPipeline

    torch.manual_seed(0)
    return saved(tmp_path_factory.mktemp("wan"), WanPipeline, transformer=transformer(), vae=vae())


@pytest.fixture
def loads(monkeypatch):
    """How often a text encoder has been loaded."""
    found: list[Path] = []
    real = prompt_cache.text_encoder

    def counted(folder, *args):
        found.append(folder)
        return real(folder, *args)

    monkeypatch.setattr(prompt_cache, "text_encoder", counted)
    return found


def embeddings(folder: Path, cache: Path | None, prompts=PROMPTS, max_len=TOKENS, **more) -> torch.Tensor:
    return prompt_encoder(folder, prompts, max_len, cache=cache, **more)(Condition(list(prompts)))


def test_what_is_cached_is_what_the_pipeline_says_and_needs_no_encoder(wan, tmp_path, loads):
    expected = torch.cat([load_encoders(wan, TOKENS, "cpu").text([prompt]) for prompt in PROMPTS])
    for cache, number in ((None, 1), (tmp_path, 2), (tmp_path, 2), (None, 3)):
        assert torch.equal(embeddings(wan, cache), expected)
        assert len(loads) == number
    assert len(list((tmp_path / "prompts").iterdir())) == len(PROMPTS)
    assert expected[2].abs().sum(-1).gt(0).sum() == 1  # "" is </s> alone: what follows is 0 and not stored


def test_only_prompts_that_are_new_are_encoded(wan, tmp_path, loads, monkeypatch):
    embeddings(wan, tmp_path, PROMPTS[:2])
    asked: list[str] = []
    real = prompt_cache.encode_prompts

    def encode(stage, prompts, max_len):
        asked.extend(prompts)
        return real(stage, prompts, max_len)

    monkeypatch.setattr(prompt_cache, "encode_prompts", encode)
    embeddings(wan, tmp_path)
    assert asked == PROMPTS[2:]
    assert len(loads) == 2


@pytest.mark.parametrize("what", ["weights", "tokenizer", "max_len", "dtype"])
def test_another_encoder_length_or_precision_is_another_entry(wan, tmp_path, loads, what):
    first = embeddings(wan, tmp_path / "cache")
    folder, more = tmp_path / "wan", {}
    shutil.copytree(wan, folder)
    if what == "weights":
        from safetensors.torch import load_file, save_file

        path = folder / "text_encoder/model.safetensors"
        save_file({name: 1.01 * x for name, x in load_file(path).items()}, path, {"format": "pt"})
    elif what == "tokenizer":
        path = folder / "tokenizer/tokenizer_config.json"
        path.write_text(path.read_text() + "\n")
    elif what == "max_len":
        more = {"max_len": 5}
    else:
        more = {"dtype": torch.bfloat16}
    again = embeddings(folder, tmp_path / "cache", **more)
    assert len(loads) == 2
    assert again.dtype == torch.float32
    assert torch.equal(again, first) == (what == "tokenizer")
    # The control: the same files under another name and of another day are the same encoder.
    shutil.copytree(wan, tmp_path / "moved", copy_function=shutil.copyfile)
    assert torch.equal(embeddings(tmp_path / "moved", tmp_path / "cache"), first)
    assert len(loads) == 2


def test_what_is_wrong_is_said_in_one_line(wan, tmp_path):
    embeddings(wan, tmp_path)
    file = next((tmp_path / "prompts").iterdir())
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"is damaged .*: delete it, and the prompt is encoded again"):
        embeddings(wan, tmp_path)
    with pytest.raises(ValueError, match="was not encoded beforehand"):
        prompt_encoder(wan, PROMPTS[:1], TOKENS, cache=None)(Condition(["another"]))
    with pytest.raises(ValueError, match="has no text_encoder/: it must be a Wan model in diffusers layout"):
        prompt_encoder(wan / "vae", PROMPTS, TOKENS, cache=None)


def test_a_second_run_and_its_samples_load_no_text_encoder(tmp_path, monkeypatch, loads):
    monkeypatch.chdir(ROOT)
    cache = tmp_path / "cache"
    more = [f"video.prompt_cache={cache}", "video.motion_samples=0", "video.frames=5", "video.height=32"]
    first, second = (build(load_recipe("launch/recipes/tiny.yaml", more)) for _ in range(2))
    cond = next(first.conditions)
    assert torch.equal(first.policy.encode(cond), second.policy.encode(cond))
    assert len(loads) == 1
    prompts = Path("assets/prompts/train.txt").read_text().splitlines()[:3]
    cfg = SampleConfig(prompts="", out="", frames=5, height=32, prompt_cache=str(cache))
    models = load_models(cfg, prompts)
    assert torch.equal(models.encode(Condition(prompts[:1])), first.policy.encode(Condition(prompts[:1])))
    assert len(loads) == 1
    load_models(cfg, ["a prompt of which training knew nothing"])
    assert len(loads) == 2
    assert cli.main(["plan", "launch/recipes/tiny.yaml", "--no-step", *more]) == 0
    assert len(loads) == 2
