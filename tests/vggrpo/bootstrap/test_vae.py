"""Videos go through the VAE in every size it promises, and its files are what their card says."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

from vggrpo.bootstrap.assets import save_json, sha256
from vggrpo.bootstrap.footage import JITTER, kind_of, render_footage
from vggrpo.bootstrap.vae import build_vae, decode, decode_open, denormalise, encode, load_vae, normalise
from vggrpo.bootstrap.vae_eval import FIRST_SEED, evaluate_vae, psnr
from vggrpo.bootstrap.vae_publish import latent_statistics

ASSET = Path(__file__).parents[3] / "assets/tiny-wan/vae"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return build_vae(width=8).eval()


@pytest.fixture(scope="module")
def stored(small, tmp_path_factory):
    """An asset folder with a card."""
    folder = tmp_path_factory.mktemp("vae")
    small.save_pretrained(folder)
    save_json(folder / "card.json", {"sha256": {name: sha256(folder / name) for name in ("config.json", WEIGHTS)}})
    return folder


@pytest.fixture
def asset(stored, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(stored, tmp_path / "vae"))


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 64, 64), (5, 40, 24), (13, 16, 56), (17, 64, 64)])
def test_any_4n_plus_1_frames_and_non_square_sides_work(small, frames, height, width):
    video = torch.rand(2, frames, 3, height, width)
    with torch.no_grad():
        z = encode(small, video)
        seen = decode(small, z)
    assert z.shape == (2, 16, (frames + 3) // 4, height // 8, width // 8)
    assert seen.shape == video.shape
    assert seen.isfinite().all()


@pytest.mark.parametrize("shape", [(4, 64, 64), (5, 60, 64), (5, 64, 60)])
def test_a_size_that_the_strides_do_not_divide_is_refused_in_one_line(small, shape):
    frames, height, width = shape
    with pytest.raises(ValueError, match=rf"4n \+ 1 frames .* got {frames} frames of {height} x {width}$"):
        encode(small, torch.rand(1, frames, 3, height, width))


def test_open_decoding_is_decoding_without_the_clamp(small):
    z = 30 * torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    opened, clamped = decode_open(small, z), decode(small, z)
    assert ((opened < 0) | (opened > 1)).any(), "nothing to clamp: the test would pass without the function"
    assert torch.allclose(opened.clamp(0, 1), clamped, atol=1e-6)
    assert not small.decoder._forward_hooks


def test_latents_are_normalised_by_the_statistics_of_the_data(small):
    clips = torch.cat(list(render_footage(range(4))))[:, :9]
    vae = build_vae(width=8)
    vae.load_state_dict(small.state_dict())
    mean, std = latent_statistics(vae, clips)
    with torch.no_grad():
        z = encode(vae, clips.float() / 255)
    plain = normalise(vae, z)  # the statistics of an untrained VAE are 0 and 1
    assert torch.equal(plain, z)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    z0 = normalise(vae, z)
    assert z0.mean((0, 2, 3, 4)).abs().max() < 0.02
    assert (z0.std((0, 2, 3, 4)) - 1).abs().max() < 0.02
    assert (plain.std((0, 2, 3, 4)) - 1).abs().max() > 0.1
    assert torch.allclose(denormalise(vae, z0), z, atol=1e-5)


def test_a_stored_vae_comes_back_frozen(stored, small):
    vae = load_vae(stored)
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), small.parameters(), strict=True))
    assert not any(weight.requires_grad for weight in vae.parameters())


def damage(folder):
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (damage, f"{WEIGHTS} has sha256 .* but card.json says .*: it was changed or damaged"),
        (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS} is missing, and card.json names it"),
        (lambda folder: (folder / "config.json").write_text("{}"), "config.json has sha256"),
        (lambda folder: (folder / "card.json").unlink(), "no card.json in .*: this is not an asset folder"),
        (lambda folder: (folder / "card.json").write_text("{"), "card.json is damaged"),
        (lambda folder: (folder / "card.json").write_text("[]"), "card.json is damaged"),
    ],
)
def test_a_damaged_asset_is_one_clear_line(asset, break_it, message):
    load_vae(asset)
    break_it(asset)
    with pytest.raises(ValueError, match=message) as error:
        load_vae(asset)
    assert "\n" not in str(error.value)


def test_footage_is_half_dynamic_and_half_hand_held():
    kinds = [kind_of(seed) for seed in range(2 * len(JITTER))]
    assert len(set(kinds)) == 6
    assert sum(dynamic for dynamic, _ in kinds) == sum(jitter > 0 for _, jitter in kinds) == len(kinds) // 2


def test_psnr_is_the_textbook_one():
    video = torch.full((2, 3, 3, 8, 8), 0.5)
    assert torch.allclose(
        psnr(video, video + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1, 1)), torch.tensor([20.0, 40.0])
    )


def test_the_shipped_vae_is_what_its_card_says_and_loads_as_any_wan_vae_does():
    vae = AutoencoderKLWan.from_pretrained(ASSET, local_files_only=True)
    ours = load_vae(ASSET)
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), ours.parameters(), strict=True))
    assert (ASSET / WEIGHTS).stat().st_size <= 16 * 2**20
    assert (vae.config.z_dim, vae.config.scale_factor_temporal, vae.config.scale_factor_spatial) == (16, 4, 8)
    video = torch.cat(list(render_footage(range(FIRST_SEED, FIRST_SEED + 8)))).float() / 255
    with torch.no_grad():
        z0 = normalise(ours, encode(ours, video))
    assert 0.8 < z0.std() < 1.2
    assert z0.mean().abs() < 0.2


@pytest.mark.slow
def test_the_shipped_psnr_is_measured_again_on_other_seeds():
    card = json.loads((ASSET / "card.json").read_text())
    first = 10**8 + 10**5 * random.SystemRandom().randrange(1000)
    print(f"fresh seeds from {first}")
    footage = torch.cat(list(render_footage(range(64))))
    found = evaluate_vae(load_vae(ASSET), footage, per_family=8, first_seed=first)
    # Means over 80 clips differ between sets of seeds: clips have a standard deviation of about 3 dB.
    assert abs(found["psnr"] - card["held_out"]["psnr"]) < 1
    assert found["psnr"] > found["controls"]["shuffled_latents"] + 8
    assert found["after_first_frame"] > found["controls"]["linear_after_first_frame"]
