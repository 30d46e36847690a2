"""Finetuning one of two transformers, and models told of first frames: each is asked as the samplers ask it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline

from tests.vggrpo import test_wan as wan
from vggrpo import cli
from vggrpo.config import LoraSize
from vggrpo.data import DataConfig, Encoded, encode_clips, read_video, write_video
from vggrpo.flow import interpolate
from vggrpo.policy.encoders import load_encoders
from vggrpo.policy.first_frame import WORDS, kept_latents, load_sight, with_first_frames
from vggrpo.policy.wan import WanVelocity
from vggrpo.policy.wan_folder import load_loras, load_velocity
from vggrpo.sft import draw_times, finetune, flow_loss, load_transformer, measure_sft, save_result, start_sft, train_sft
from vggrpo.sft_config import SftRecipe, WanSize
from vggrpo.sft_role import Role, role_of, without_first
from vggrpo.types import Condition

B = 0.7
"""The boundary."""


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Two short videos with captions."""
    folder = tmp_path_factory.mktemp("clips")
    for seed, name in enumerate(("a", "b")):
        rng = torch.Generator().manual_seed(seed)
        colours = torch.randint(256, (1, 3, 4, 8), dtype=torch.uint8, generator=rng)
        still = colours.repeat_interleave(8, 2).repeat_interleave(8, 3).repeat(5, 1, 1, 1)
        write_video(folder / f"{name}.mp4", torch.stack([x.roll(4 * n, -1) for n, x in enumerate(still)]), 8)
        (folder / f"{name}.txt").write_text(wan.PROMPTS[seed])
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[[str], Path]:
    """Tiny random Wans, saved as the hub's are, by what is particular about them."""
    folder = tmp_path_factory.mktemp("models")
    make = {
        "two": wan.save_moe,
        "sees": wan.save_i2v,
        "channels": lambda where: wan.save_i2v(where, clip=False),
        "kept": lambda where: wan.wan22(WanImageToVideoPipeline, where),
        "plain": lambda where: wan.saved(where, WanPipeline, transformer=wan.transformer(), vae=wan.vae()),
    }

    def made(name: str) -> Path:
        return folder / name if (folder / name).exists() else make[name](folder / name)

    return made


@pytest.fixture
def recipe_of(models, clips, tmp_path) -> Callable[..., SftRecipe]:
    def make(name: str, **more: object) -> SftRecipe:
        data = DataConfig(videos=str(clips), frames=5, height=32, width=64, cache=str(tmp_path / "cache"))
        settings = {"lora": LoraSize(4, 8), "num_steps": 3, "batch": 2, "warmup": 1, "lr": 1e-2, "average": 0.0}
        settings |= {"max_len": WORDS if name == "sees" else wan.TOKENS}
        return SftRecipe(
            model=str(models(name)), out=str(tmp_path / "out"), data=data, held_out=data, **settings | more
        )

    return make


def encoded(recipe: SftRecipe) -> Encoded:
    role = role_of(recipe)
    encoders = load_encoders(
        Path(recipe.model), recipe.max_len, "cpu", first_frames=role.way == "channels", sight=role.sight
    )
    return encode_clips(recipe.data, encoders, print)


def asked(data: Encoded, t: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noised latents, their noise, their times."""
    eps = torch.randn(data.z0.shape, generator=torch.Generator().manual_seed(1))
    times = torch.full((len(data.z0),), t)
    return interpolate(data.z0, eps, times.view(-1, 1, 1, 1, 1)), eps, times


def error(v: torch.Tensor, data: Encoded, eps: torch.Tensor) -> torch.Tensor:
    return (v - (eps - data.z0)).square().mean((3, 4))


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("span", [(0.0, B), (B, 1.0)])
def test_times_of_a_side_have_the_law_of_all_between_its_ends(span, shift):
    rng = torch.Generator().manual_seed(0)
    t = draw_times(1000, shift, rng, span)
    assert ((t >= span[0]) & (t <= span[1])).all()
    whole = draw_times(100_000, shift, rng)
    some = whole[(whole >= span[0]) & (whole < span[1])].sort().values
    expected = some[((torch.arange(1000) + 0.5) / 1000 * len(some)).long()]
    assert (t.sort().values - expected).abs().max() < 5e-3
    other = span[0] + (span[1] - span[0]) * (torch.arange(1000) + 0.5) / 1000
    assert ((other - expected).abs().max() < 5e-3) == (shift == 1.0)  # the control: uniform in t


@pytest.mark.parametrize(("side", "part", "t"), [("high", "transformer", 0.9), ("low", "transformer_2", 0.3)])
def test_one_of_two_transformers_learns_at_the_times_of_its_side(recipe_of, side, part, t, monkeypatch):
    recipe = recipe_of("two", side=side)
    role, data, seen = role_of(recipe), encoded(recipe), []
    assert role == Role(part, (B, 1.0) if side == "high" else (0.0, B))
    training = start_sft(recipe, data, role)
    z_t, eps, times = asked(data, t)
    both = load_velocity(Path(recipe.model))
    with torch.no_grad():
        loss = flow_loss(training, recipe, data.z0, eps, times, (data.text,))
        torch.testing.assert_close(loss, error(both(z_t, times, data.text), data, eps))
        wrong = WanVelocity({"high": both.transformer_2, "low": both.transformer}[side])
        assert (loss - error(wrong(z_t, times, data.text), data, eps)).abs().max() > 1e-3  # the control

    def spy(training, recipe, z0, eps, t, told):
        seen.append(t)
        return flow_loss(training, recipe, z0, eps, t, told)

    monkeypatch.setattr("vggrpo.sft.flow_loss", spy)
    list(train_sft(training, recipe, data, data))
    assert len(seen) > recipe.num_steps, "those of the curve, too"
    assert ((torch.cat(seen) >= role.span[0]) & (torch.cat(seen) <= role.span[1])).all()
    out = save_result(training, recipe)
    assert out == Path(recipe.out) / ("" if side == "high" else part)
    tuned = load_velocity(Path(recipe.model))
    load_loras(tuned, Path(recipe.out))
    with torch.no_grad():
        for at in (0.9, 0.3):
            moved = (tuned(z_t, 0 * times + at, data.text) - both(z_t, 0 * times + at, data.text)).abs().max()
            assert (moved > 1e-3) == (at == t), "its own side, and that alone"


def test_all_weights_of_a_second_transformer_go_to_its_folder(recipe_of):
    recipe = recipe_of("two", side="low", lora=None, num_steps=1)
    training = finetune(recipe, lambda said: None)
    out = save_result(training, recipe)
    assert out == Path(recipe.out) / "transformer_2"
    stored = load_transformer(out.parent, out.name)
    assert all(torch.equal(weight, training.average[name]) for name, weight in stored.named_parameters())


@pytest.mark.parametrize("name", ["sees", "channels"])
def test_a_model_of_first_frames_is_told_of_each_clips_own_once_encoded(recipe_of, name, monkeypatch):
    recipe = recipe_of(name)
    data, folder = encoded(recipe), Path(recipe.model)
    frames = torch.stack([read_video(path, recipe.data)[0] for path in sorted(Path(recipe.data.videos).glob("*.mp4"))])
    frames = frames.float() / 255
    sight = load_sight(folder) if name == "sees" else None
    encode = with_first_frames(lambda cond: data.text, "channels", wan.load_vae(folder), 5, sight, frames)
    _, *expected = encode(Condition(["", ""], frames))  # what a run's policy is told
    assert len(data.given) == len(expected) == (2 if name == "sees" else 1)
    for found, wanted in zip(data.given, expected, strict=True):
        assert torch.equal(found, wanted)
    monkeypatch.setattr("vggrpo.policy.encoders.channels", None)  # from the cache
    assert all(torch.equal(a, b) for a, b in zip(encoded(recipe).given, data.given, strict=True))
    training = start_sft(recipe, data, role_of(recipe))
    z_t, eps, times = asked(data, 0.6)
    with torch.no_grad():
        loss = flow_loss(training, recipe, data.z0, eps, times, (data.text, *data.given))
        v = load_velocity(folder)(z_t, times, (data.text, *expected))
        torch.testing.assert_close(loss, error(v, data, eps))
        for n in range(len(expected)):  # the controls: each other's, of either kind
            other = [x.flip(0) if k == n else x for k, x in enumerate(expected)]
            v = load_velocity(folder)(z_t, times, (data.text, *other))
            assert (loss - error(v, data, eps)).abs().max() > 1e-5


def test_it_learns_what_only_the_first_frame_tells(recipe_of):
    """Latents that follow from the picture; of captions there is one."""
    recipe = recipe_of("channels", lora=None, num_steps=150, batch=8, lr=3e-3, drop_caption=0.0, average=0.9)
    recipe = replace(recipe, checkpoint_every=recipe.num_steps)
    rng = torch.Generator().manual_seed(0)
    z0 = torch.randn(4, 16, 2, 4, 8, generator=rng)
    mask = torch.zeros(4, 4, 2, 4, 8)
    mask[:, :, 0] = 1
    text = torch.randn(1, 8, 12, generator=rng).expand(4, -1, -1).contiguous()
    data = Encoded(z0, text, text[0], tuple("abcd"), (torch.cat([mask, z0], dim=1),))
    training = start_sft(recipe, data, Role(way="channels"))
    list(train_sft(training, recipe, data, data))
    told = measure_sft(training, recipe, data)["loss"]
    other = measure_sft(training, recipe, replace(data, given=(data.given[0].roll(1, 0),)))["loss"]
    print(f"told {told:.3f}, told of each other's {other:.3f}")
    assert other > 1.3 * told


def test_a_first_frame_that_is_kept_is_told_and_not_learnt(recipe_of):
    recipe = recipe_of("kept", tell_first_frame=True)
    role, whole = role_of(recipe), encoded(recipe)
    data, folder = without_first(whole), Path(recipe.model)
    assert role.way == "kept"
    assert data.z0.shape == (2, 48, 1, 2, 4)
    for path, given in zip(sorted(Path(recipe.data.videos).glob("*.mp4")), data.given[0], strict=True):
        frame = read_video(path, recipe.data)[0].float() / 255
        torch.testing.assert_close(given[None], kept_latents(wan.load_vae(folder), frame), atol=1e-4, rtol=1e-4)
    training = start_sft(recipe, data, role)
    z_t, eps, times = asked(data, 0.6)
    with torch.no_grad():
        loss = flow_loss(training, recipe, data.z0, eps, times, (data.text, *data.given))
        assert loss.shape == (2, 48, 1)
        network = load_velocity(folder)
        torch.testing.assert_close(loss, error(network(z_t, times, (data.text, *data.given)), data, eps))
        plain = WanVelocity(network.transformer)(torch.cat([data.given[0], z_t], dim=2), times, data.text)[:, :, 1:]
        assert (loss - error(plain, data, eps)).abs().max() > 1e-4  # the control: a first frame at the noise's time
    assert role_of(replace(recipe, tell_first_frame=None)).way is None, "it can also go without"


@pytest.mark.parametrize(
    ("name", "more"), [("two", ["side=low"]), ("sees", []), ("channels", []), ("kept", ["tell_first_frame=true"])]
)
def test_the_command_finetunes_each_kind_and_goes_on(models, clips, tmp_path, capsys, name, more):
    path = tmp_path / "sft.yaml"
    data = f"{{videos: {clips}, frames: 5, height: 32, width: 64, cache: {tmp_path}/cache}}"
    path.write_text(
        f"model: {models(name)}\nout: {tmp_path}/out\nlora: {{rank: 4, alpha: 8}}\nbatch: 2\nwarmup: 1\n"
        f"max_len: {WORDS if name == 'sees' else wan.TOKENS}\ndata: {data}\nheld_out: {data}\n"
    )
    for steps in (2, 3):
        assert cli.main(["sft", str(path), f"num_steps={steps}", *more]) == 0
        assert f"'step': {steps}" in capsys.readouterr().out
    tuned = load_velocity(models(name))
    load_loras(tuned, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        (
            "two",
            {},
            r"has two transformers, one at flow times from 0\.7 on .*: train one at a time, side=high",
        ),
        ("plain", {"side": "low"}, r"side is low, and .* has one transformer, for all times: leave side out"),
        ("plain", {"tell_first_frame": True}, "tell_first_frame is given, but the model takes prompts alone"),
        ("channels", {"tell_first_frame": False}, "makes videos of a first frame: set tell_first_frame"),
        ("sees", {"max_len": 8}, "needs prompts of 512 tokens, got max_len 8: set max_len to 512"),
        ("kept", {"tell_first_frame": True, "first_weight": 2.0}, "told and not learnt: leave it 1"),
    ],
)
def test_what_cannot_be_finetuned_is_refused_in_one_line(recipe_of, name, more, message):
    with pytest.raises(ValueError, match=message) as error:
        finetune(recipe_of(name, **more), print)
    assert "\n" not in str(error.value)


def test_clips_that_do_not_fit_are_refused_in_one_line(recipe_of):
    recipe = recipe_of("kept", tell_first_frame=True)
    with pytest.raises(ValueError, match="nothing is left to learn: give them 5 or more"):
        role_of(replace(recipe, data=replace(recipe.data, frames=1)))
    with pytest.raises(ValueError, match="sides that are multiples of 32, got 5 of 48 x 64"):
        role_of(replace(recipe, data=replace(recipe.data, height=48)))
    with pytest.raises(ValueError, match="leave them out beside `new`"):
        SftRecipe(new=WanSize(), side="low")
