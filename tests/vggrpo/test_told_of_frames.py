"""Every command on a Wan that is told of first frames, or has two transformers: it does what diffusers does, or says in
one line that it does not."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import WanImageToVideoPipeline, WanPipeline
from safetensors.torch import load_file, save_file

from geometry.backbone import HookedBackbone
from geometry.latent import Connector, LatentGeometryModel
from geometry.models.tiny import TinyConfig, TinyGeometry, call, parse, spec
from tests.vggrpo import test_wan as wan
from vggrpo import cli, curve
from vggrpo.build import trainable_times
from vggrpo.checkpoint import trained_weights
from vggrpo.config import LoraSize, NftConfig, SamplingConfig
from vggrpo.nft import nft_backward, nft_loss, optimality
from vggrpo.policy.first_frame import WORDS, kept_latents, put_first, with_first_frames
from vggrpo.policy.flow_policy import FlowPolicy, frozen_copy, lora_off, rows
from vggrpo.policy.lora import WEIGHTS
from vggrpo.policy.wan import WanVelocity
from vggrpo.policy.wan_folder import adapt, load_loras, load_velocity, save_loras
from vggrpo.recipe import load_recipe
from vggrpo.runtime import Run
from vggrpo.sample import load_models, sample_videos
from vggrpo.sample_config import SampleConfig
from vggrpo.sampler import Window, normal
from vggrpo.stitch.clips import check_generator
from vggrpo.stitch.load import read_latent_spec
from vggrpo.stitch.recipe import SamplingRecipe
from vggrpo.types import Condition, Streams

ROOT = Path(__file__).parents[2]
SMALL = TinyConfig(dim=48, pairs=(1, 1), registers=1)


def lgm_of(folder: Path) -> LatentGeometryModel:
    """One for the latents of this Wan, which nobody trained."""
    torch.manual_seed(0)
    backbone = HookedBackbone(TinyGeometry(SMALL), spec(SMALL), call, parse).eval()
    latent = read_latent_spec(folder / "vae")
    connector = Connector(latent, backbone.spec.dim, split=latent.space_stride // SMALL.patch)
    torch.nn.init.normal_(connector.conv.weight, std=0.1)
    return LatentGeometryModel(backbone, backbone.spec.stitch_points[-1], connector).eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def judged(monkeypatch):
    monkeypatch.setattr("vggrpo.stitch.load.load_lgm", lambda lgm, geometry, vae, *more: lgm_of(Path(vae).parent))
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A Wan2.2-TI2V-5B, a Wan2.1-I2V, and two pictures and prompts."""
    folder = tmp_path_factory.mktemp("told")
    wan.wan22(WanImageToVideoPipeline, folder / "kept")
    wan.save_i2v(folder / "channels")
    (folder / "frames").mkdir()
    wan.picture().save(folder / "frames/a.png")
    wan.picture().transpose(0).save(folder / "frames/b.png")
    (folder / "prompts.txt").write_text(f"{wan.PROMPTS[0]}\n{wan.PROMPTS[0]}\n")
    return folder


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return wan.save_moe(tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def loras(moe, tmp_path_factory):
    """A LoRA for each of its transformers, with the network that has them."""
    network, folder = load_velocity(moe), tmp_path_factory.mktemp("loras")
    adapt(network, LoraSize(4, 12), "both", torch.tensor([0.9, 0.1]), 1)
    torch.manual_seed(1)
    for name, weight in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    save_loras(network, folder)
    return network.eval(), folder


def config(model: Path, prompts: Path, **more: object) -> SampleConfig:
    size = {"frames": 5, "height": 32, "width": 64, "num_steps": wan.STEPS, "guidance_scale": wan.SCALE}
    settings = size | {"max_len": wan.TOKENS, "negative_prompt": wan.PROMPTS[1]} | more
    return SampleConfig(model=str(model), prompts=str(prompts), out="nowhere", **settings)


def sampled(cfg: SampleConfig) -> list[torch.Tensor]:
    """On diffusers' own grid."""
    prompts = [wan.PROMPTS[0]] * 2
    models = load_models(cfg, prompts)._replace(grid=wan.euler_grid(Path(cfg.model)))
    return [one.z0[None] for one in sample_videos(models, prompts, cfg)]


def noise_of(shape: tuple[int, ...], b: int) -> torch.Tensor:
    return wan.normal((1, *shape), [wan.Streams(0, 0).member(b, 0)])


@pytest.mark.parametrize(("way", "tokens", "shape"), [("kept", 8, (48, 1, 2, 4)), ("channels", WORDS, (16, 2, 4, 8))])
def test_a_picture_for_each_prompt_is_sampled_as_diffusers_samples_it_bit_for_bit(told, way, tokens, shape):
    folder, frames = told / way, str(told / "frames")
    found = sampled(config(folder, told / "prompts.txt", first_frames=frames, max_len=tokens))
    pictures = [wan.picture(), wan.picture().transpose(0)]
    for b, picture in enumerate(pictures):
        z = noise_of(shape, b)
        z = torch.cat([torch.zeros(1, 48, 1, 2, 4), z], dim=2) if way == "kept" else z
        expected = wan.piped(WanImageToVideoPipeline, folder, z, tokens, image=picture)
        assert torch.equal(found[b], expected)
        other = wan.piped(WanImageToVideoPipeline, folder, z, tokens, image=pictures[1 - b])
        assert not torch.allclose(found[b], other, atol=1e-4)  # the control: the other prompt's picture


def test_a_picture_and_two_transformers_are_sampled_as_diffusers_samples_them_bit_for_bit(told, tmp_path):
    """Wan2.2-I2V-A14B."""
    torch.manual_seed(0)
    two = {name: wan.transformer(36, out_channels=16) for name in ("transformer", "transformer_2")}
    folder = wan.saved(tmp_path, WanImageToVideoPipeline, vae=wan.vae(), boundary_ratio=0.7, **two)
    found = sampled(config(folder, told / "prompts.txt", first_frames=str(told / "frames")))[0]
    z = noise_of((16, 2, 4, 8), 0)
    assert torch.equal(found, wan.piped(WanImageToVideoPipeline, folder, z, image=wan.picture()))
    shutil.rmtree(folder / "transformer_2")
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    again = sampled(config(folder, told / "prompts.txt", first_frames=str(told / "frames")))[0]
    assert not torch.allclose(again, found, atol=1e-4)  # the control: the first one at all times


def test_best_of_and_guidance_know_of_a_first_frame_that_is_kept(told):
    folder = told / "kept"
    kept = kept_latents(wan.load_vae(folder), wan.first_frame()[0])
    how = {"first_frames": str(told / "frames")}
    (plain, _), (guided, _), (best, _) = (
        sampled(config(folder, told / "prompts.txt", **how, **more))
        for more in ({}, {"guidance_geometry": 1.0, "guide_every": 1}, {"best_of": 2})
    )
    for z0 in (plain, guided, best):
        assert z0.shape == (1, 48, 2, 2, 4)
        torch.testing.assert_close(z0[:, :, :1], kept)
    assert not torch.equal(plain, guided)


def test_the_command_samples_from_pictures(told, tmp_path):
    words = ["sample", "--model", str(told / "kept"), "--prompts", str(told / "prompts.txt"), "--out", str(tmp_path)]
    size = ["--frames", "5", "--height", "32", "--width", "64", "--max-len", "8", "--num-steps", "2"]
    assert cli.main([*words, *size, "--first-frames", str(told / "frames")]) == 0
    assert len(json.loads((tmp_path / "samples.json").read_text())) == 2
    assert load_file(tmp_path / "000.safetensors")["z0"].shape == (48, 2, 2, 4)


def test_two_transformers_and_their_loras_are_sampled_as_diffusers_samples_them(moe, loras, tmp_path):
    network, folder = loras
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join([wan.PROMPTS[0]] * 2))
    z = noise_of((16, 2, 4, 8), 0)
    assert torch.equal(sampled(config(moe, prompts))[0], wan.piped(WanPipeline, moe, z))

    def piped(*parts: str) -> torch.Tensor:
        pipe = WanPipeline.from_pretrained(moe, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        for part in parts:
            where = folder / part if part else folder
            pipe.load_lora_weights(where, weight_name=WEIGHTS, load_into_transformer_2=bool(part))
        words = {"prompt": wan.PROMPTS[0], "negative_prompt": wan.PROMPTS[1], "max_sequence_length": wan.TOKENS}
        how = {"num_inference_steps": wan.STEPS, "guidance_scale": wan.SCALE, "latents": z, "output_type": "latent"}
        return pipe(**words, **how, **wan.SIZE).frames

    found = sampled(config(moe, prompts, lora=str(folder)))[0]
    text, negative = wan.texts(moe)
    in_memory = wan.draw(network, z, text, negative, wan.euler_grid(moe), wan.SCALE)
    torch.testing.assert_close(found, in_memory, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(piped("", "transformer_2"), in_memory, rtol=1e-5, atol=1e-5)
    for some in ([], [""], ["transformer_2"]):  # the controls: without one of the two, or both
        assert (piped(*some) - in_memory).abs().max() > 1e-3
    low = tmp_path / "low"  # a run that trains at low noise leaves no other
    shutil.copytree(folder / "transformer_2", low / "transformer_2")
    alone = sampled(config(moe, prompts, lora=str(low)))[0]
    torch.testing.assert_close(alone, piped("transformer_2"), rtol=1e-5, atol=1e-5)


def test_checkpoints_of_two_transformers_are_judged_with_their_weights(moe, loras, tmp_path):
    network, _ = loras
    save_file({name: x.contiguous() for name, x in trained_weights(network).items()}, tmp_path / "weights.safetensors")
    lora = ["video.lora.rank=4", "video.lora.alpha=12", f"video.model={moe}", "video.lora_on=both"]
    window = ["sampling.num_steps=6", "sampling.shift=3.0", "sampling.window.kind=fixed", "sampling.window.start=0",
              "sampling.window.size=5", "sampling.window.stop=null"]  # fmt: skip
    recipe = load_recipe("launch/recipes/tiny.yaml", [*lora, *window])
    assert len(trainable_times(recipe.sampling)) == 5
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join([wan.PROMPTS[0]] * 2))
    models = load_models(config(moe, prompts), [wan.PROMPTS[0]])
    tuned = curve._with_weights(models, tmp_path / "weights.safetensors", recipe, "cpu").network
    z, text = noise_of((16, 2, 4, 8), 0), wan.texts(moe)[0]
    for t in (0.9, 0.2):
        with torch.no_grad():
            said, wanted, base = (one(z, torch.tensor([t]), text) for one in (tuned, network, models.network))
        torch.testing.assert_close(said, wanted)
        assert (said - base).abs().max() > 1e-3


def test_diffusion_nft_leaves_a_first_frame_that_is_kept_out_of_its_loss(told):
    folder = told / "kept"
    network = load_velocity(folder)
    adapt(network, LoraSize(2, 2), "high", torch.tensor([0.5]), 1)
    text, negative = wan.texts(folder)
    frames = torch.cat([wan.first_frame(), torch.ones(1, 3, 32, 64)])
    known = {"yes": text, "": negative}
    encode = with_first_frames(
        lambda cond: torch.cat([known[prompt] for prompt in cond.prompt]), "kept", wan.load_vae(folder), 5, None, frames
    )
    cfg = SamplingConfig(num_steps=3, window=Window(1), micro_batch=3)
    policy = FlowPolicy(frozen_copy(network), encode, (48, 1, 2, 4), cfg, lora_off(network), complete=put_first)
    run, streams = Run(Accelerator(cpu=True), 2, 2), Streams(0, 0)
    with torch.no_grad():
        rollout = policy.rollout(Condition(["yes", "yes"], frames), 2, streams)
    advantage, nft = torch.tensor([[2.0, -1.0], [0.5, -3.0]]), NftConfig(num_times=1)
    found = nft_backward(policy, network, rollout, advantage, streams, run, nft)
    grads = [weight.grad for weight in network.parameters() if weight.requires_grad and weight.grad is not None]
    assert max(float(grad.abs().max()) for grad in grads) > 0
    total, told_of = 0.0, encode(Condition(["yes", "yes"], frames))
    for b in range(2):  # by hand, one sample at a time, from what comes after the first frame
        for k in range(2):
            rng, z0 = streams.noising(b, k), rollout.z0[b, k, None, :, 1:]
            t = torch.rand(1, generator=rng)
            eps = normal(z0.shape, [rng])
            z_t = (1 - t) * z0 + t * eps
            with torch.no_grad():
                v = network(z_t, t, tuple(part[b : b + 1] for part in told_of))
            r = optimality(advantage[b : b + 1, k])
            total += float(5 * nft_loss(v, v, z0, z_t, t, r, nft.beta).sum()) / 4
    assert found == pytest.approx(total, rel=5e-6)
    other = dataclasses.replace(rollout.trajectory, cond=rows(rollout.trajectory.cond, torch.tensor([2, 3, 0, 1])))
    wrong = nft_backward(policy, network, dataclasses.replace(rollout, trajectory=other), advantage, streams, run, nft)
    assert abs(wrong - total) > 3e-5 * total  # the control: each other's first frames


def refused(message: str, cfg: SampleConfig) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_models(cfg, [wan.PROMPTS[0]])
    assert "\n" not in str(error.value)


def test_pictures_that_do_not_fit_are_refused_in_one_line(told, moe, tmp_path):
    prompts, frames = told / "prompts.txt", str(told / "frames")
    refused("makes videos of a first frame: set --first-frames", config(told / "channels", prompts))
    refused("--first-frames is given, but the model takes prompts alone", config(moe, prompts, first_frames=frames))
    one = shutil.copytree(told / "frames", tmp_path / "frames")
    (one / "a.png").unlink()
    refused(r"must hold 2 pictures .* names, got 1", config(told / "kept", prompts, first_frames=str(one)))
    (one / "c.png").write_text("no picture")
    refused(r"cannot read .*c\.png as a picture", config(told / "kept", prompts, first_frames=str(one)))
    refused("cannot read first frames from nowhere", config(told / "kept", prompts, first_frames="nowhere"))
    clip = config(told / "channels", prompts, first_frames=frames)
    with pytest.raises(ValueError, match="needs prompts of 512 tokens, got max_len 8: set max_len to 512"):
        next(sample_videos(load_models(clip, [wan.PROMPTS[0]]), [wan.PROMPTS[0]], clip))


def test_a_lora_of_another_model_is_refused_in_one_line(told, moe, loras, tmp_path):
    _, folder = loras
    prompts = told / "prompts.txt"
    both = config(told / "kept", prompts, lora=str(folder))
    refused("is a LoRA of a second transformer, and the model has one", both)
    torch.manual_seed(0)
    wide = wan.saved(tmp_path / "wide", WanPipeline, transformer=wan.transformer(num_attention_heads=3), vae=wan.vae())
    shutil.copytree(folder, tmp_path / "one", ignore=shutil.ignore_patterns("transformer_2"))
    one = config(wide, prompts, lora=str(tmp_path / "one"))
    refused(r"is a LoRA of another model: blocks\.\d\.attn\d\..* has 24 channels in it, .* has 36 there; give it", one)
    thin = wan.saved(tmp_path / "thin", WanPipeline, transformer=wan.transformer(num_layers=1), vae=wan.vae())
    fewer = config(thin, prompts, lora=str(tmp_path / "one"))
    refused(r"this transformer has no such map; give it to the model", fewer)
    save_file({"unet.x": torch.zeros(1)}, tmp_path / "one" / WEIGHTS)
    refused(r"holds unet\.x: it must be a Wan's LoRA in diffusers' form", one)
    (tmp_path / "one" / WEIGHTS).write_text("no tensors")
    refused(r"cannot read .*pytorch_lora_weights\.safetensors", one)
    with pytest.raises(ValueError, match="it is not the folder of a LoRA"):
        load_loras(load_velocity(moe), tmp_path)


def test_the_recipe_of_the_embedded_stack_refuses_them_in_one_line(told, moe):
    for folder, why in ((moe, "has two transformers"), (told / "channels", "makes videos of a first frame, which")):
        with pytest.raises(ValueError, match=f"{why}.* the recipe of the embedded stack") as error:
            check_generator(folder, SamplingRecipe(num_samples=1))
        assert "\n" not in str(error.value)


PLAN = ["sampling.num_steps=6", "sampling.shift=3.0", "sampling.window.kind=fixed", "sampling.window.stop=5",
        "video.frames=5", "video.height=32", "video.width=64", "video.motion_samples=0", "grpo.group_size=2",
        "grpo.num_prompts=2", "sampling.guidance_scale=1", "sampling.window.size=1",
        "sampling.share_noise=false"]  # fmt: skip


def plan_of(folder: Path, prompts: Path, capsys, *more: str, status: int = 0) -> str:
    words = ["plan", "launch/recipes/tiny.yaml", f"video.model={folder}", f"video.prompts={prompts}", *PLAN, *more]
    capsys.readouterr()
    assert cli.main(words) == status
    return capsys.readouterr().out if status == 0 else capsys.readouterr().err


def counted(folder: Path, on: str, rank: int) -> tuple[int, int]:
    """Parameters of a transformer, and of the LoRA that it is given."""
    network = load_velocity(folder)
    frozen = sum(weight.numel() for weight in network.transformer.parameters())
    adapt(network, LoraSize(rank, rank), on, torch.tensor([0.9 if on == "high" else 0.1]), 1)
    return frozen, sum(weight.numel() for weight in network.parameters() if weight.requires_grad)


@pytest.mark.parametrize(("on", "start"), [("high", 0), ("low", 4)])
def test_a_plan_of_two_transformers_says_which_steps_ask_which_and_a_step_does_so(
    told, moe, capsys, monkeypatch, on, start
):
    asked: list[tuple[float, bool]] = []
    real = WanVelocity.at

    def at(self, t):
        found = real(self, t)
        if self.boundary is not None:
            asked.extend((float(x), found is self.transformer) for x in t)
        return found

    monkeypatch.setattr(WanVelocity, "at", at)
    where = [f"video.lora_on={on}", f"sampling.window.start={start}", "video.lora.rank=3"]
    said = plan_of(moe, told / "prompts.txt", capsys, *where)
    frozen, trained = counted(moe, on, 3)
    assert f": 2 x {frozen:,} parameters, and {trained:,} of a LoRA to train" in said
    assert f"transformers 2, both held: 4 of 6 steps ask the one from 0.7 on, 2 the other; LoRA on {on}" in said
    assert "rollout 24, replay 4, reference 4" in said
    assert len({t for t, high in asked if high}) == 4
    assert len({t for t, high in asked if not high}) == 2
    assert len(asked) == 24 + 4 + 4
    other = "low" if on == "high" else "high"
    said = plan_of(moe, told / "prompts.txt", capsys, *where, f"video.lora_on={other}", "--no-step", status=2)
    assert f"video.lora_on is {other}, but the steps of sampling.window lie on the side {on}" in said
    assert said.count("\n") == 1


def test_a_plan_of_first_frames_counts_their_channels_and_what_is_seen(told, capsys):
    folder, prompts = told / "channels", told / "prompts.txt"
    frames = [f"video.first_frames={told}/frames", "video.lora.rank=3", "sampling.window.start=0"]
    said = plan_of(folder, prompts, capsys, *frames, f"video.max_len={WORDS}")
    frozen, trained = counted(folder, "high", 3)
    assert f": {frozen:,} parameters, and {trained:,} of a LoRA to train" in said
    assert f"first frame  {20 * 2 * 4 * 8:,} numbers beside a video's latents, and 5 tokens of what CLIP sees" in said
    assert "blocks were measured" in said
    assert "measured     trainable parameters" in said
    for more, message in (
        ([*frames, "video.max_len=8"], "needs prompts of 512 tokens, got max_len 8: set max_len to 512"),
        (frames[1:], "makes videos of a first frame: set video.first_frames"),
    ):
        said = plan_of(folder, prompts, capsys, *more, "--no-step", status=2)
        assert message in said
        assert said.count("\n") == 1


def test_a_plan_of_a_model_that_keeps_a_first_frame_makes_a_step(told, capsys):
    more = [f"video.first_frames={told}/frames", "sampling.window.start=0", "video.max_len=8"]
    said = plan_of(told / "kept", told / "prompts.txt", capsys, *more)
    assert "latents 48x2x2x4: 4 tokens" in said
    assert "measured     trainable parameters" in said
