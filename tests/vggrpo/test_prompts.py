"""What is computed once for videos of one prompt, or for both branches of guidance, is what each would have got."""

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel

from vggrpo.config import LoraSize
from vggrpo.guidance import classifier_free
from vggrpo.policy.lora import add_lora
from vggrpo.policy.wan import WanVelocity, prompts_in, wan_velocity
from vggrpo.types import Condition, Streams

A, B, C = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(0))


def rows(*prompts: torch.Tensor) -> torch.Tensor:
    return torch.stack(prompts)


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        (rows(A), rows(A)),
        (rows(A, A, A), rows(A)),
        (rows(A, A, B, B), rows(A, B)),
        (rows(A, A, B, B, A, A), rows(A, B, A)),
        (rows(A, B, C), rows(A, B, C)),
        (rows(A, A, B), rows(A, A, B)),  # not equally many: nothing is shared
        (rows(A, B, B), rows(A, B, B)),  # nor here, where every prompt but the last has one row
        (rows(A, B, A, B), rows(A, B, A, B)),
    ],
)
def test_prompts_are_found_where_each_has_as_many_rows(text, prompts):
    assert torch.equal(prompts_in(text), prompts)


@pytest.fixture(scope="module")
def both():
    """A Wan with LoRA as it is, and one whose cross-attention shares prompts."""
    torch.manual_seed(0)
    plain = WanTransformer3DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=16, ffn_dim=64, text_dim=12, cross_attn_norm=True
    )
    add_lora(plain, LoraSize(4, 4))
    for name, weight in plain.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return plain, WanVelocity(copy.deepcopy(plain))


@pytest.mark.parametrize(("text", "computed"), [(rows(A, A, B, B), 2), (rows(A, A, A, A), 1), (rows(A, B, B, C), 4)])
def test_a_shared_prompt_changes_neither_velocity_nor_gradient(both, text, computed):
    plain, network = both
    seen: list[int] = []
    watch = network.transformer.blocks[0].attn2.to_k.register_forward_pre_hook(
        lambda module, args: seen.append(len(args[0]))
    )
    z, t = torch.randn(4, 16, 2, 4, 6), torch.tensor([0.9, 0.5, 0.5, 0.1])
    expected, found = wan_velocity(plain, z, t, text), network(z, t, text)
    watch.remove()
    assert seen == [computed]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(expected.shape)
    for module, v in ((plain, expected), (network.transformer, found)):
        module.zero_grad()
        (v * weight).sum().backward()
    for (name, p), q in zip(plain.named_parameters(), network.transformer.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4, msg=name)
    swapped = network(z, t, text.flip(0))
    assert computed == 1 or not torch.allclose(swapped, expected, atol=1e-3)  # the control: whose prompt it is counts


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
def test_both_branches_of_guidance_at_once_are_one_after_the_other(make_policy, network, scale):
    policy = make_policy(guidance_scale=scale, negative_prompt="west")
    calls: list[int] = []
    network.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    z = torch.randn(5, 2)
    c, negative = (policy.encode(Condition([prompt])).expand(5, -1) for prompt in ("east", "west"))
    t = policy.grid[2]
    found = policy._velocity(network, c, negative)(z, t)
    assert calls == [5 if scale in (0, 1) else 10]

    def under(text):
        return lambda z_t, time: network(z_t, torch.full((5,), float(time)), text)

    torch.testing.assert_close(found, classifier_free(under(c), under(negative), scale)(z, t), rtol=1e-5, atol=1e-6)
    assert policy.rollout(Condition(["east"]), 4, Streams(0, 0)).z0.isfinite().all()
