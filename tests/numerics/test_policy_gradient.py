"""The gradient that training follows is the gradient of the expected reward, on a chain where both are known.

The chain: v = theta, a constant. Every step is then linear in the state and in theta, and the last state is Gaussian:

    z_{s+1} = a_s z_s + b_s theta + std_s eps_s,   a = 1 + sigma^2 / (2t) dt,   b = (1 + sigma^2 (1-t) / (2t)) dt

GRPO sees theta through the trained steps only, for an ODE step has no likelihood: the derivatives here hold theta fixed
in all other steps. Log-probabilities are means over D dimensions and the loss is a mean over S decisions, so that the
loss's gradient is -1/(S D) that of the expected reward.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vggrpo.config import GrpoConfig, SamplingConfig
from vggrpo.flow import Gaussian
from vggrpo.grpo import group_advantage
from vggrpo.policy.flow_policy import FlowPolicy, FlowTrajectory
from vggrpo.runtime import Run
from vggrpo.sampler import Window
from vggrpo.trainer import replay_backward
from vggrpo.types import Condition, Rollout, Streams

GOAL = 1.5


class Constant(nn.Module):
    def __init__(self, theta: list[float]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta))

    def forward(self, z_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return self.theta.expand_as(z_t)


def run_of(num_prompts: int, group_size: int) -> Run:
    return Run(Accelerator(cpu=True), num_prompts, group_size)


def chain(policy: FlowPolicy) -> list[tuple[float, float, float]]:
    """(a, b, std) of each trained step, from the legend above."""
    steps = []
    for s in policy.cfg.window.steps(0, policy.cfg.num_steps):
        t, dt = float(policy.grid[s]), float(policy.grid[s + 1] - policy.grid[s])
        sigma2 = policy.cfg.noise**2 * t / (1 - t)
        steps.append((1 + sigma2 / (2 * t) * dt, (1 + sigma2 * (1 - t) / (2 * t)) * dt, math.sqrt(sigma2 * -dt)))
    return steps


def policy_of(theta: list[float], window: Window) -> FlowPolicy:
    sampling = SamplingConfig(num_steps=5, window=window, micro_batch=10_000)
    return FlowPolicy(Constant(theta), lambda cond: torch.zeros(len(cond), 1), (len(theta),), sampling)


def enumerated(policy: FlowPolicy, eps: Tensor, start: float) -> Rollout:
    """A rollout with given noise [B K S], one dimension, every chain starting at the window from `start`."""
    B, K, S = eps.shape
    theta, states = float(policy.network.theta.detach()), [torch.full((B * K,), start, dtype=torch.float64)]
    log_prob = []
    for i, (a, b, std) in enumerate(chain(policy)):
        noise = eps[..., i].flatten()
        states.append(a * states[-1] + b * theta + std * noise)
        log_prob.append(-(noise**2) / 2 - math.log(std) - math.log(2 * math.pi) / 2)
    steps = policy.cfg.window.steps(0, policy.cfg.num_steps)
    z0 = states[-1] - float(policy.grid[steps.stop]) * theta
    none = torch.zeros(B * K, 1)
    notes = FlowTrajectory(steps, torch.stack(states).float()[..., None], None, none, none, z0.float()[:, None])
    return Rollout(Condition([""] * B), z0.view(B, K, 1), torch.stack(log_prob, -1).view(B, K, S).float(), notes)


def quadrature(num_axes: int, nodes: int) -> tuple[Tensor, Tensor]:
    """Points [N num_axes] and weights [N] of the standard normal: exact for polynomials up to degree 2 nodes - 1."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    w = w / w.sum()
    points = torch.tensor(list(itertools.product(x, repeat=num_axes)), dtype=torch.float64)
    weights = torch.tensor([math.prod(p) for p in itertools.product(w, repeat=num_axes)], dtype=torch.float64)
    return points, weights


def expected_gradient(policy: FlowPolicy, rollout: Rollout, advantage: Tensor, weights: Tensor, run: Run) -> float:
    """-S times the loss's gradient, each group weighted with its probability."""
    weighted = advantage * weights[:, None] * len(weights)
    policy.network.theta.grad = None
    replay_backward(policy, rollout, weighted.float(), run, GrpoConfig(beta=0.0, clip=0.2))
    return -float(policy.network.theta.grad) * rollout.log_prob.shape[-1]


def test_leave_one_out_gives_the_derivative_of_the_expected_reward():
    """Two trained steps, two members: 3^4 noise values are exact for (quadratic reward) x (linear score)."""
    policy = policy_of([0.4], Window(size=2, start=1))
    eps, weights = quadrature(num_axes=4, nodes=3)
    rollout = enumerated(policy, eps.view(-1, 2, 2), start=-0.3)
    reward = -((rollout.z0[..., 0] - GOAL) ** 2)
    found = expected_gradient(
        policy, rollout, group_advantage({"r": reward}, baseline="leave_one_out"), weights, run_of(1, 2)
    )

    (a1, b1, _), (a2, b2, _) = chain(policy)
    mean = a2 * (a1 * -0.3 + b1 * 0.4) + b2 * 0.4 - 0.4 * float(policy.grid[3])
    exact = -2 * (mean - GOAL) * (a2 * b1 + b2)
    assert found == pytest.approx(exact, rel=1e-4)

    own_mean = expected_gradient(policy, rollout, reward - reward.mean(-1, keepdim=True), weights, run_of(1, 2))
    assert own_mean == pytest.approx(exact / 2, rel=1e-4)  # the control: a member in its own baseline halves it
    no_baseline = expected_gradient(policy, rollout, reward, weights, run_of(1, 2))
    assert no_baseline == pytest.approx(exact, rel=1e-4)  # a baseline changes the variance, not the mean


def test_z_scored_gradient_agrees_with_brute_force():
    """Three members, one step, 5^3 noise values, summed in numpy from the definitions."""
    policy = policy_of([0.4], Window(size=1, start=2))
    eps, weights = quadrature(num_axes=3, nodes=5)
    rollout = enumerated(policy, eps.view(-1, 3, 1), start=0.1)
    reward = -((rollout.z0[..., 0] - GOAL) ** 2)
    found = expected_gradient(policy, rollout, group_advantage({"r": reward}), weights, run_of(1, 3))

    ((a, b, std),) = chain(policy)
    brute = 0.0
    for noise, weight in zip(eps.numpy(), weights.numpy(), strict=True):
        z0 = a * 0.1 + b * 0.4 + std * noise - 0.4 * float(policy.grid[3])
        r = -((z0 - GOAL) ** 2)
        if np.ptp(r) > 1e-9:
            brute += weight * np.mean((r - r.mean()) / r.std() * noise / std * b)  # d log_prob / d theta = eps b / std
    assert found == pytest.approx(brute, rel=1e-4)
    assert abs(brute) > 0.1


@pytest.mark.parametrize("mutant", ["none", "logged std x 1.15", "own mean as baseline", "sign"])
def test_sampled_gradient_is_right_and_each_mutant_is_not(mutant):
    """The whole policy, its own random numbers, two dimensions: within 4 standard errors, which are below 3 %."""
    policy = policy_of([0.4, -0.2], Window(size=2, start=1))
    logged = FlowPolicy(policy.network, policy.encode, (2,), policy.cfg)
    if mutant == "logged std x 1.15":  # BranchGRPO samples with one std and logs another
        logged.sde = lambda *args: Gaussian(policy.sde(*args).mean, 1.15 * policy.sde(*args).std)
    B, K, goal, found = 250, 4, 4.0, []
    for iteration in range(24):
        rollout = policy.rollout(Condition([""] * B), K, Streams(7, iteration))
        reward = -(rollout.z0 - goal).square().sum(-1)
        advantage = group_advantage({"r": reward}, baseline="leave_one_out")
        if mutant == "own mean as baseline":
            advantage = reward - reward.mean(-1, keepdim=True)
        if mutant == "sign":
            advantage = -advantage
        for chunk in logged.replay(rollout):
            rollout.log_prob[chunk.at] = chunk.log_prob.detach()
        policy.network.theta.grad = None
        replay_backward(logged, rollout, advantage, run_of(B, K), GrpoConfig(beta=0.0))
        found.append(-policy.network.theta.grad * 2 * 2)
    found = torch.stack(found).double()
    mean, error = found.mean(0), found.std(0) / math.sqrt(len(found))

    (a1, b1, _), (a2, b2, _) = chain(policy)
    theta = policy.network.theta.detach().double()
    start = (float(policy.grid[1]) - 1) * theta  # the prefix moves the mean of N(0, 1) noise
    final = a2 * (a1 * start + b1 * theta) + b2 * theta - theta * float(policy.grid[3])
    exact = -2 * (final - goal) * (a2 * b1 + b2)
    print(f"found {mean.tolist()}, exact {exact.tolist()}, standard error {error.tolist()}")
    assert (error < 0.03 * exact.abs()).all()
    assert bool(((mean - exact).abs() < 4 * error).all()) == (mutant == "none")
