"""A replay finds the rollout's own numbers; a video depends on its name alone; the reference is what it says."""

from dataclasses import replace

import pytest
import torch

from vggrpo.config import SamplingConfig
from vggrpo.policy.flow_policy import FlowPolicy, frozen_copy, lora_off
from vggrpo.policy.mixture import MODES, STD, MixtureFlow, encode_modes, mixture_velocity, nearness
from vggrpo.sampler import Window
from vggrpo.types import Condition, Rollout, Streams

COND = Condition(["east", "", "north west"])
STREAMS = Streams(seed=1, iteration=0)
RATIO = 1e-6


def ratio_error(policy: FlowPolicy, rollout: Rollout) -> float:
    with torch.no_grad():
        ratios = [(chunk.log_prob - rollout.log_prob[chunk.at]).exp() for chunk in policy.replay(rollout)]
    return float((torch.cat(ratios) - 1).abs().max())


@pytest.mark.parametrize("micro_batch", [1, 4, 5, 12, 100])
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_the_ratio_is_1_before_any_update(make_policy, guidance_scale, storage, micro_batch):
    policy = make_policy(guidance_scale=guidance_scale, storage=storage, micro_batch=micro_batch)
    assert ratio_error(policy, policy.rollout(COND, 4, STREAMS)) < RATIO


@pytest.mark.parametrize("sde", ["flow_sde", "dance_sde", "flow_cps"])
@pytest.mark.parametrize("share_noise", [False, True])
def test_the_ratio_is_1_for_every_step_and_noise(make_policy, sde, share_noise):
    policy = make_policy(sde=sde, share_noise=share_noise, window=Window(size=5))
    assert ratio_error(policy, policy.rollout(COND, 4, STREAMS)) < RATIO


def test_known_bugs_would_be_seen_as_a_ratio_off_1(make_policy):
    """Re-injected: states rounded after their log-probability (Flow-Factory PR 61); guidance left out of replay."""
    exact = make_policy()
    rollout = exact.rollout(COND, 4, STREAMS)
    rounded = rollout.trajectory.states.bfloat16().float()
    late = replace(rollout, trajectory=replace(rollout.trajectory, states=rounded))
    assert ratio_error(exact, late) > 100 * RATIO
    guided = make_policy(guidance_scale=4.5)
    assert ratio_error(exact, guided.rollout(COND, 4, STREAMS)) > 100 * RATIO


@pytest.mark.parametrize("micro_batch", [1, 5, 100])
def test_a_replay_visits_every_decision_once(make_policy, micro_batch):
    policy = make_policy(micro_batch=micro_batch)
    rollout = policy.rollout(COND, 4, STREAMS)
    visits = torch.zeros_like(rollout.log_prob)
    for chunk in policy.replay(rollout):
        visits[chunk.at] += 1
        assert len(chunk.log_prob) <= micro_batch
    assert (visits == 1).all()


def test_log_prob_is_the_gaussians_own(make_policy):
    """Against torch.distributions, with mean and std of the step re-derived from the score."""
    policy = make_policy()
    rollout = policy.rollout(COND, 4, STREAMS)
    notes = rollout.trajectory
    for i, s in enumerate(notes.steps):
        t, t_next = float(policy.grid[s]), float(policy.grid[s + 1])
        z, z_next = notes.states[i].double(), notes.states[i + 1].double()
        v = policy.network(z.float(), torch.full((len(z),), t), notes.cond).double()
        sigma2 = policy.cfg.noise**2 * t / (1 - t)
        score = -(z + (1 - t) * v) / t
        law = torch.distributions.Normal(z + (v - sigma2 / 2 * score) * (t_next - t), (sigma2 * (t - t_next)) ** 0.5)
        expected = law.log_prob(z_next).mean(-1).view(3, 4)
        torch.testing.assert_close(rollout.log_prob[..., i].double(), expected, atol=1e-5, rtol=0)
    assert rollout.log_prob.dtype == torch.float32
    assert not rollout.log_prob.requires_grad


def test_a_video_depends_on_its_name_alone(make_policy):
    """Members 2 and 3 of the second prompt, drawn alone, are those of the whole batch; other names are other videos."""
    whole = make_policy().rollout(COND, 4, STREAMS)
    alone = make_policy(micro_batch=2).rollout(COND[1:2], 2, Streams(1, 0, first_prompt=1, first_member=2))
    torch.testing.assert_close(alone.z0[0], whole.z0[1, 2:], atol=1e-5, rtol=1e-5)
    for other in (Streams(2, 0, 1, 2), Streams(1, 1, 1, 2), Streams(1, 0, 0, 2), Streams(1, 0, 1, 1)):
        elsewhere = make_policy(micro_batch=2).rollout(COND[1:2], 2, other)
        assert (elsewhere.z0[0] - whole.z0[1, 2:]).abs().amax(-1).min() > 1e-2


def test_prompts_that_read_the_same_are_two_groups(make_policy):
    z0 = make_policy().rollout(Condition(["east", "east"]), 3, STREAMS).z0
    assert (z0[0] - z0[1]).abs().amax(-1).min() > 1e-3


def test_shared_noise_runs_the_prefix_once_per_group(make_policy, network):
    rows = []
    network.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    policy = make_policy(share_noise=True, num_steps=8, window=Window(size=2, start=4), micro_batch=100)
    rollout = policy.rollout(COND, 4, STREAMS)
    assert rows == [3] * 4 + [12] * 4
    start = rollout.trajectory.states[0].view(3, 4, 2)
    assert (start == start[:, :1]).all()
    assert rollout.z0.std(1).min() > 0  # and then they part
    separate = make_policy(num_steps=8, window=Window(size=2, start=4)).rollout(COND, 4, STREAMS)
    assert separate.trajectory.states[0].view(3, 4, 2).std(1).min() > 0


def test_kl_is_0_at_the_reference_and_pulls_back_from_elsewhere(make_policy, network):
    """At the reference KL has its minimum: 0, its gradient 0 too but *connected*. Elsewhere neither is 0."""
    policy = make_policy(reference=frozen_copy(network))
    rollout = policy.rollout(COND, 4, STREAMS)
    for chunk in policy.replay(rollout):
        assert (chunk.kl == 0).all()
        assert chunk.kl.requires_grad  # a KL inside no_grad (Flow-Factory PR 123) would not be
    with torch.no_grad():
        network.head.bias += torch.tensor([0.3, -0.2])
    total = sum(chunk.kl.sum() for chunk in policy.replay(rollout))
    total.backward()
    # The bias moves the mean by (1 + sigma^2 (1-t) / 2t) dt * (0.3, -0.2): KL and its gradient by hand.
    kl, gradient = 0.0, torch.zeros(2)
    shift = torch.tensor([0.3, -0.2])
    for s in rollout.trajectory.steps:
        t, dt = float(policy.grid[s]), float(policy.grid[s + 1] - policy.grid[s])
        sigma2 = policy.cfg.noise**2 * t / (1 - t)
        gain = ((1 + sigma2 * (1 - t) / (2 * t)) * dt) ** 2 / (2 * sigma2 * -dt)
        kl += 12 * gain * float(shift.square().mean())
        gradient += 12 * gain * shift  # d/d(shift) of the mean over two dimensions
    assert float(total.detach()) == pytest.approx(kl, rel=1e-4)
    torch.testing.assert_close(network.head.bias.grad, gradient, rtol=1e-4, atol=1e-6)


def test_without_reference_kl_is_0(make_policy):
    policy = make_policy()
    assert all((chunk.kl == 0).all() for chunk in policy.replay(policy.rollout(COND, 2, STREAMS)))


def test_one_step_along_the_advantage_raises_the_surrogate(make_policy, network):
    policy = make_policy()
    rollout = policy.rollout(COND, 8, STREAMS)
    advantage = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))

    def gain() -> torch.Tensor:
        return sum(
            ((chunk.log_prob - rollout.log_prob[chunk.at]).exp() * advantage[chunk.at[:2]]).sum()
            for chunk in policy.replay(rollout)
        )

    before = gain()
    gradient = torch.autograd.grad(before, list(network.parameters()))
    slope = sum(g.square().sum() for g in gradient)
    length = 1e-4 / slope.sqrt()
    with torch.no_grad():
        for p, g in zip(network.parameters(), gradient, strict=True):
            p += length * g
        assert float(gain() - before) == pytest.approx(float(length * slope), rel=0.2)
        for p, g in zip(network.parameters(), gradient, strict=True):
            p -= 2 * length * g
        assert gain() < before


def test_checkpointing_changes_no_gradient(make_policy, network):
    def gradient(policy: FlowPolicy) -> list[torch.Tensor]:
        rollout = policy.rollout(COND, 2, STREAMS)
        total = sum(chunk.log_prob.sum() for chunk in policy.replay(rollout))
        return list(torch.autograd.grad(total, list(network.parameters())))

    for plain, recomputed in zip(
        gradient(make_policy()), gradient(make_policy(gradient_checkpointing=True)), strict=True
    ):
        torch.testing.assert_close(recomputed, plain)


def test_the_shift_is_how_far_the_means_moved(make_policy, network):
    policy = make_policy(keep_means=True, micro_batch=5)
    rollout = policy.rollout(COND, 4, STREAMS)
    assert all((chunk.shift.drift == 0).all() for chunk in policy.replay(rollout))
    then = frozen_copy(network)
    with torch.no_grad():
        network.head.weight += 0.1
    expected = make_policy(reference=then)  # the KL to the rollout's own network is the same number
    for chunk, anchored in zip(policy.replay(rollout), expected.replay(rollout), strict=True):
        torch.testing.assert_close(chunk.shift.drift, anchored.kl, atol=1e-6, rtol=1e-3)
        s = rollout.trajectory.steps[int(chunk.at[2][0])]
        t, dt = float(policy.grid[s]), float(policy.grid[s] - policy.grid[s + 1])
        torch.testing.assert_close(chunk.shift.std, torch.full_like(chunk.kl, 0.7 * (t / (1 - t) * dt) ** 0.5))
        torch.testing.assert_close(chunk.shift.dt, torch.full_like(chunk.kl, dt))


def test_lora_off_is_the_network_without_its_adapters(network):
    peft = pytest.importorskip("peft")
    z, t, weights = torch.randn(5, 2), torch.rand(5), torch.full((5, 4), 0.25)
    base = network(z, t, weights).detach()
    adapted = peft.get_peft_model(network, peft.LoraConfig(r=2, target_modules=["head"], init_lora_weights=False))
    trainable = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trainable) == 2
    reference = lora_off(adapted)
    policy = FlowPolicy(adapted, encode_modes, (2,), SamplingConfig(num_steps=4), reference)
    torch.testing.assert_close(reference(z, t, weights), base, atol=0, rtol=0)
    assert (adapted(z, t, weights) - base).abs().max() > 1e-3  # and they are on again
    assert [name for name, p in adapted.named_parameters() if p.requires_grad] == trainable
    for chunk in policy.replay(policy.rollout(COND, 2, STREAMS)):
        assert (chunk.kl > 0).all()
        chunk.kl.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapted.parameters() if p.requires_grad)


def test_a_network_without_adapters_cannot_be_its_own_reference(network):
    with pytest.raises(ValueError, match="no LoRA layers"):
        lora_off(network)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sde": "flow_sdee"}, "unknown sde"),
        ({"noise": 0.0}, "noise must be > 0"),
        ({"noise": -1.0}, "noise must be > 0"),
        ({"sde": "flow_cps", "noise": 1.5}, "flow_cps"),
        ({"window": Window(size=6)}, "does not fit"),
        ({"window": Window(size=2, start=5)}, "does not fit"),
        ({"micro_batch": 0}, "micro_batch"),
        ({"num_steps": 0}, "num_steps"),
    ],
)
def test_bad_sampling_is_refused_before_any_compute(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**({"num_steps": 6} | settings))


def test_the_mixtures_velocity_is_the_posterior_mean_by_quadrature():
    """E[eps - z0 | z_t] as a ratio of integrals over z0 on a grid: p(z0) N(z_t; (1-t) z0, t^2)."""
    axis = torch.linspace(-4, 4, 321, dtype=torch.float64)
    z0 = torch.cartesian_prod(axis, axis)
    weights = torch.tensor([0.5, 0.2, 0.0, 0.3], dtype=torch.float64)
    modes = torch.tensor(list(MODES.values()), dtype=torch.float64)
    prior = (weights * (-(z0[:, None] - modes).square().sum(-1) / (2 * STD**2)).exp()).sum(-1)
    for t in (0.2, 0.6, 0.95):
        for z_t in torch.tensor([[0.3, 0.4], [-1.0, 0.2]], dtype=torch.float64):
            density = prior * (-(z_t - (1 - t) * z0).square().sum(-1) / (2 * t**2)).exp()
            mean_z0 = (density[:, None] * z0).sum(0) / density.sum()
            v = (z_t - mean_z0) / t  # eps = (z_t - (1-t) z0) / t
            found = mixture_velocity(z_t[None], torch.tensor([t], dtype=torch.float64), weights[None])[0]
            torch.testing.assert_close(found, v, atol=1e-8, rtol=1e-8)


def test_unknown_modes_are_refused():
    with pytest.raises(ValueError, match="'up' is no mode"):
        encode_modes(Condition(["east up"]))
    with pytest.raises(ValueError, match="no mode 'up'"):
        nearness("up", torch.zeros(2))


def test_a_fresh_correction_leaves_the_exact_velocity():
    z, t, weights = torch.randn(3, 2), torch.rand(3), torch.full((3, 4), 0.25)
    assert torch.equal(MixtureFlow()(z, t, weights), mixture_velocity(z, t, weights))
