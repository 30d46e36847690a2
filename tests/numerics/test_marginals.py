"""What a whole chain of steps does on a Gaussian mixture, whose velocity is known exactly."""

import itertools

import pytest
import torch

from vggrpo import flow
from vggrpo.flow import Gaussian
from vggrpo.sampler import ode_sample, rollout, time_grid

NUM = 6000
MODES = torch.tensor([[0.9, 0.0], [-0.6, 0.7], [-0.3, -1.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
STD = 0.45


def velocity(z, t):
    """E[eps - z0 | z_t], regular at both ends."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    off_centre = z[..., None, :] - (1 - t) * MODES.to(z)
    weight = (WEIGHTS.to(z).log() - (off_centre**2).sum(-1) / (2 * variance)).softmax(-1)
    return (weight[..., None] * ((t - (1 - t) * STD**2) / variance * off_centre - MODES.to(z))).sum(-2)


def noise(num, seed):
    return torch.randn(num, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def data(num, seed):
    generator = torch.Generator().manual_seed(seed)
    mode = torch.multinomial(WEIGHTS, num, replacement=True, generator=generator)
    return MODES[mode] + STD * torch.randn(num, 2, generator=generator, dtype=torch.float64)


def sliced_w2(a, b, num_projections=32):
    """Of two samples [N 2] of equal size."""
    angle = torch.arange(num_projections, dtype=a.dtype) * torch.pi / num_projections
    directions = torch.stack([angle.cos(), angle.sin()])
    return (((a @ directions).sort(0).values - (b @ directions).sort(0).values) ** 2).mean().sqrt().item()


def sde_samples(step, steps, noise_level, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return rollout(velocity, noise(NUM, seed), time_grid(100), steps, step, noise_level, generator).z0


def drifted(step, factor):
    """The step with what its mean adds to the ODE multiplied by `factor`."""

    def mutant(z, v, t, t_next, noise):
        ode, got = flow.euler_step(z, v, t, t_next), step(z, v, t, t_next, noise)
        return Gaussian(ode + factor * (got.mean - ode), got.std)

    return mutant


def louder(step):
    def mutant(z, v, t, t_next, noise):
        got = step(z, v, t, t_next, noise)
        return Gaussian(got.mean, 1.15 * got.std)

    return mutant


@pytest.fixture(scope="module")
def excess():
    """Sliced W2 of a sample to ODE samples, over the 99th percentile of its law between two samples of the ODE.

    That law is bootstrapped: 100 times, 2 NUM samples of the ODE are dealt into halves. Below 1: indistinguishable.
    """
    ode = ode_sample(velocity, noise(2 * NUM, 1), time_grid(50), solver="heun")
    generator = torch.Generator().manual_seed(0)
    deals = [torch.randperm(2 * NUM, generator=generator) for _ in range(100)]
    null = sorted(sliced_w2(ode[deal[:NUM]], ode[deal[NUM:]]) for deal in deals)
    return lambda samples: sliced_w2(samples, ode[:NUM]) / null[98]


def test_the_ode_samples_the_data(excess):
    assert excess(data(NUM, 5)) < 1
    assert excess(data(NUM, 5) * 1.1) > 1.5


# Flow-CPS holds no dt: it keeps the marginals in a short window near the noise, which is how it is used.
CHAINS = {
    "flow_sde": (flow.flow_sde_step, range(99), 1.2),
    "dance_sde": (flow.dance_sde_step, range(99), 1.2),
    "flow_cps": (flow.flow_cps_step, range(2), 0.7),
}


@pytest.mark.parametrize("name", CHAINS)
def test_an_sde_has_the_marginal_of_the_ode(name, excess):
    assert excess(sde_samples(*CHAINS[name])) < 1


@pytest.mark.parametrize("name", ["flow_sde", "dance_sde"])
@pytest.mark.parametrize(
    "mutant",
    [lambda step: drifted(step, 2.0), lambda step: drifted(step, 0.0), lambda step: drifted(step, -1.0), louder],
    ids=["no 1/2", "ODE drift", "wrong sign", "1.15 x noise"],
)
def test_a_mutant_has_another_marginal(name, mutant, excess):
    step, steps, noise_level = CHAINS[name]
    assert excess(sde_samples(mutant(step), steps, noise_level)) > 1.5


def test_flow_cps_shrinks_the_samples_when_every_step_is_stochastic(excess):
    samples = sde_samples(flow.flow_cps_step, range(99), 0.7)
    assert excess(samples) > 1.5
    assert samples.std() < 0.98 * data(NUM, 5).std()


def order(step):
    """Slope of log error over log dt at the end of the chain, against a fine Heun solution."""
    z = noise(200, 3)
    exact = ode_sample(velocity, z, time_grid(1024), solver="heun")
    errors = []
    for num in (32, 64, 128):
        got = z
        for t, t_next in itertools.pairwise(time_grid(num)):
            got = step(got, t, t_next)
        errors.append((got - exact).norm())
    return -torch.stack(errors).log2().diff().mean().item()


def test_euler_is_of_first_order():
    assert order(lambda z, t, t_next: flow.euler_step(z, velocity(z, t), t, t_next)) == pytest.approx(1, abs=0.05)


def test_heun_is_of_second_order():
    assert order(lambda z, t, t_next: flow.heun_step(velocity, z, t, t_next)) == pytest.approx(2, abs=0.05)


def test_heun_that_looks_back_at_t_is_of_first_order():
    def late(z, t, t_next):
        return flow.heun_step(lambda x, _: velocity(x, t), z, t, t_next)

    assert order(late) == pytest.approx(1, abs=0.05)
