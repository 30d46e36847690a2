"""Training resumes to the bit, draws what it says, learns, and refuses what does not fit in one line."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from vggrpo import cli
from vggrpo.bootstrap import vae_train
from vggrpo.bootstrap.footage import cached_footage
from vggrpo.bootstrap.vae_eval import psnr, reconstruct
from vggrpo.bootstrap.vae_recipe import VaeRecipe
from vggrpo.bootstrap.vae_train import Crop, checkpoint_of, draw_batch, draw_crop, start_run, train_vae
from vggrpo.recipe import read_recipe

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "launch/recipes/bootstrap/vae.yaml"


@pytest.fixture(scope="module")
def clips():
    """Slowly changing colours, not the world's: enough to learn something from, and made in no time."""
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(32, 3, 3, 4, 4, generator=rng)
    return (255 * torch.nn.functional.interpolate(coarse, size=(17, 64, 64), mode="trilinear").transpose(1, 2)).byte()


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(vae_train, "VALIDATION", range(9_000_000, 9_000_001))
    monkeypatch.setattr(vae_train, "draw_crop", lambda *args: Crop(2, 5, 16))
    return VaeRecipe(
        out=str(tmp_path / "run"), num_clips=32, width=8, num_steps=6, checkpoint_every=2, warmup=2, start="ordinary"
    )


def finish(recipe, clips, stop=None):
    """Train on, or until `stop` steps were made, as if the machine had been switched off then."""
    run = start_run(recipe, clips)
    numbers = list(islice(train_vae(run, recipe, clips), stop))
    return run, numbers


def same(run, other):
    pairs = [*zip(run.network.parameters(), other.network.parameters(), strict=True)]
    pairs += zip(run.average.values(), other.average.values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_resumed_run_ends_as_an_unbroken_one_to_the_bit(recipe, clips, tmp_path):
    whole, numbers = finish(recipe, clips)
    broken = replace(recipe, out=str(tmp_path / "broken"))
    finish(broken, clips, stop=5)
    resumed, rest = finish(broken, clips)
    assert [n.step for n in rest] == [5, 6], "the checkpoint of step 4 is where it must go on"
    assert same(whole, resumed)
    assert [n.loss for n in rest] == [n.loss for n in numbers[4:]]
    assert [point["step"] for point in resumed.curve] == [0, 2, 4, 6]
    other, _ = finish(replace(recipe, out=str(tmp_path / "other"), seed=1), clips)
    assert not same(whole, other)


def test_a_finished_run_has_nothing_left_to_do(recipe, clips):
    whole, _ = finish(recipe, clips)
    again, numbers = finish(recipe, clips)
    assert numbers == []
    assert same(whole, again)


def test_the_average_follows_and_is_not_the_weights(recipe, clips):
    run, _ = finish(recipe, clips)
    assert not torch.equal(run.network.decoder.conv_out.weight, run.average["decoder.conv_out.weight"])
    assert not any(weight.requires_grad for weight in run.average.values())


def test_training_repairs_a_faded_decoder(recipe, clips):
    """From the linear start, for an ordinary one stays grey far longer than a test can wait."""
    video = clips[:8, :5, :, :16, :16].float() / 255
    linear = replace(recipe, start="linear", num_steps=60, lr=3e-3, checkpoint_every=100)
    run = start_run(linear, clips)
    with torch.no_grad():
        run.network.decoder.conv_out.weight.mul_(0.5)
    faded = psnr(video, reconstruct(run.network, video)).mean()
    for _ in train_vae(run, linear, clips):
        pass
    assert psnr(video, reconstruct(run.network, video)).mean() > faded + 1.5


def test_another_recipe_is_refused_but_a_longer_run_is_not(recipe, clips):
    finish(recipe, clips)
    with pytest.raises(ValueError, match=r"was made with latent_noise 0\.05 and the recipe says 0\.1: restore it"):
        start_run(replace(recipe, latent_noise=0.1), clips)
    longer = start_run(replace(recipe, num_steps=8), clips)
    assert longer.step == 6
    assert longer.plans == [[0, 6], [6, 8]]


def test_a_damaged_checkpoint_is_one_line(recipe, clips):
    finish(recipe, clips, stop=1)
    path = checkpoint_of(recipe)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged .*: delete it") as error:
        start_run(recipe, clips)
    assert "\n" not in str(error.value)


def test_footage_is_rendered_once_and_other_seeds_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "footage.safetensors"
    first = cached_footage(path, range(2))
    monkeypatch.setattr("vggrpo.bootstrap.footage.make_clips", None)
    assert torch.equal(cached_footage(path, range(2)), first)
    with pytest.raises(ValueError, match=r"holds clips of other seeds than range\(0, 3\)"):
        cached_footage(path, range(3))


def test_a_batch_is_pieces_of_the_clips(clips):
    """Every crop is found again in its clip, mirrored, reversed or recoloured."""
    rng = torch.Generator().manual_seed(3)
    numbered = torch.arange(17 * 64 * 64).remainder(251).view(1, 17, 1, 64, 64).expand(1, 17, 3, 64, 64).byte()
    for part in (255 * draw_batch(numbered, Crop(8, 9, 32), rng)).round().byte():
        ways = [part.flip(list(axes)) for axes in ((), (0,), (3,), (0, 3))]
        corners = [(way[0, 0, 0, 0], way[0, 0, 0, 1], way[1, 0, 0, 0]) for way in ways]
        steps = {
            tuple(int(x) for x in ((c[1].int() - c[0].int()) % 251, (c[2].int() - c[0].int()) % 251)) for c in corners
        }
        assert (1, 4096 % 251) in steps
    video = draw_batch(clips, Crop(3, 5, 24), rng)
    assert video.shape == (3, 5, 3, 24, 24)
    assert 0 <= video.min() < video.max() <= 1


def test_crops_come_first_and_whole_clips_last():
    rng = torch.Generator().manual_seed(0)
    early = {draw_crop(0.69, 0.7, rng) for _ in range(50)}
    assert early == {Crop(8, 9, 32), Crop(2, 9, 64), Crop(4, 17, 32)}
    assert {draw_crop(0.7, 0.7, rng) for _ in range(50)} == {Crop(2, 17, 64)}


def test_the_recipe_loads_and_says_how_to_run_it():
    read_recipe(VaeRecipe, RECIPE)
    assert "vggrpo bootstrap vae launch/recipes/bootstrap/vae.yaml" in RECIPE.read_text().split("\nnum_clips")[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_step=3", "unknown key 'num_step': did you mean 'num_steps'?"),
        ("num_clips=3", "num_clips must be >= 32, got 3"),
        ("start=fancy", "start must be one of linear, ordinary, got 'fancy'"),
        ("latent_noise=0", "latent_noise must be in (0, 1)"),
    ],
)
def test_a_bad_recipe_is_one_line_and_nothing_is_rendered(override, message, capsys):
    assert cli.main(["bootstrap", "vae", str(RECIPE), override]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
