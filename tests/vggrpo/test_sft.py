"""The finetuner learns what it is shown, in diffusers' own convention of time, and resumes to the bit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.embeddings import Timesteps

from vggrpo.bootstrap.text import build_encoder, build_tokenizer
from vggrpo.bootstrap.vae import build_vae
from vggrpo.cli import main
from vggrpo.data import Encoded
from vggrpo.flow import euler_step, interpolate
from vggrpo.policy.encoders import load_encoders
from vggrpo.policy.wan import wan_velocity
from vggrpo.recipe import read_recipe
from vggrpo.sampler import ode_sample, time_grid
from vggrpo.sft import (
    draw_times,
    flow_loss,
    load_transformer,
    measure_sft,
    new_transformer,
    rate,
    save_result,
    sft_step,
    start_sft,
    train_sft,
)
from vggrpo.sft_config import LoraSize, SftRecipe, WanSize

TINY = WanSize(layers=2, heads=2, head_dim=16, ffn_dim=64)
TEXTS = ["the camera pans left", "the camera pans right", "the camera stands still", "a red box bounces"]


@pytest.fixture
def recipe(tmp_path):
    return SftRecipe(
        out=str(tmp_path / "run"), new=TINY, num_steps=6, batch=8, lr=3e-3, warmup=5, average=0.9, checkpoint_every=3
    )


@pytest.fixture
def data():
    """Four latents that differ strongly, each under a caption of its own."""
    rng = torch.Generator().manual_seed(0)
    text = torch.randn(4, 6, 32, generator=rng)
    return Encoded(torch.randn(4, 4, 2, 4, 4, generator=rng), text, torch.zeros(6, 32), tuple("abcd"))


@pytest.fixture
def folder(tmp_path):
    """A whole Wan folder with tiny random widths."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(TEXTS, 12)
    transformer = new_transformer(TINY, 16, 32)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = WanPipeline(tokenizer, build_encoder(len(tokenizer), 32, 1), build_vae(8), scheduler, transformer)
    pipe.save_pretrained(tmp_path / "wan")
    return tmp_path / "wan"


def trained(recipe, data):
    training = start_sft(recipe, data)
    losses = list(train_sft(training, recipe, data, data))
    return training, losses


def test_times_are_shifted_as_the_sampler_shifts_them():
    t = draw_times(1000, 3.0, torch.Generator().manual_seed(0))
    assert torch.allclose(t, time_grid(1000, 3.0).flip(0)[1:].float(), atol=3.1e-3)
    assert ((t > 0) & (t < 1)).all()
    assert abs(draw_times(1000, 1.0, torch.Generator().manual_seed(0)).mean() - 0.5) < 1e-3
    assert t.mean() > 0.6, "a shift of 3 goes to the noise"


def test_the_learning_rate_rises_stays_and_falls_to_nothing(recipe, data):
    recipe = replace(recipe, num_steps=100, warmup=10, cooldown=0.4)
    rates = [rate(step, recipe) for step in range(100)]
    assert rates[:11] == pytest.approx([min(1, (step + 1) / 10) for step in range(11)])
    assert rates[9:61] == [1.0] * 52
    assert rates[60:] == pytest.approx([(100 - step) / 40 for step in range(60, 100)])
    assert rate(99, replace(recipe, cooldown=0.0)) == 1
    made = start_sft(recipe, data)
    made.step = 80
    sft_step(made, recipe, data)
    assert made.optimizer.param_groups[0]["lr"] == pytest.approx(recipe.lr / 2)


def test_a_run_may_be_made_longer_and_says_so(recipe, data):
    trained(recipe, data)
    longer, losses = trained(replace(recipe, num_steps=8), data)
    assert len(losses) == 2
    assert longer.plans == [[0, 6], [6, 8]]


def test_noising_and_steps_are_those_of_diffusers_scheduler(data):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    eps = torch.randn(data.z0.shape, generator=torch.Generator().manual_seed(1))
    for s, timestep in enumerate(scheduler.timesteps):
        t, t_next = scheduler.sigmas[s], scheduler.sigmas[s + 1]
        assert torch.isclose(timestep, 1000 * t)
        z_t = interpolate(data.z0, eps, t)
        assert torch.allclose(z_t, scheduler.scale_noise(data.z0, timestep[None], eps), atol=1e-5)
        theirs = scheduler.step(eps - data.z0, timestep, z_t).prev_sample
        assert torch.allclose(theirs, euler_step(z_t, eps - data.z0, t, t_next), atol=1e-5)
        assert torch.allclose(theirs, interpolate(data.z0, eps, t_next), atol=1e-5)


def test_our_sampler_under_the_adapter_gives_the_pipelines_own_latents(folder):
    pipe = WanPipeline.from_pretrained(folder, local_files_only=True)
    encoders = load_encoders(folder, 12, "cpu")
    noise = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    theirs = pipe(
        TEXTS[0],
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=4,
        guidance_scale=1.0,
        max_sequence_length=12,
        latents=noise,
        output_type="latent",
    ).frames
    text, grid = encoders.text(TEXTS[:1]), pipe.scheduler.sigmas
    with torch.no_grad():
        ours = ode_sample(lambda z, t: wan_velocity(pipe.transformer, z, t.expand(1), text), noise, grid)
        unscaled = ode_sample(lambda z, t: wan_velocity(pipe.transformer, z, t.expand(1) / 1000, text), noise, grid)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(unscaled, theirs, atol=1e-3), "the control: t in [0, 1] handed on as it is"


def test_the_network_is_asked_at_0_to_1000_and_we_at_0_to_1(recipe, data):
    training, seen = start_sft(recipe, data), []
    for module in training.network.modules():
        if isinstance(module, Timesteps):
            module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    flow_loss(training, recipe, data.z0, data.z0, t, (data.text,))
    assert torch.equal(seen[0], 1000 * t)


def test_a_perfect_velocity_has_no_loss(recipe, data, monkeypatch):
    eps = torch.randn(data.z0.shape, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.1, 0.4, 0.7, 1.0])

    def velocity_of(sign):
        return lambda network, z_t, t, text, image: sign * (z_t - data.z0) / t.view(-1, 1, 1, 1, 1)

    for sign, least, most in ((1, 0, 1e-9), (-1, 1, 100)):
        monkeypatch.setattr("vggrpo.policy.wan.wan_velocity", velocity_of(sign))
        loss = flow_loss(start_sft(recipe, data), recipe, data.z0, eps, t, (data.text,))
        assert ((least <= loss) & (loss <= most)).all()


def test_it_learns_a_handful_of_latents_and_which_caption_belongs_to_which(recipe, data):
    recipe = replace(recipe, num_steps=240, batch=16, drop_caption=0.0, average=0.95, checkpoint_every=240)
    training = start_sft(recipe, data)
    before = measure_sft(training, recipe, data)
    list(train_sft(training, recipe, data, data))
    after = training.curve[-1]
    assert after["loss"] < 0.35 * before["loss"], (before, after)
    assert after["other_captions"] > 1.5 * after["loss"], "captions are ignored"
    assert abs(before["other_captions"] / before["loss"] - 1) < 0.05, "untrained, captions cannot matter"
    assert after["by_time"][-1] < 0.35 * before["by_time"][-1], "near noise only the caption tells"
    training.swap_average()
    noise = torch.randn(data.z0.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        z0 = ode_sample(
            lambda z, t: wan_velocity(training.network, z, t.expand(4), data.text), noise, time_grid(8, 3.0)
        )
    assert torch.cdist(z0.flatten(1), data.z0.flatten(1)).argmin(1).tolist() == [0, 1, 2, 3], "samples follow captions"


def test_a_channel_counts_by_its_weight(recipe, data, monkeypatch):
    seen = []

    def spy(*args):
        seen.append(flow_loss(*args))
        return seen[-1]

    monkeypatch.setattr("vggrpo.sft.flow_loss", spy)
    plain = sft_step(start_sft(recipe, data), recipe, data)
    weighted = sft_step(start_sft(recipe, data), replace(recipe, channel_weights=[6.0, 1.0, 0.5, 0.5]), data)
    assert torch.equal(*seen), "the same batch"
    assert plain == pytest.approx(seen[0].mean().item())
    assert weighted == pytest.approx((seen[0].mean(2) @ torch.tensor([3.0, 0.5, 0.25, 0.25])).mean().item() / 4)
    assert measure_sft(start_sft(recipe, data), recipe, data) == measure_sft(
        start_sft(recipe, data), replace(recipe, channel_weights=[6.0, 1.0, 0.5, 0.5]), data
    ), "what is reported can be compared"


def test_the_first_latent_frame_counts_by_its_weight(recipe, data, monkeypatch):
    seen = []

    def spy(*args):
        seen.append(flow_loss(*args))
        return seen[-1]

    monkeypatch.setattr("vggrpo.sft.flow_loss", spy)
    weighted = sft_step(start_sft(recipe, data), replace(recipe, first_weight=3.0), data)
    first, second = seen[0].mean((0, 1)).tolist()
    assert weighted == pytest.approx((1.5 * first + 0.5 * second) / 2)


def test_a_dropped_caption_is_the_negative_prompt(recipe, data, monkeypatch):
    seen = []

    def spy(training, recipe, z0, eps, t, told):
        seen.append(told[0])
        return flow_loss(training, recipe, z0, eps, t, told)

    monkeypatch.setattr("vggrpo.sft.flow_loss", spy)
    training = start_sft(recipe, data)
    for _ in range(20):
        sft_step(training, replace(recipe, drop_caption=0.5), data)
    share = (torch.cat(seen) == 0).all(-1).all(-1).float().mean()
    assert 0.35 < share < 0.65


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("lora", [None, LoraSize(rank=4, alpha=8)])
def test_a_resumed_run_is_the_uninterrupted_one(recipe, data, folder, lora, optimizer, tmp_path):
    recipe = replace(recipe, optimizer=optimizer)
    if lora is not None:
        recipe = replace(recipe, model=str(folder), new=None, lora=lora)
        data = replace(data, z0=data.z0.repeat(1, 4, 1, 1, 1))
    whole, losses = trained(replace(recipe, out=str(tmp_path / "whole")), data)
    cut = replace(recipe, out=str(tmp_path / "cut"))
    training = start_sft(cut, data)
    for _ in train_sft(training, cut, data, data):
        if training.step == 4:  # the last checkpoint is of step 3
            break
    torch.rand(7)  # the global stream is elsewhere now
    resumed, rest = trained(cut, data)
    assert rest == losses[3:]
    assert resumed.curve == whole.curve
    for (name, one), (_, other) in zip(whole.trained(), resumed.trained(), strict=True):
        assert torch.equal(one, other), name
        assert torch.equal(whole.average[name], resumed.average[name]), name
    other, _ = trained(replace(recipe, out=str(tmp_path / "other"), seed=1), data)
    assert not all(torch.equal(a, b) for (_, a), (_, b) in zip(whole.trained(), other.trained(), strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_weight_has_the_schedules_learning_rate(recipe, data, optimizer):
    recipe = replace(recipe, optimizer=optimizer)
    training = start_sft(recipe, data)
    sft_step(training, recipe, data)
    groups = training.optimizer.param_groups
    assert len(groups) == (2 if optimizer == "muon" else 1)
    assert {group["lr"] for group in groups} == {recipe.lr * rate(0, recipe)} != {recipe.lr}


def test_a_checkpoint_of_another_recipe_is_refused(recipe, data):
    trained(recipe, data)
    with pytest.raises(ValueError, match=r"was made with shift 3.0 and the recipe says 5.0: restore it"):
        start_sft(replace(recipe, shift=5.0), data)
    start_sft(replace(recipe, checkpoint_every=7), data)


def test_measuring_leaves_weights_average_and_random_numbers_alone(recipe, data):
    training = start_sft(recipe, data)
    sft_step(training, recipe, data)
    before = {name: (weight.detach().clone(), training.average[name].clone()) for name, weight in training.trained()}
    state = torch.get_rng_state()
    assert measure_sft(training, recipe, data) == measure_sft(training, recipe, data)
    assert torch.equal(torch.get_rng_state(), state)
    for name, weight in training.trained():
        assert torch.equal(weight, before[name][0])
        assert torch.equal(training.average[name], before[name][1])
    assert any(not torch.equal(*pair) for pair in before.values()), "the average is the weights: nothing was swapped"


def test_lora_starts_at_the_model_trains_little_and_loads_at_its_scale(recipe, data, folder):
    data = replace(data, z0=data.z0.repeat(1, 4, 1, 1, 1))
    recipe = replace(recipe, model=str(folder), new=None, lora=LoraSize(rank=4, alpha=12), lr=1e-2, num_steps=20)
    base, t = load_transformer(folder), torch.full((4,), 0.5)
    training = start_sft(recipe, data)
    names = [name for name, _ in training.trained()]
    assert names
    assert all("lora_" in name for name in names)
    with torch.no_grad():
        plain = wan_velocity(base.eval(), data.z0, t, data.text)
        assert torch.allclose(wan_velocity(training.network.eval(), data.z0, t, data.text), plain, atol=1e-6)
    list(train_sft(training, recipe, data, data))
    out = save_result(training, recipe)
    training.swap_average()
    with torch.no_grad():
        tuned = wan_velocity(training.network.eval(), data.z0, t, data.text)
        pipe = WanPipeline.from_pretrained(folder, local_files_only=True)
        pipe.load_lora_weights(out, weight_name="pytorch_lora_weights.safetensors")
        loaded = wan_velocity(pipe.transformer.eval(), data.z0, t, data.text)
    assert (tuned - plain).abs().max() > 1e-2
    assert torch.allclose(loaded, tuned, atol=1e-5)


def test_weights_that_are_frozen_are_held_in_bf16_and_what_is_trained_in_fp32(recipe, data, folder, tmp_path):
    data = replace(data, z0=data.z0.repeat(1, 4, 1, 1, 1))
    whole = replace(recipe, model=str(folder), new=None, num_steps=20, checkpoint_every=20)
    lora = replace(whole, lora=LoraSize(rank=4, alpha=8), lr=2e-2)

    def run(name, recipe):
        return trained(replace(recipe, out=str(tmp_path / name)), data)

    full, losses = run("full", lora)
    half, found = run("half", replace(lora, bf16=True))
    keeps = half.network._keep_in_fp32_modules
    for name, weight in half.network.named_parameters():
        held = weight.requires_grad or any(part in name for part in keeps)
        assert weight.dtype == (torch.float32 if held else torch.bfloat16), name
        assert weight.requires_grad == ("lora_" in name)
    moments = [x for state in half.optimizer.state.values() for x in state.values()]
    assert {x.dtype for x in (*moments, *half.average.values())} == {torch.float32}
    assert found == pytest.approx(losses, rel=5e-3)
    assert found != losses
    _, slower = run("slower", replace(lora, bf16=True, lr=1e-2))
    assert slower != pytest.approx(losses, rel=5e-3), "the control: what is learnt can be told apart"
    assert {weight.dtype for weight in full.network.parameters()} == {torch.float32}
    start = start_sft(replace(whole, bf16=True, out=str(tmp_path / "whole")), data)
    assert {weight.dtype for weight in start.network.parameters()} == {torch.float32}, "all are trained"


def test_recomputing_in_the_backward_pass_changes_nothing(recipe, data, tmp_path):
    _, losses = trained(recipe, data)
    _, again = trained(replace(recipe, out=str(tmp_path / "again"), gradient_checkpointing=True), data)
    assert again == pytest.approx(losses, rel=1e-5)


def test_a_folder_without_what_is_needed_is_one_line(recipe, data, tmp_path):
    with pytest.raises(ValueError, match=r"has no transformer/: give `new` a size"):
        start_sft(replace(recipe, model=str(tmp_path), new=None), data)
    with pytest.raises(ValueError, match=r"has no vae/: it must be a Wan model in diffusers layout"):
        load_encoders(tmp_path, 12, "cpu")


def test_a_whole_transformer_is_saved_as_its_average(recipe, data):
    training, _ = trained(recipe, data)
    stored = WanTransformer3DModel.from_pretrained(save_result(training, recipe), local_files_only=True)
    for name, weight in stored.named_parameters():
        assert torch.equal(weight, training.average[name])


def test_the_command_goes_from_a_folder_of_a_model_to_a_finetuned_one(folder, tmp_path, capsys):
    path = tmp_path / "sft.yaml"
    path.write_text(
        f"model: {folder}\nout: {tmp_path / 'out'}\nlora: {{rank: 4, alpha: 8}}\nnum_steps: 2\nbatch: 2\nmax_len: 12\n"
        f"data: {{num_clips: 2, cache: {tmp_path / 'cache'}}}\n"
        f"held_out: {{num_clips: 2, first_seed: 9, cache: {tmp_path / 'cache'}}}\n"
    )
    assert main(["sft", str(path)]) == 0
    assert "'step': 2" in capsys.readouterr().out
    assert (tmp_path / "out/pytorch_lora_weights.safetensors").is_file()
    assert main(["sft", str(path), f"model={tmp_path / 'nowhere'}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_shipped_recipe_loads_and_says_how_to_run_it():
    path = Path(__file__).parents[2] / "launch/recipes/sft/lora.yaml"
    assert read_recipe(SftRecipe, path).lora == LoraSize(rank=32, alpha=64)
    assert "vggrpo sft launch/recipes/sft/lora.yaml" in path.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("new: {}\nlora: {}", "give `new` or `lora`, not both"),
        ("channel_weights: [1.0, 0.0]", "channel_weights must be > 0"),
        ("shift: 0", "shift, lr and max_grad_norm must be > 0"),
        ("data: {frames: 16, videos: x}", r"data: frames must be 4 n \+ 1"),
        ("lora: {rnk: 3}", "unknown key 'lora.rnk': did you mean 'rank'"),
        ("data: {negative_prompt: blurry}", "one negative_prompt"),
    ],
)
def test_an_impossible_recipe_is_one_line(tmp_path, text, message):
    path = tmp_path / "sft.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_recipe(SftRecipe, path)
