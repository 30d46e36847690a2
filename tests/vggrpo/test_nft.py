"""DiffusionNFT against its formula, sample by sample, and on the mixture."""

import random
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from vggrpo.config import GrpoConfig, NftConfig, SamplingConfig
from vggrpo.nft import follow, nft_backward, nft_loss, optimality, train_nft
from vggrpo.policy.flow_policy import FlowPolicy, frozen_copy
from vggrpo.policy.mixture import MODES, MixtureFlow, encode_modes, nearness
from vggrpo.runtime import Run
from vggrpo.sampler import Window
from vggrpo.types import Condition, Streams


def slow_loss(v, v_old, z0, z_t, t, r, beta):
    """One sample, one dimension at a time, in the paper's order."""
    losses = []
    for n in range(len(z0)):
        values = []
        for sign, weight in ((1, float(r[n])), (-1, 1 - float(r[n]))):
            gaps = []
            for d in range(z0.shape[1]):
                plus = beta * float(v[n, d]) + (1 - beta) * float(v_old[n, d])
                minus = (1 + beta) * float(v_old[n, d]) - beta * float(v[n, d])
                gaps.append(float(z_t[n, d]) - float(t[n]) * (plus if sign > 0 else minus) - float(z0[n, d]))
            w = max(sum(abs(gap) for gap in gaps) / len(gaps), 1e-5)
            values.append(weight / beta * sum(gap**2 / w for gap in gaps) / len(gaps))
        losses.append(sum(values))
    return torch.tensor(losses, dtype=torch.float64)


@pytest.fixture
def case() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    v, v_old, z0, eps = torch.randn(4, 6, 3, generator=generator, dtype=torch.float64)
    t = torch.rand(6, generator=generator, dtype=torch.float64)
    z_t = (1 - t[:, None]) * z0 + t[:, None] * eps
    return {"v": v, "v_old": v_old, "z0": z0, "z_t": z_t, "t": t, "r": torch.rand(6, generator=generator).double()}


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_the_loss_is_the_formula(case, beta):
    torch.testing.assert_close(nft_loss(**case, beta=beta), slow_loss(**case, beta=beta), atol=1e-10, rtol=1e-10)
    swapped = case | {"r": 1 - case["r"]}  # the control: good and bad exchanged
    assert (nft_loss(**swapped, beta=beta) - slow_loss(**case, beta=beta)).abs().max() > 0.1


def test_a_perfect_velocity_costs_nothing(case):
    """eps - z0 denoises to z0 exactly; the floor under w keeps 0 / 0 out."""
    v = (case["z_t"] - case["z0"]) / case["t"][:, None]
    assert nft_loss(**(case | {"v": v, "v_old": v}), beta=1.0).abs().max() < 1e-20


def test_gradient_by_hand_and_none_through_w_or_v_old(case):
    """At v = v_old both errors are g = z0(v) - z0, so that d loss / d v = -(2 r - 1) 2 t g / (D mean |g|)."""
    v = case["v_old"].clone().requires_grad_()
    old = case["v_old"].clone().requires_grad_()
    nft_loss(**(case | {"v": v, "v_old": old}), beta=0.3).sum().backward()
    t, r = case["t"][:, None], case["r"][:, None]
    gap = case["z_t"] - t * case["v_old"] - case["z0"]
    expected = -(2 * r - 1) * 2 * t * gap / (3 * gap.abs().mean(-1, keepdim=True))
    torch.testing.assert_close(v.grad, expected)
    assert old.grad is None


def test_optimality_is_a_probability():
    advantage = torch.tensor([-9.0, -5.0, 0.0, 1.0, 5.0, 9.0])
    torch.testing.assert_close(optimality(advantage), torch.tensor([0.0, 0.0, 0.5, 0.6, 1.0, 1.0]))


def test_the_average_follows_slowly():
    average, network = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    before = average.weight.clone()
    follow(average, network, kept=0.75)
    torch.testing.assert_close(average.weight, 0.75 * before + 0.25 * network.weight)
    follow(average, network, kept=0.0)
    torch.testing.assert_close(average.weight, network.weight)


def test_an_update_is_the_mean_over_noised_copies_plus_the_anchor():
    """Times and noise drawn again from the same streams; three networks that differ; two micro-batches."""
    torch.manual_seed(0)
    network, old, reference = MixtureFlow(), MixtureFlow(), MixtureFlow()
    for net, scale in ((network, 0.1), (old, 0.2), (reference, 0.3)):
        torch.nn.init.normal_(net.head.weight, std=scale)
    policy = FlowPolicy(old, encode_modes, (2,), SamplingConfig(num_steps=4, micro_batch=2), reference)
    streams, advantage = Streams(0, 0), torch.tensor([[-1.0, 0.5, 4.0]])
    rollout = policy.rollout(Condition(["east"]), 3, streams)
    nft = NftConfig(beta=0.5, num_times=2, anchor=0.3)
    found = nft_backward(policy, network, rollout, advantage, streams, Run(Accelerator(cpu=True), 1, 3), nft)
    expected, c = 0.0, rollout.trajectory.cond[:1]
    for k in range(3):
        stream = streams.noising(0, k)
        for _ in range(2):
            t, eps = torch.rand(1, generator=stream), torch.randn(2, generator=stream)
            z0 = rollout.z0[:, k]
            z_t = (1 - t) * z0 + t * eps
            v, v_old, v_ref = (net(z_t, t, c).detach() for net in (network, old, reference))
            loss = slow_loss(v, v_old, z0, z_t, t, optimality(advantage[:, k]), beta=0.5)
            expected += float(5 * loss + 0.3 * (v - v_ref).square().mean()) / 6
    assert found == pytest.approx(expected, rel=1e-4)
    assert all(p.grad is None for net in (old, reference) for p in net.parameters())
    assert network.head.weight.grad.abs().sum() > 0


def learnt(reward, seed: int, num: int = 60, lr: float = 2e-3, K: int = 64) -> float:
    """Mass in the east after training."""
    torch.manual_seed(seed)
    network = MixtureFlow()
    reference = frozen_copy(network)
    sampling = SamplingConfig(num_steps=6, window=Window(size=1), micro_batch=64)
    policy = FlowPolicy(frozen_copy(network), encode_modes, (2,), sampling, reference)
    run = Run(Accelerator(cpu=True), 1, K)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    cfg = GrpoConfig(num_prompts=1, group_size=K, seed=seed)
    prompts = [Condition([""])] * num
    list(train_nft(policy, network, lambda z0: z0, {"r": reward}, prompts, optimizer, run, cfg, NftConfig()))
    z0 = policy.rollout(Condition([""]), 400, Streams(123, 0)).z0[0]
    distance = torch.cdist(z0, torch.tensor(list(MODES.values())))
    return float((distance.argmin(-1) == 0).double().mean())


def test_mass_moves_to_the_reward_and_not_to_a_random_one():
    seed = random.SystemRandom().randrange(10**6)
    east = learnt(lambda z0: nearness("east", z0), seed)
    noise = torch.Generator().manual_seed(seed)
    control = learnt(lambda z0: torch.rand(z0.shape[:2], generator=noise), seed)
    print(f"seed {seed}: east {east}, random reward {control}")
    assert east > 0.65
    assert 0.05 < control < 0.4


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"num_times": 0}, {"slowest": 1.0}])
def test_bad_constants_are_refused(settings):
    with pytest.raises(ValueError, match="must be"):
        replace(NftConfig(), **settings)
