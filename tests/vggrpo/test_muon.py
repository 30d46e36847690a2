"""Matrices of blocks step along orthogonal matrices, everything else as AdamW alone would step."""

import copy
import math

import pytest
import torch

from vggrpo.muon import MuonAdamW
from vggrpo.sft import BETAS, new_transformer
from vggrpo.sft_config import WanSize

LR = 1e-2


@pytest.fixture
def network():
    torch.manual_seed(0)
    return new_transformer(WanSize(layers=2, heads=2, head_dim=16, ffn_dim=512), 4, 32)


def with_gradients(network):
    for number, (_, weight) in enumerate(network.named_parameters()):
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))


def steps(network, optimizer):
    """What one step adds to each weight."""
    before = copy.deepcopy(dict(network.named_parameters()))
    optimizer.step()
    return {name: (weight - before[name]).detach() for name, weight in network.named_parameters()}


def test_each_weight_takes_the_step_of_its_optimiser(network):
    alone = copy.deepcopy(network)
    with_gradients(network)
    with_gradients(alone)
    found = steps(network, MuonAdamW(network, LR, BETAS, 0.0))
    plain = steps(alone, torch.optim.AdamW(alone.parameters(), LR, BETAS, weight_decay=0.0))
    matrices = {name for name, step in found.items() if name.startswith("blocks.") and step.ndim == 2}
    assert len(matrices) == 2 * (8 + 2)  # two attentions of four matrices and the feed-forward part of each block
    for name, step in found.items():
        if name in matrices:  # five Newton-Schulz iterations bring singular values to about 1, not exactly there
            length = torch.linalg.svdvals(step) / (LR * 0.2 * math.sqrt(max(step.shape)))
            assert 0.3 < length.min() <= length.max() < 1.3, name
            assert not torch.allclose(step, plain[name], atol=LR / 10), name
        else:
            assert torch.equal(step, plain[name]), name


def test_frozen_weights_stay_and_what_it_cannot_do_is_one_line(network):
    for name, weight in network.named_parameters():
        weight.requires_grad_("attn2" not in name)
    with_gradients(network)
    found = steps(network, MuonAdamW(network, LR, BETAS, 0.0))
    assert {bool(step.any()) for name, step in found.items() if "attn2" in name} == {False}
    assert found["blocks.0.attn1.to_q.weight"].any()
    with pytest.raises(ValueError, match="use adamw here"):
        MuonAdamW(torch.nn.Linear(3, 3), LR, BETAS, 0.0)


def test_a_torch_without_muon_is_one_line(network, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match=r"torch >= 2.9 and this is"):
        MuonAdamW(network, LR, BETAS, 0.0)
