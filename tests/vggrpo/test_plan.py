"""The formulas count what torch counts, and `vggrpo plan` says what a run then does."""

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vggrpo import cli
from vggrpo.config import GrpoConfig, LoraSize, SamplingConfig
from vggrpo.cost import Shape, backward_flops, evaluations, forward_flops, iteration_flops, peak_bytes, saved_bytes
from vggrpo.plan import share
from vggrpo.policy.first_frame import WORDS
from vggrpo.policy.lora import add_lora
from vggrpo.policy.wan import WanVelocity, in_dtype, wan_velocity
from vggrpo.recipe import load_recipe
from vggrpo.sampler import Window

ROOT = Path(__file__).parents[2]
TINY, MIXTURE = "launch/recipes/tiny.yaml", "launch/recipes/mixture.yaml"
LATENT = (16, 3, 8, 6)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(
    scope="module",
    params=[(2, 2, 32, 96, 4, 10, 0), (3, 3, 16, 160, 8, 7, 0), (2, 2, 32, 96, 4, WORDS, 300)],
    ids=["a", "b", "of a first frame"],
)
def made(request):
    """A Wan with LoRA of some size, its shape, and what it is given of videos of one prompt: z, text, image."""
    layers, heads, width, ffn, rank, M, I = request.param  # noqa: E741
    d = heads * width
    image = {"in_channels": 36, "out_channels": 16, "image_dim": 20, "added_kv_proj_dim": d} if I else {}
    transformer = WanTransformer3DModel(
        num_layers=layers, num_attention_heads=heads, attention_head_dim=width, ffn_dim=ffn, text_dim=24, **image
    )
    add_lora(transformer, LoraSize(rank, rank))
    shape = Shape.of(transformer.config, LATENT, M, rank, seen=I)

    def inputs(n: int = 1):
        z = torch.randn(n, transformer.config.in_channels, *LATENT[1:])
        return z, torch.randn(1, M, 24).expand(n, -1, -1), torch.randn(1, I, 20).expand(n, -1, -1) if I else None

    return transformer, shape, inputs


def test_parameters_are_counted_exactly(made):
    transformer, shape, _ = made
    sizes = dict.fromkeys((True, False), 0)
    for weight in transformer.parameters():
        sizes[weight.requires_grad] += weight.numel()
    assert (shape.num_trained, shape.num_frozen) == (sizes[True], sizes[False])


def test_operations_are_those_that_torch_counts(made):
    """With attention in products that torch can count; its backward pass then computes nothing again: 2 for 2.5."""
    transformer, shape, inputs = made

    def velocity() -> torch.Tensor:
        z, text, image = inputs()
        return wan_velocity(transformer, z, torch.tensor([0.5]), text, image)

    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            velocity()
        with FlopCounterMode(display=False) as both:
            velocity().square().mean().backward()
    attention = shape.layers * 4 * shape.N * shape.d * (shape.N + shape.M + shape.I)
    assert forward_flops(shape) == forward.get_total_flops()
    assert forward_flops(shape) + backward_flops(shape) - attention / 2 == both.get_total_flops()


def test_operations_of_videos_that_share_a_prompt_are_those_that_torch_counts(made):
    """Three videos and one prompt, through the network that is trained; without sharing it would be more."""
    transformer, shape, inputs = made
    network, shared = WanVelocity(transformer), replace(shape, sharing=3)
    z, text, image = inputs(3)
    told = text if image is None else (text, z[:, 16:], image)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        network(z[:, :16], torch.full((3,), 0.5), told)
    assert 3 * forward_flops(shared) == pytest.approx(counter.get_total_flops(), rel=1e-9)
    assert forward_flops(shared) < forward_flops(shape)


@pytest.mark.parametrize("per_token", [False, True], ids=["one time", "a time a token"])
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_saved_bytes_are_those_that_autograd_keeps(made, half, per_token):
    transformer, shape, inputs = made
    transformer = in_bf16(transformer) if half else transformer
    own = {x.untyped_storage().data_ptr() for x in [*transformer.parameters(), *transformer.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x  # held, so that no other tensor takes its place
        return x

    t = torch.full((1, shape.N) if per_token else (1,), 0.5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        z, text, image = inputs()
        wan_velocity(transformer, z, t, text, image)
    found = sum(x.untyped_storage().nbytes() for x in kept.values())
    asked = replace(shape, half=half, per_token=per_token)
    assert saved_bytes(asked) == pytest.approx(found, rel=0.06)
    other = replace(asked, half=not half) if per_token else replace(asked, per_token=True)
    assert per_token or saved_bytes(other) != pytest.approx(found, rel=0.06)  # the control
    if shape.I:
        assert saved_bytes(replace(asked, I=0)) != pytest.approx(found, rel=0.06)


def in_bf16(transformer: WanTransformer3DModel) -> WanTransformer3DModel:
    """A copy; LoRA stays in fp32."""
    found = in_dtype(copy.deepcopy(transformer), torch.bfloat16)
    for name, weight in found.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.float()
    return found


def test_weights_in_bf16_are_counted_exactly(made):
    transformer, shape, _ = made
    half = in_bf16(transformer)
    frozen = sum(x.numel() * x.element_size() for x in half.parameters() if not x.requires_grad)
    assert frozen == 2 * shape.num_frozen + 2 * shape.num_whole
    sampling = SamplingConfig(num_steps=10)
    both = [peak_bytes(replace(shape, half=on), sampling, LATENT, 1, averaged=False) for on in (False, True)]
    saved = [saved_bytes(replace(shape, half=on)) for on in (False, True)]
    assert both[0] - both[1] - (saved[0] - saved[1]) == 4 * shape.num_frozen - frozen


def test_all_transformers_and_first_frames_are_held(made):
    _, shape, _ = made
    how = {"sampling": SamplingConfig(num_steps=10), "latent": LATENT, "num_videos": 3, "averaged": False}
    one, two, both = (
        peak_bytes(replace(shape, resident=held, adapted=trained), **how) for held, trained in ((1, 1), (2, 1), (2, 2))
    )
    assert two - one == 4 * shape.num_frozen
    assert both - two == 16 * shape.num_trained
    if shape.I:  # of each of three videos, under its prompt and the negative one: 20 channels, and CLIP's view
        bare = replace(shape, patch_in=shape.patch_out)
        assert one - peak_bytes(bare, **how) == 3 * 2 * 4 * 20 * 3 * 8 * 6 + 4 * (shape.num_frozen - bare.num_frozen)


def counts(window: int = 3, begin: int = 2, b: int = 2, k: int = 4, beta: float = 0.1, updates: int = 1, **more):
    sampling = SamplingConfig(num_steps=10, window=Window(size=window), **more)
    return evaluations(sampling, GrpoConfig(beta=beta, num_updates=updates, clip=0.1), b, k, begin)


def test_evaluations_are_counted_by_hand():
    assert vars(counts()) == {"rollout": 80, "replay": 24, "reference": 24, "geometry": 8}
    assert counts(guidance_scale=4.0).rollout == 160
    assert counts(share_noise=True).rollout == 2 * 2 + 8 * 8
    assert counts(beta=0.0).reference == 0
    assert counts(updates=2).replay == 48


@pytest.mark.parametrize("more", [{}, {"guidance_scale": 3.0}, {"share_noise": True}, {"micro_batch": 3}])
def test_evaluations_are_those_of_the_policy(make_policy, network, more):
    from vggrpo.types import Condition, Streams

    rows: list[int] = []
    network.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    policy = make_policy(**more)
    rollout = policy.rollout(Condition(["east", "west"]), 3, Streams(0, 0))
    sampled, rows[:] = sum(rows), []
    list(policy.replay(rollout))
    cfg = SamplingConfig(num_steps=6, window=Window(size=3, start=1), **more)
    expected = evaluations(cfg, GrpoConfig(beta=0.0), 2, 3, 1)
    assert (expected.rollout, expected.replay, expected.reference) == (sampled, sum(rows), 0)


def test_checkpointing_trades_bytes_for_operations(made):
    _, shape, _ = made
    assert saved_bytes(shape, checkpointing=True) < saved_bytes(shape)
    each = counts()
    plain, again = (iteration_flops(shape, each, checkpointing=on) for on in (False, True))
    assert again - plain == each.replay * forward_flops(shape)
    sizes = [
        peak_bytes(shape, SamplingConfig(num_steps=10, **more), LATENT, 8, averaged=False)
        for more in ({"gradient_checkpointing": True}, {}, {"guidance_scale": 4.0})
    ]
    assert sizes == sorted(sizes)


def test_a_plan_says_what_there_is_and_what_a_rank_does(capsys):
    how = ["sampling.guidance_scale=2.5", "sampling.share_noise=false", "sampling.window.size=3"]
    assert cli.main(["plan", TINY, "--no-step", "grpo.num_prompts=2", "launch.num_processes=4", *how]) == 0
    said = capsys.readouterr().out
    for words in (
        *("4,862,272 parameters", "32,768 of a LoRA", "latents 16x5x8x8: 80 tokens", "64 prompts"),
        *("2 prompts x 8 on 4 process(es): 1 x 4 videos on each", "rollout 80, replay 24, reference 24", "geometry 4"),
        *("MiB at an update's peak", "10 steps, 3 of them trained", "guidance 2.5", "128 videos of the base model"),
    ):
        assert words in said, words
    assert "\nmeasured" not in said
    seconds = re.search(r"time +([0-9.e+-]+) s an iteration on cpu", said)
    assert seconds is not None
    assert 0 < float(seconds.group(1)) < 1000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_are_measured_in_the_recipe_s_precision(dtype, capsys, monkeypatch):
    seen: set[torch.dtype] = set()
    real = WanVelocity.forward

    def forward(self, z_t, t, told):
        weights = self.transformer.blocks[0].attn1.to_q
        seen.add(weights.base_layer.weight.dtype)
        assert weights.lora_A["default"].weight.dtype == torch.float32
        return real(self, z_t, t, told)

    monkeypatch.setattr(WanVelocity, "forward", forward)
    assert cli.main(["plan", TINY, "--no-step", f"video.dtype={dtype}"]) == 0
    assert "blocks were measured" in capsys.readouterr().out
    assert seen == {getattr(torch, dtype)}


def test_a_plan_makes_one_step_and_leaves_nothing(capsys, tmp_path):
    assert cli.main(["plan", MIXTURE, "launch.num_processes=2", f"out={tmp_path / 'run'}"]) == 0
    said = capsys.readouterr().out
    assert "1 prompts x 32 on 2 process(es): 1 x 16 videos on each" in said
    assert "rollout 160, replay 128, reference 128" in said
    assert "s an iteration, the first" in said
    assert not (tmp_path / "run").exists()


def test_a_step_that_would_teach_nothing_is_status_1(capsys):
    assert cli.main(["plan", MIXTURE, "grpo.beta=0", "grpo.weights={nearness: 1}", "optimizer.lr=0"]) == 0
    assert cli.main(["plan", MIXTURE, "grpo.group_size=2", "mixture.prompts=[east]", "sampling.noise=1e-12"]) == 1
    assert "PROBLEM" in capsys.readouterr().out


def test_a_process_of_one_member_still_compares_two():
    recipe = share(load_recipe(MIXTURE, ["launch.num_processes=32"]))
    assert (recipe.grpo.num_prompts, recipe.grpo.group_size, recipe.launch.num_processes) == (1, 2, None)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["video.prompts=nowhere.txt"], "no prompts at nowhere.txt"),
        (["video.model=assets/tiny-lgm"], "has no model_index.json: it must be a Wan pipeline in diffusers layout"),
        (["video.lgm=assets/tiny-wan"], "is no latent geometry model"),
        (["grpo.weights={motion_smothness: 1}"], "did you mean 'motion_smoothness'?"),
        (["launch.num_processes=3"], "cannot be shared by 3 ranks"),
        (["sampling.window.size=10"], "a window of 10"),
        (["sampling.nun_steps=10"], "did you mean 'num_steps'?"),
    ],
)
def test_what_cannot_be_is_one_line_without_a_step(more, message, capsys):
    assert cli.main(["plan", TINY, "--no-step", *more]) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("vggrpo: ")
    assert message in said
