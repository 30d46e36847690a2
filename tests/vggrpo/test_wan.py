"""Our samplers on a Wan folder give what diffusers' pipelines give, for every family of Wan, at tiny random widths.

Folders are saved and loaded as those of the hub are.
"""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanPipeline
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoTokenizer

from vggrpo.build import Parts, build
from vggrpo.config import LoraSize, SamplingConfig
from vggrpo.policy.encoders import load_encoders
from vggrpo.policy.first_frame import WORDS, free_shape, kept_latents, load_sight, put_first, with_first_frames
from vggrpo.policy.flow_policy import FlowPolicy, Network, lora_off
from vggrpo.policy.lora import add_lora, lora_targets
from vggrpo.policy.wan import WanVelocity, in_dtype, latent_shape
from vggrpo.policy.wan_folder import Layout, adapt, load_velocity, read_layout
from vggrpo.recipe import load_recipe
from vggrpo.sampler import Window, draw, normal
from vggrpo.sft import load_transformer
from vggrpo.tiny_random import narrow_sight, save_pipeline
from vggrpo.tiny_random import narrow_transformer as transformer
from vggrpo.tiny_random import narrow_vae as vae
from vggrpo.tiny_random import narrow_wide_vae as wide_vae
from vggrpo.types import Condition, Streams

SIZE = {"num_frames": 5, "height": 32, "width": 64}
STEPS, SCALE, TOKENS = 3, 3.5, 8
PROMPTS = ["a camera pans over a red cube", "blurred"]
TOKENIZER = Path(__file__).parents[2] / "assets/tiny-wan/tokenizer"


def saved(folder: Path, make: type, **parts: object) -> Path:
    """A folder as the hub has it."""
    return save_pipeline(folder, make, AutoTokenizer.from_pretrained(TOKENIZER), **parts)


def texts(folder: Path, tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompt and the negative prompt, as we encode them."""
    encoders = load_encoders(folder, tokens, "cpu")
    text, negative = (encoders.text([prompt]) for prompt in PROMPTS)
    return text, negative


def euler_grid(folder: Path) -> torch.Tensor:
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(STEPS)
    return scheduler.sigmas


def piped(make: type, folder: Path, z: torch.Tensor, tokens: int = TOKENS, **inputs: object) -> torch.Tensor:
    """diffusers' own latents, one video."""
    pipe = make.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "latents": z, "output_type": "latent"} | SIZE
    if make is WanPipeline:
        settings |= {"prompt": PROMPTS[0], "negative_prompt": PROMPTS[1], "max_sequence_length": TOKENS}
    else:  # it would need ftfy to clean prompts
        settings |= dict(zip(("prompt_embeds", "negative_prompt_embeds"), texts(folder, tokens), strict=True))
    return pipe(**settings | inputs).frames


def load_vae(folder: Path) -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(folder, subfolder="vae").eval()


def told(network: WanVelocity, *frame: torch.Tensor) -> Network:
    """The network, told of a first frame."""
    return lambda z_t, t, text: network(z_t, t, (text, *frame))


def noise(folder: Path) -> torch.Tensor:
    return torch.randn(1, *latent_shape(folder, *SIZE.values()), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def wan21(tmp_path_factory):
    torch.manual_seed(0)
    return saved(tmp_path_factory.mktemp("wan21"), WanPipeline, transformer=transformer(), vae=vae())


@pytest.mark.parametrize("scale", [1.0, SCALE])
def test_wan21_is_sampled_as_diffusers_samples_it_bit_for_bit(wan21, scale):
    z, network = noise(wan21), WanVelocity(load_transformer(wan21))
    expected = piped(WanPipeline, wan21, z, guidance_scale=scale)
    sampled = functools.partial(draw, network, z, *texts(wan21))
    found = sampled(euler_grid(wan21), scale)
    assert found.shape == (1, 16, 2, 4, 8)
    assert torch.equal(found, expected)
    # The controls: neither another scale nor a grid that is off by a thousandth gives this.
    assert not torch.allclose(sampled(euler_grid(wan21), scale + 0.1), expected, atol=1e-5)
    assert not torch.allclose(sampled(0.999 * euler_grid(wan21), scale), expected, atol=1e-5)


def test_both_branches_of_guidance_at_once_differ_by_rounding_alone(wan21):
    text, negative = texts(wan21)
    cfg = SamplingConfig(num_steps=STEPS, window=Window(1), guidance_scale=SCALE, negative_prompt="no")
    encode = {"yes": text, "no": negative}
    policy = FlowPolicy(
        WanVelocity(load_transformer(wan21)), lambda cond: encode[cond.prompt[0]], noise(wan21).shape[1:], cfg
    )
    policy.grid = euler_grid(wan21)
    streams = Streams(0, 0)
    z = normal(noise(wan21).shape, [streams.member(0, 0)])
    torch.testing.assert_close(policy.sample(Condition(["yes"]), streams), piped(WanPipeline, wan21, z))


def picture() -> Image.Image:
    pixels = torch.randint(256, (32, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    return Image.fromarray(pixels.numpy())


def first_frame() -> torch.Tensor:
    return torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None] / 255


def wan22(make: type, folder: Path) -> Path:
    """Wan2.2-TI2V-5B."""
    torch.manual_seed(0)
    return saved(folder, make, transformer=transformer(48), vae=wide_vae(), expand_timesteps=True)


@pytest.fixture(scope="module")
def wan22_i2v(tmp_path_factory):
    return wan22(WanImageToVideoPipeline, tmp_path_factory.mktemp("wan22_i2v"))


@pytest.mark.parametrize("given", [False, True], ids=["prompt alone", "first frame"])
def test_wan22_5b_is_sampled_as_diffusers_samples_it_bit_for_bit(wan22_i2v, tmp_path, given):
    make = WanImageToVideoPipeline if given else WanPipeline
    folder = wan22_i2v if given else wan22(make, tmp_path)
    z, network = noise(folder), WanVelocity(load_transformer(folder), per_token=True)
    expected = piped(make, folder, z, **({"image": picture()} if given else {}))
    frame = (kept_latents(load_vae(folder), first_frame()[0]),) if given else ()
    found = draw(told(network, *frame), z[:, :, len(frame) :], *texts(folder), euler_grid(folder), SCALE)
    if given:
        found = put_first((found, *frame), found)
    assert found.shape == (1, 48, 2, 2, 4)
    assert torch.equal(found, expected)
    plain = draw(WanVelocity(load_transformer(folder)), z, *texts(folder), euler_grid(folder), SCALE)
    assert torch.allclose(plain, expected, atol=1e-4) == (not given)  # one time for all tokens: for prompts alone


@pytest.mark.parametrize("share", [False, True])
def test_a_kept_first_frame_stays_and_has_no_part_in_likelihood_and_kl(wan22_i2v, share):
    folder = wan22_i2v
    network = WanVelocity(load_transformer(folder), per_token=True)
    add_lora(network.transformer, LoraSize(2, 2))
    vae, (text, negative) = load_vae(folder), texts(folder)
    known = {"yes": text, "no": negative}
    frames = torch.cat([first_frame(), first_frame().flip(-1)])
    encode = with_first_frames(
        lambda cond: torch.cat([known[prompt] for prompt in cond.prompt]), "kept", vae, 5, None, frames
    )
    cfg = SamplingConfig(
        num_steps=4, window=Window(2), guidance_scale=2.0, negative_prompt="no", micro_batch=3, share_noise=share
    )
    shape = free_shape(latent_shape(folder, *SIZE.values()), "kept")
    policy = FlowPolicy(network, encode, shape, cfg, lora_off(network), complete=put_first)
    rollout = policy.rollout(Condition(["yes", "no"], first_frame=frames), 2, Streams(0, 0))
    kept = torch.cat([kept_latents(vae, frame) for frame in frames])
    assert rollout.z0.shape == (2, 2, 48, 2, 2, 4)
    assert torch.equal(rollout.z0[:, :, :, :1], kept[:, None].expand(-1, 2, -1, -1, -1, -1))
    assert not torch.equal(kept[0], kept[1])
    assert rollout.trajectory.states.shape == (3, 4, 48, 1, 2, 4)
    for replay in policy.replay(rollout):
        torch.testing.assert_close(replay.log_prob, rollout.log_prob[replay.at], rtol=0, atol=0)
        assert replay.kl.eq(0).all()
    for name, weight in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    moved = list(policy.replay(rollout))
    assert all((replay.kl > 0).all() for replay in moved)
    # By hand, from the free latents of one step: the frame that is kept would make the mean smaller.
    state, step = rollout.trajectory.states, policy._step(network, rollout.trajectory, 0, slice(0, 3))
    expected = torch.distributions.Normal(step.mean, step.std.float()).log_prob(state[1, :3]).flatten(1).mean(-1)
    torch.testing.assert_close(moved[0].log_prob, expected)
    with pytest.raises(ValueError, match="needs a first frame for each prompt"):
        policy.rollout(Condition(["yes"]), 2, Streams(0, 0))
    with pytest.raises(ValueError, match="a first frame was not encoded beforehand"):
        policy.rollout(Condition(["yes"], first_frame=frames[:1] / 2), 2, Streams(0, 0))
    with pytest.raises(ValueError, match=r"sides that are multiples of 16, got 31 x 64"):
        with_first_frames(lambda cond: text, "kept", vae, 5, None, frames[:, :, 1:])


def save_i2v(folder: Path, clip: bool = True) -> Path:
    """Wan2.1-I2V, which reads CLIP's view, or the form of Wan2.2's, which does not."""
    torch.manual_seed(0)
    parts = {"vae": vae()}
    image = {}
    if clip:
        parts |= narrow_sight()
        image = {"image_dim": 16, "added_kv_proj_dim": 24}
    parts["transformer"] = transformer(36, out_channels=16, **image)
    return saved(folder, WanImageToVideoPipeline, **parts)


@pytest.fixture(scope="module", params=[True, False], ids=["clip", "without clip"])
def wan21_i2v(request, tmp_path_factory):
    return save_i2v(tmp_path_factory.mktemp("wan21_i2v"), request.param), request.param


def test_wan21_i2v_is_sampled_as_diffusers_samples_it_bit_for_bit(wan21_i2v):
    folder, clip = wan21_i2v
    z, network = noise(folder), WanVelocity(load_transformer(folder))
    tokens = WORDS if clip else TOKENS
    expected = piped(WanImageToVideoPipeline, folder, z, tokens, image=picture())
    sight = load_sight(folder) if clip else None
    vae, (text, negative) = load_vae(folder), texts(folder, tokens)
    frames = torch.cat([first_frame(), first_frame().flip(-1)])
    encode = with_first_frames(lambda cond: text, "channels", vae, 5, sight, frames)
    _, *frame = encode(Condition(["yes"], first_frame=first_frame()))
    drawn = functools.partial(draw, z=z, text=text, negative=negative, grid=euler_grid(folder), guidance_scale=SCALE)
    assert torch.equal(drawn(told(network, *frame)), expected)
    _, *other = encode(Condition(["yes"], first_frame=first_frame().flip(-1)))
    assert not torch.allclose(drawn(told(network, *other)), expected, atol=1e-4)  # the control: another frame
    if clip:
        assert not torch.allclose(drawn(told(network, frame[0], other[1])), expected, atol=1e-6)  # CLIP's view alone
        # Videos of one prompt that see two frames are not taken for videos of one condition.
        both = tuple(torch.cat(pair) for pair in zip(frame, other, strict=True))
        together = network(z.expand(2, -1, -1, -1, -1), torch.full((2,), 0.5), (text.expand(2, -1, -1), *both))
        alone = network(z, torch.full((1,), 0.5), (text, *other))
        torch.testing.assert_close(together[1:], alone, rtol=1e-5, atol=1e-5)
        short = with_first_frames(lambda cond: text[:, :7], "channels", vae, 5, sight, frames)
        with pytest.raises(ValueError, match="needs prompts of 512 tokens, got max_len 7: set max_len to 512"):
            short(Condition(["yes"], first_frame=first_frame()))


def save_moe(folder: Path) -> Path:
    """Wan2.2-A14B: two of three steps are above the boundary."""
    torch.manual_seed(0)
    parts = {"transformer": transformer(), "transformer_2": transformer(), "vae": vae(), "boundary_ratio": 0.7}
    return saved(folder, WanPipeline, **parts)


@pytest.fixture(scope="module")
def wan22_moe(tmp_path_factory):
    return save_moe(tmp_path_factory.mktemp("wan22_moe"))


def test_wan22_a14b_is_sampled_as_diffusers_samples_it_bit_for_bit(wan22_moe):
    z, network = noise(wan22_moe), load_velocity(wan22_moe)
    times = euler_grid(wan22_moe)[:-1]
    assert sorted(times >= 0.7) == [False, True, True]
    sampled = functools.partial(draw, z=z, text=texts(wan22_moe)[0], negative=texts(wan22_moe)[1])
    sampled = functools.partial(sampled, grid=euler_grid(wan22_moe), guidance_scale=SCALE)
    expected = piped(WanPipeline, wan22_moe, z)
    assert torch.equal(sampled(network), expected)
    for alone in network.transformers().values():  # the control: neither transformer alone
        assert not torch.allclose(sampled(WanVelocity(alone)), expected, atol=1e-4)
    with pytest.raises(ValueError, match=r"on both sides of the boundary 0\.7 in one batch"):
        network.at(torch.tensor([0.9, 0.1]))


def test_times_on_both_sides_of_the_boundary_are_asked_apart(wan22_moe):
    network, t, text = load_velocity(wan22_moe), torch.tensor([0.1, 0.9, 0.8]), texts(wan22_moe)[0]
    z = torch.randn(3, *noise(wan22_moe).shape[1:], generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        together = network(z, t, text.expand(3, -1, -1))
        alone = torch.cat([network(z[i : i + 1], t[i : i + 1], text) for i in range(3)])
        wrong = torch.cat([WanVelocity(network.transformer)(z[i : i + 1], t[i : i + 1], text) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert (wrong[0] - together[0]).abs().max() > 1e-3  # the control: the other transformer, below the boundary


def built(folder: Path, tmp_path: Path, monkeypatch, *settings: str, frames: torch.Tensor | None = None) -> Parts:
    """The parts of a run on this model; there is no latent geometry model of its VAE, and none is asked."""
    (tmp_path / "prompts.txt").write_text("a red cube\na blue ball\n")
    if frames is not None:
        save_file({"frames": frames}, tmp_path / "frames.safetensors")
        settings += (f"video.first_frames={tmp_path / 'frames.safetensors'}",)
    monkeypatch.chdir(TOKENIZER.parents[2])
    monkeypatch.setattr("vggrpo.stitch.load.load_lgm", lambda *args: torch.nn.Identity())
    size = {"frames": 5, "height": 32, "width": 64, "max_len": TOKENS, "motion_samples": 0}
    video = [f"video.{name}={value}" for name, value in size.items()] + [
        f"video.model={folder}",
        f"video.prompts={tmp_path / 'prompts.txt'}",
    ]
    sampling = [
        "num_steps=4",
        "window.size=2",
        "window.kind=fixed",
        "window.stop=3",
        "shift=3.0",
        "gradient_checkpointing=true",
    ]
    grpo = ["num_prompts=2", "group_size=2", "beta=0.1"]
    every = [*video, *(f"sampling.{one}" for one in sampling), *(f"grpo.{one}" for one in grpo), *settings]
    return build(load_recipe("launch/recipes/tiny.yaml", every))


def trained(parts: Parts) -> set[str]:
    """The transformers whose LoRA a rollout and its replay train; the ratio is 1 and KL is 0 before any update."""
    rollout = parts.policy.rollout(next(parts.conditions), 2, Streams(0, 0))
    assert rollout.z0.shape[3] == 2
    assert rollout.z0.dtype == torch.float32
    for replay in parts.policy.replay(rollout):
        assert torch.equal(replay.log_prob, rollout.log_prob[replay.at])
        assert replay.kl.eq(0).all()
        replay.log_prob.sum().backward()
    weights = {name: weight for name, weight in parts.network.named_parameters() if weight.requires_grad}
    assert weights
    assert all("lora_" in name and weight.dtype == torch.float32 for name, weight in weights.items())
    assert all(weight.grad is not None for weight in weights.values())
    assert any(weight.grad.abs().max() > 0 for weight in weights.values() if weight.grad is not None)
    return {name.split(".")[0] for name in weights}


def both_frames() -> torch.Tensor:
    return torch.cat([first_frame(), first_frame().flip(-1)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_keeps_the_first_frames_of_its_prompts(wan22_i2v, tmp_path, monkeypatch, dtype):
    parts = built(wan22_i2v, tmp_path, monkeypatch, f"video.dtype={dtype}", frames=both_frames())
    transformer = parts.network.transformer
    assert transformer.blocks[0].attn1.to_q.base_layer.weight.dtype == getattr(torch, dtype)
    assert transformer.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert trained(parts) == {"transformer"}
    z0 = parts.policy.sample(next(parts.conditions), Streams(0, 0))
    kept = torch.cat([kept_latents(load_vae(wan22_i2v), frame) for frame in both_frames()])
    torch.testing.assert_close(z0[:, :, :1], kept)


def test_a_run_of_wan21_i2v_trains_the_maps_to_the_image_too(wan21_i2v, tmp_path, monkeypatch):
    folder, clip = wan21_i2v
    parts = built(folder, tmp_path, monkeypatch, f"video.max_len={WORDS}", frames=both_frames())
    assert trained(parts) == {"transformer"}
    assert any("add_k_proj" in name for name, _ in parts.network.named_parameters()) == clip
    assert ("add_k_proj" in lora_targets(load_transformer(folder))) == clip
    with pytest.raises(ValueError, match=r"makes videos of a first frame: set video\.first_frames"):
        built(folder, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("on", "start", "size", "expected"),
    [
        ("high", 0, 2, {"transformer"}),
        ("low", 2, 1, {"transformer_2"}),
        ("both", 1, 2, {"transformer", "transformer_2"}),
    ],
)
def test_either_transformer_of_wan22_a14b_is_trained(wan22_moe, tmp_path, monkeypatch, on, start, size, expected):
    # Shift 3 has the times 1, 0.9, 0.75, 0.5 on 4 steps: the boundary of 0.8 lies before the third.
    folder = tmp_path / "wan"
    shutil.copytree(wan22_moe, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": 0.8}))
    window = (f"sampling.window.start={start}", f"sampling.window.size={size}")
    parts = built(folder, tmp_path, monkeypatch, *window, f"video.lora_on={on}")
    assert trained(parts) == expected
    wrong = "low" if on == "high" else "high"
    with pytest.raises(ValueError, match=f"set video.lora_on={on}, or move the window"):
        built(folder, tmp_path, monkeypatch, *window, f"video.lora_on={wrong}")
    if on == "both":
        with pytest.raises(ValueError, match=r"video\.lora_on=both needs one process, got 2"):
            adapt(load_velocity(folder), LoraSize(2, 2), "both", torch.tensor([0.9, 0.5]), 2)


def test_blocks_are_recomputed_once_with_the_same_gradient(wan21):
    seen: list[int] = []
    gradients = []
    for recompute in (False, True):
        network = load_velocity(wan21)
        torch.manual_seed(0)
        add_lora(network.transformer, LoraSize(2, 2))
        if recompute:
            network.transformer.enable_gradient_checkpointing()
        cfg = SamplingConfig(num_steps=3, window=Window(1), gradient_checkpointing=recompute)
        text = texts(wan21)[0]
        policy = FlowPolicy(network, lambda cond, text=text: text, noise(wan21).shape[1:], cfg)
        rollout = policy.rollout(Condition(["yes"]), 1, Streams(0, 0))
        calls: list[int] = []
        network.transformer.blocks[0].register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
        (replay,) = policy.replay(rollout)
        replay.log_prob.sum().backward()
        seen.append(len(calls))
        gradients.append([weight.grad for weight in network.parameters() if weight.requires_grad])
    assert seen == [1, 2]
    assert any(g.abs().max() > 0 for g in gradients[0])
    torch.testing.assert_close(*gradients)


def test_lora_needs_attention_to_go_to():
    with pytest.raises(ValueError, match="Linear has no attention of Wan's to give LoRA to"):
        lora_targets(torch.nn.Linear(2, 2))


def change(folder: Path, file: str, **values: object) -> None:
    found = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(found | values))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model_index.json").unlink(), "has no model_index.json: it must be a Wan pipeline"),
        (lambda f: (f / "vae/config.json").unlink(), "has no vae/config.json: it is not whole"),
        (lambda f: (f / "model_index.json").write_text("{"), "model_index.json is not JSON"),
        (lambda f: change(f, "model_index.json", _class_name="FluxPipeline"), "is a FluxPipeline: it must be one of"),
        (lambda f: change(f, "vae/config.json", z_dim=48), "latents of 48 channels, the transformer takes 16 and"),
        (lambda f: change(f, "model_index.json", boundary_ratio=0.9), "there is no transformer_2/: a model of two"),
        (shutil.rmtree, "if this is a hub id, fetch it first where there is a network"),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_a_wan_is_refused_in_one_line(wan21, tmp_path, spoil, message):
    folder = tmp_path / "wan"
    shutil.copytree(wan21, folder)
    assert read_layout(folder) == Layout(per_token=False, boundary=None, way=None, sight=False, patch=(1, 2, 2))
    spoil(folder)
    with pytest.raises(ValueError, match=message) as error:
        read_layout(folder)
    assert "\n" not in str(error.value)


def test_first_frames_that_do_not_fit_are_refused_in_one_line(wan21, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"the model takes prompts alone: leave it out"):
        built(wan21, tmp_path, monkeypatch, frames=both_frames())
    with pytest.raises(ValueError, match=r"must hold frames \[2, 3, 32, 64\], one picture for each prompt"):
        built(wan21, tmp_path, monkeypatch, frames=both_frames()[:1])
    with pytest.raises(ValueError, match=r"frames must be floating point in \[0, 1\]: divide bytes by 255"):
        built(wan21, tmp_path, monkeypatch, frames=255 * both_frames())
    with pytest.raises(ValueError, match="cannot read first frames from"):
        built(wan21, tmp_path, monkeypatch, "video.first_frames=none.safetensors")


def test_a_network_that_was_not_loaded_has_the_precision_of_one_that_was(wan21):
    loaded, made = load_velocity(wan21, torch.bfloat16).transformer, in_dtype(transformer(), torch.bfloat16)
    expected = {name: weight.dtype for name, weight in loaded.named_parameters()}
    assert {name: weight.dtype for name, weight in made.named_parameters()} == expected
    assert set(expected.values()) == {torch.float32, torch.bfloat16}
