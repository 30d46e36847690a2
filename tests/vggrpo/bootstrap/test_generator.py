"""The generator is a WanPipeline like any other, and what is measured of it can tell good from bad."""

import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from vggrpo.bootstrap import generator
from vggrpo.bootstrap.assets import read_card
from vggrpo.bootstrap.footage import render_footage
from vggrpo.bootstrap.generator import FILES, GeneratorRecipe, _shortened, load_generator, publish_generator
from vggrpo.bootstrap.generator_eval import (
    Sampling,
    commands,
    decoded,
    evaluate_generator,
    load_reader,
    recovered,
    sample_latents,
    sharpness,
)
from vggrpo.bootstrap.text import build_encoder, build_tokenizer
from vggrpo.bootstrap.vae import build_vae
from vggrpo.data import Encoded
from vggrpo.recipe import read_recipe
from vggrpo.sft import start_sft, train_sft
from vggrpo.sft_config import LoraSize, SftRecipe, WanSize

ROOT = Path(__file__).parents[3]
ASSET, RECIPE = ROOT / "assets/tiny-wan", ROOT / "launch/recipes/bootstrap/generator_hand_held.yaml"
TINY = WanSize(layers=2, heads=2, head_dim=16, ffn_dim=64)
TEXTS = ["the camera pans left", "the camera stands still", "a red box bounces"]
PLAIN = Sampling(num_steps=4, guidance=3.0, max_len=12)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A generator of tiny random widths, written below a folder that had a VAE and a text stage."""
    folder = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    tokenizer = build_tokenizer(TEXTS, 12)
    tokenizer.save_pretrained(folder / "tokenizer")
    build_encoder(len(tokenizer), 32, 1).save_pretrained(folder / "text_encoder")
    build_vae(8).save_pretrained(folder / "vae")
    training = SftRecipe(str(folder / "run"), str(folder), new=TINY, max_len=12, num_steps=3, batch=2, average=0.5)
    return GeneratorRecipe(asset=str(folder), training=training, sampling=PLAIN, num_samples=4)


@pytest.fixture(scope="module")
def training(recipe):
    rng = torch.Generator().manual_seed(0)
    data = Encoded(torch.randn(4, 16, 5, 8, 8, generator=rng), torch.randn(4, 6, 32), torch.zeros(6, 32), tuple("abcd"))
    started = start_sft(recipe.training, data)
    list(train_sft(started, recipe.training, data, data))
    return started


@pytest.fixture(scope="module")
def published(recipe, training):
    def read(video):
        return [("pan", 1)] * len(video)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator, "commands", lambda seeds, scenes: (TEXTS, []))
        patch.setattr(generator, "draw_sheet", lambda video, path: None)
        publish_generator(training, recipe, "recipe.yaml", read)
    return Path(recipe.asset)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(("frames", "height", "width"), [(5, 32, 48), (9, 16, 16)])
def test_our_samples_are_the_pipelines_own(published, guidance, frames, height, width):
    pipe = load_generator(published)
    shape = ((frames - 1) // 4 + 1, height // 8, width // 8)
    noise = torch.randn(len(TEXTS), 16, *shape, generator=torch.Generator().manual_seed(0))
    theirs = pipe(
        TEXTS,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=4,
        guidance_scale=guidance,
        max_sequence_length=12,
        latents=noise,
        output_type="latent",
    ).frames
    ours = sample_latents(pipe, TEXTS, replace(PLAIN, guidance=guidance), shape)
    assert torch.allclose(ours, theirs, atol=1e-4)
    other = sample_latents(pipe, TEXTS, replace(PLAIN, guidance=guidance + 0.5), shape)
    assert not torch.allclose(other, theirs, atol=1e-4), "the control: another guidance"


def test_decoding_is_the_pipelines_own(published):
    pipe = load_generator(published)
    noise = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    theirs = pipe(
        TEXTS[:1], height=32, width=32, num_frames=5, num_inference_steps=4, guidance_scale=3.0,
        max_sequence_length=12, latents=noise, output_type="pt",
    ).frames  # fmt: skip
    ours = decoded(pipe.vae, sample_latents(pipe, TEXTS[:1], PLAIN, (2, 4, 4)))
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_what_is_written_is_the_average_in_half_precision(published, training):
    stored = WanPipeline.from_pretrained(published, local_files_only=True).transformer
    for name, weight in stored.named_parameters():
        assert torch.equal(weight, training.average[name].half().float()), name
    weights = dict(training.trained())
    assert any(not torch.equal(weights[name], mean) for name, mean in training.average.items())
    assert (published / FILES[-3]).stat().st_size < 2.2 * sum(weight.numel() for weight in weights.values())


def test_a_changed_file_is_one_line_also_that_of_a_part_made_before(published):
    assert set(read_card(published)["sha256"]) == set(FILES)
    for name in ("scheduler/scheduler_config.json", "vae/config.json"):
        whole = (published / name).read_bytes()
        (published / name).write_bytes(whole + b" ")
        with pytest.raises(ValueError, match=f"{name} has sha256"):
            load_generator(published)
        (published / name).write_bytes(whole)
    load_generator(published)


def test_the_card_tells_what_was_measured(published, recipe):
    card, text = read_card(published), (published / "README.md").read_text()
    assert card["recipe"] == asdict(recipe)
    assert card["plans"] == [[0, 3]]
    assert "deliberately ordinary" in text
    assert "(seeds 0 to 1023)" in text
    assert "missed" in text
    assert f"**{card['held_out']['sharpness']:.2f}**" in text


def test_a_perfect_reader_of_perfect_samples_scores_1_and_controls_do_not():
    told = [("pan", 1), ("pan", -1), ("static", 0), ("orbit", 1)]
    found = recovered(told, told)
    assert found["verb"] == found["motion"] == 1
    mirrored = recovered([(name, -side) for name, side in told], told)
    assert mirrored["motion"] == 1
    assert mirrored["verb"] == 0.25, "only what has no side is right on the wrong side"
    assert mirrored["by_motion"] == {"static": 1, "pan": 0, "orbit": 0}
    assert recovered(told, told[1:] + told[:1])["verb"] == 0


def test_captions_come_with_what_they_command():
    captions, told = commands(range(42_000_000, 42_000_020))
    for caption, (motion, side) in zip(captions, told, strict=True):
        if motion == "pan":
            assert ("pans right" in caption) == (side == 1)
        if motion == "static":
            assert "stands still" in caption
    assert len({motion for motion, _ in told}) > 4


def test_sharpness_sees_blur_and_nothing_else():
    video = next(render_footage(range(4))).float() / 255
    blurred = torch.nn.functional.avg_pool3d(video, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
    assert sharpness(blurred) < 0.8 * sharpness(video)
    assert sharpness(video.flip(-1, 1)) == pytest.approx(sharpness(video))
    assert sharpness(torch.full((1, 2, 3, 8, 8), 0.3)) == 0
    ramp = torch.linspace(0, 1, 11).expand(1, 2, 3, 5, 11)
    assert sharpness(ramp) == pytest.approx(0.01, rel=1e-4)


def test_the_evaluation_measures_samples_against_the_vaes_own_limit(published):
    """A generator that gave the rendered clips would have sharpness 1 and the ceiling's verbs."""
    pipe, seen = load_generator(published), []

    def read(video):
        seen.append(video)
        return [("static", 0)] * len(video)

    found = evaluate_generator(pipe, read, 4, PLAIN)
    samples, ceiling, rendered, free = seen
    assert found["sharpness"] == pytest.approx(sharpness(samples) / sharpness(ceiling), rel=1e-3)
    assert torch.equal(rendered, torch.cat(list(render_footage(range(42_000_000, 42_000_004)))).float() / 255)
    assert not torch.equal(free, samples), "unconditional samples see no caption"
    assert found["controls"]["blurred"] < 0.9
    assert set(found["ceiling"]) == {"verb", "motion", "by_motion"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {lora: {}}", "the generator is a whole transformer"),
        ("asset: elsewhere\ntraining: {new: {}}", "they must be one folder"),
        ("training: {new: {}, max_len: 50}", "must be the same"),
        ("training: {new: {}, cooldown: 2}", r"cooldown must be in \[0, 1\]"),
    ],
)
def test_an_impossible_recipe_is_one_line(tmp_path, text, message):
    path = tmp_path / "generator.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_recipe(GeneratorRecipe, path)


OFFLINE = """
import socket, sys
def closed(*args, **kwargs): raise OSError("no network here")
socket.socket.connect = socket.getaddrinfo = closed
import torch
from diffusers import WanPipeline
pipe = WanPipeline.from_pretrained(sys.argv[1], local_files_only=True)
for frames, height, width in ((5, 32, 48), (17, 64, 64)):
    video = pipe("The camera pans left slowly on a two-tone red ground under the sky.", height=height, width=width,
                 num_frames=frames, num_inference_steps=2, max_sequence_length=96, output_type="pt",
                 generator=torch.Generator().manual_seed(0)).frames
    assert video.shape == (1, frames, 3, height, width), video.shape
    assert video.isfinite().all() and video.std() > 0.02, video.std()
"""


def test_the_shipped_pipeline_loads_and_samples_without_a_network():
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", OFFLINE, str(ASSET)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_finetuner_starts_from_the_shipped_generator(tmp_path):
    recipe = SftRecipe(out=str(tmp_path), model=str(ASSET), lora=LoraSize(rank=2, alpha=2), num_steps=1, batch=2)
    rng = torch.Generator().manual_seed(0)
    z0, text = torch.randn(2, 16, 2, 4, 4, generator=rng), torch.randn(2, 4, 64, generator=rng)
    started = start_sft(recipe, Encoded(z0, text, text[0], ("a", "b")))
    assert all("lora_" in name for name, _ in started.trained())
    shipped = load_generator(ASSET).transformer.state_dict()
    kept = {name.replace("base_layer.", ""): weight for name, weight in started.network.state_dict().items()}
    assert all(torch.equal(kept[name], weight) for name, weight in shipped.items())


def test_the_shipped_generator_is_small_and_what_its_card_describes():
    card = read_card(ASSET)
    assert read_recipe(GeneratorRecipe, RECIPE) == read_recipe_of(card)
    assert card["went_on_from"]["command"].endswith("generator.yaml")
    assert _shortened(card) == card["went_on_from"], "a second try does not take the first for where it all began"
    assert card["went_on_from"]["command"] in (ASSET / "README.md").read_text()
    assert (ASSET / "transformer/diffusion_pytorch_model.safetensors").stat().st_size <= 10 * 2**20


@pytest.mark.slow
def test_the_shipped_numbers_hold_for_other_noise_and_captions():
    """Other held-out seeds than the card's: within sampling error of its numbers, far above both controls."""
    card = read_card(ASSET)
    recipe = read_recipe_of(card)
    first = int(torch.randint(50_000_000, 2**31, ()))
    print("first seed", first)
    pipe, reader = load_generator(ASSET), load_reader(ROOT / "assets/tiny-referee")
    how = replace(recipe.sampling, seed=first)
    data = recipe.training.data
    found = evaluate_generator(pipe, reader, 32, how, data.scenes, first, data.sway)
    assert abs(found["sharpness"] - card["held_out"]["sharpness"]) < 0.15
    assert abs(found["verb"] - card["held_out"]["verb"]) < 0.25  # three standard errors of 32 captions
    assert found["verb"] > found["controls"]["other captions"] + 0.2
    assert found["verb"] > found["controls"]["unconditional"] + 0.2


def read_recipe_of(card):
    raw = dict(card["recipe"])
    training = dict(raw["training"])
    training |= {"new": None if training["new"] is None else WanSize(**training["new"])}
    for name in ("data", "held_out"):
        training[name] = type(SftRecipe().data)(**training[name])
    return GeneratorRecipe(**(raw | {"training": SftRecipe(**training), "sampling": Sampling(**raw["sampling"])}))
