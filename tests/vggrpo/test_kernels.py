"""Blocks that are compiled, or attend by another backend, are the same function; and an unknown one is refused."""

from pathlib import Path

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.vggrpo.test_wan import transformer
from vggrpo import cli
from vggrpo.config import LoraSize
from vggrpo.policy.flow_policy import lora_off
from vggrpo.policy.kernels import attention_backends, choose_attention, compile_blocks
from vggrpo.policy.lora import add_lora
from vggrpo.policy.wan import WanVelocity

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def as_before():
    """diffusers' choice holds for the whole process, and so does what was compiled."""
    torch.compiler.reset()
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(before)
    torch.compiler.reset()


def network(checkpointing: bool = False) -> WanVelocity:
    """With LoRA that does something."""
    torch.manual_seed(0)
    made = transformer()
    add_lora(made, LoraSize(2, 4))
    for name, weight in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    if checkpointing:
        made.enable_gradient_checkpointing()
    return WanVelocity(made)


def inputs(n: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    z, text = torch.randn(n, 16, 2, 4, 8, generator=generator), torch.randn(1, 7, 12, generator=generator)
    return z, torch.full((n,), 0.4), text.expand(n, -1, -1)


def answers(net: WanVelocity) -> list[torch.Tensor]:
    """Without gradients, the reference, and with them: what training asks for; then every gradient."""
    with torch.no_grad():
        rolled, reference = net(*inputs()), lora_off(net)(*inputs())
    replayed = net(*inputs())
    replayed.square().mean().backward()
    gradients = [weight.grad for weight in net.parameters() if weight.requires_grad]
    assert all(gradient is not None for gradient in gradients)
    return [rolled, reference, replayed.detach(), *gradients]


@pytest.mark.parametrize(
    ("backend", "checkpointing"),
    [
        ("aot_eager", False),
        ("aot_eager", True),
        pytest.param("inductor", False, marks=pytest.mark.slow),  # a C++ compiler takes its time
    ],
)
def test_compiled_blocks_are_the_eager_ones(backend, checkpointing, as_users_run):
    expected = answers(network(checkpointing))
    counter = CompileCounterWithBackend(backend)
    net = network(checkpointing)
    compile_blocks(net, counter)
    found = answers(net)
    assert counter.frame_count >= 3  # with and without gradients, and without LoRA; the two blocks share them
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-3)  # the control: LoRA is still switched off and on
    assert net.state_dict().keys() == network().state_dict().keys()  # checkpoints and LoRA have the same names


def test_nothing_is_compiled_unless_it_is_asked_for():
    net = network()
    assert all(block._compiled_call_impl is None for block in net.transformer.blocks)
    compile_blocks(net, "eager")
    assert all(block._compiled_call_impl is not None for block in net.transformer.blocks)


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_another_attention_is_the_same_function(backend):
    expected = answers(network())
    net = network()
    choose_attention(net, backend)
    chosen = {
        one.processor._attention_backend.value for block in net.transformer.blocks for one in (block.attn1, block.attn2)
    }
    assert chosen == {backend}
    for ours, theirs in zip(answers(net), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("nativ", "video.attention: no backend 'nativ': did you mean 'native'?"),
        ("flash_hub", "no backend 'flash_hub': did you mean 'flash"),  # it would fetch and run code of the hub's
        ("of_mine", "no backend 'of_mine': there are flash, "),
        ("sage", "video.attention is sage: "),  # known, and not installed here
    ],
)
def test_an_attention_that_cannot_be_is_refused_in_one_line(backend, message):
    if backend == "sage":
        from diffusers.utils import is_sageattention_available

        if is_sageattention_available():
            pytest.skip("sageattention is installed")
    with pytest.raises(ValueError) as error:
        choose_attention(network(), backend)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "native" in attention_backends()


def test_a_recipe_can_ask_for_both(capsys, monkeypatch, tmp_path):
    asked: list[str] = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("vggrpo.policy.kernels.compile_blocks", lambda net: asked.append("compiled"))
    small = ["video.motion_samples=0", "video.frames=5", "video.height=32", "video.width=32", "grpo.group_size=4"]
    more = [*small, f"video.prompt_cache={tmp_path}", "sampling.num_steps=4", "sampling.window={size: 1}"]
    assert cli.main(["check", "launch/recipes/tiny.yaml", *more, "video.compile=true", "video.attention=native"]) == 0
    assert asked == ["compiled"]
    assert cli.main(["check", "launch/recipes/tiny.yaml", *more, "video.attention=nativ"]) == 2
    assert "did you mean 'native'?" in capsys.readouterr().err
