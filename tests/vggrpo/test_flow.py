"""One-step laws against the score of an analytic density, the ends of time, log-probability and KL."""

import math

import pytest
import torch
from torch import distributions

from vggrpo import flow, sampler
from vggrpo.flow import Gaussian

MEAN, STD = 0.8, 0.6
"""Data is N(MEAN, STD^2) in every dimension, so z_t is normal too and everything is known."""
NOISE = 0.7
STEPS = [(0.95, 0.9), (0.7, 0.45), (0.31, 0.3), (0.2, 0.02)]


def marginal(t):
    mean, std = torch.tensor([(1 - t) * MEAN, math.sqrt((1 - t) ** 2 * STD**2 + t**2)], dtype=torch.float64)
    return distributions.Normal(mean, std)


def score(z, t):
    z = z.clone().requires_grad_()
    return torch.autograd.grad(marginal(t).log_prob(z).sum(), z)[0]


def velocity(z, t):
    """E[eps - z0 | z_t] from the joint covariance of (z0, eps, z_t): does not know of the score."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    off_centre = z - (1 - t) * MEAN
    return t / variance * off_centre - (MEAN + (1 - t) * STD**2 / variance * off_centre)


def law(name, z, t, t_next):
    """Mean and std of one step, written with the score alone."""
    dt = t_next - t
    drift = -(z + t * score(z, t)) / (1 - t)
    if name == "flow_cps":
        z0, eps = (z + t**2 * score(z, t)) / (1 - t), -t * score(z, t)
        angle = NOISE * math.pi / 2
        return (1 - t_next) * z0 + t_next * math.cos(angle) * eps, t_next * math.sin(angle)
    sigma = {"flow_sde": NOISE * math.sqrt(t / (1 - t)), "dance_sde": NOISE, "euler": 0.0}[name]
    return z + (drift - sigma**2 / 2 * score(z, t)) * dt, sigma * math.sqrt(-dt)


def error(step, name):
    """Largest deviation from the law, over times and states."""
    z = torch.linspace(-2, 3, 11, dtype=torch.float64)
    worst = 0.0
    for t, t_next in STEPS:
        mean, std = law(name, z, t, t_next)
        got = step(z, velocity(z, t), t, t_next, NOISE)
        worst = max(worst, (got.mean - mean).abs().max().item(), abs(got.std.item() - std))
    return worst


def moved(step, factor):
    """The step with the part of its mean that the ODE lacks multiplied by `factor`."""

    def mutant(z, v, t, t_next, noise):
        ode = flow.euler_step(z, v, t, t_next)
        got = step(z, v, t, t_next, noise)
        return Gaussian(ode + factor * (got.mean - ode), got.std)

    return mutant


def respread(step, factor):
    def mutant(z, v, t, t_next, noise):
        got = step(z, v, t, t_next, noise)
        return Gaussian(got.mean, got.std * factor(t - t_next))

    return mutant


MUTANTS = {
    "no 1/2 in the drift": lambda step: moved(step, 2.0),
    "wrong sign of the drift": lambda step: moved(step, -1.0),
    "ODE drift with SDE noise": lambda step: moved(step, 0.0),
    "1.15 x noise": lambda step: respread(step, lambda _: 1.15),
    "missing sqrt(dt)": lambda step: respread(step, lambda dt: dt**-0.5),
    "dt for sqrt(dt)": lambda step: respread(step, lambda dt: dt**0.5),
}


@pytest.mark.parametrize("name", flow.SDE_STEPS)
def test_one_step_law_follows_from_the_score(name):
    assert error(flow.sde_step(name), name) < 1e-10


@pytest.mark.parametrize("name", flow.SDE_STEPS)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_breaks_the_one_step_law(name, mutant):
    assert error(MUTANTS[mutant](flow.sde_step(name)), name) > 1e-3


def test_euler_step_is_the_probability_flow():
    def ode(z, v, t, t_next, noise):
        return Gaussian(flow.euler_step(z, v, t, t_next), torch.zeros(()))

    assert error(ode, "euler") < 1e-10
    assert error(lambda z, v, t, t_next, noise: ode(z, -v, t, t_next, noise), "euler") > 1e-3


def test_heun_step_is_the_trapezoid_rule():
    z = torch.linspace(-2, 3, 11, dtype=torch.float64)
    for t, t_next in [*STEPS, (1.0, 0.8), (0.2, 0.0)]:
        slope = velocity(z, t)
        expected = z + (t_next - t) * (slope + velocity(z + (t_next - t) * slope, t_next)) / 2
        assert (flow.heun_step(velocity, z, t, t_next) - expected).abs().max() < 1e-12


def test_z0_and_eps_are_read_back_from_a_noised_latent():
    z0, eps = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in (0.0, 0.3, 1.0):
        z_t = flow.interpolate(z0, eps, t)
        assert torch.allclose(flow.predict_z0(z_t, eps - z0, t), z0, atol=1e-12)
        assert torch.allclose(flow.predict_eps(z_t, eps - z0, t), eps, atol=1e-12)
    assert torch.equal(flow.interpolate(z0, eps, 0.0), z0)
    assert torch.equal(flow.interpolate(z0, eps, 1.0), eps)


@pytest.mark.parametrize("start", [1.0, 1 - 1e-6, 0.999])
@pytest.mark.parametrize(("num_steps", "shift"), [(4, 3.0), (10, 1.0), (20, 5.0), (50, 8.0)])
def test_the_first_step_on_a_wan_grid_has_std_a(num_steps, shift, start):
    grid = sampler.time_grid(num_steps, shift)
    grid[0] = start
    t, t_next = grid[0], grid[1]
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    step = flow.flow_sde_step(z, velocity(z, t), t, t_next, NOISE)
    assert step.std == pytest.approx(NOISE * start**0.5, rel=1e-14)
    eps = z + (1 - t) * velocity(z, t)
    sigma2 = NOISE**2 * t / (t - t_next)
    mean = z + (velocity(z, t) + sigma2 / (2 * t) * eps) * (t_next - t)
    assert (step.mean - mean).abs().max() < 1e-12
    # The control: sigma_t as printed is infinite or far too loud here, and the second step needs no guard.
    printed = NOISE * torch.sqrt(t / (1 - t)) * torch.sqrt(t - t_next)
    assert printed > 1.2 * step.std
    t, t_next = grid[1], grid[2]
    second = flow.flow_sde_step(z, velocity(z, t), t, t_next, NOISE)
    assert abs(second.std - NOISE * torch.sqrt(t / (1 - t)) * torch.sqrt(t - t_next)) < 1e-12


@pytest.mark.parametrize("name", flow.SDE_STEPS)
def test_every_step_is_finite_at_pure_noise(name):
    z = torch.linspace(-2, 2, 9)
    step = flow.sde_step(name)(z, velocity(z, 1.0), 1.0, 0.98, NOISE)
    assert step.mean.isfinite().all()
    assert 0 < step.std < 1


@pytest.mark.parametrize("name", flow.SDE_STEPS)
def test_maths_is_fp32_for_low_precision_latents_and_float64_for_float64(name):
    step = flow.sde_step(name)
    for given, exact in [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2]:
        z = torch.linspace(-2, 2, 6).to(given).view(2, 3)
        got = step(z, -z, 0.7, 0.6, NOISE)
        assert got.mean.dtype == exact
        assert torch.equal(got.mean, step(z.to(exact), -z.to(exact), 0.7, 0.6, NOISE).mean)
        assert flow.log_prob(z, got).dtype == exact


@pytest.mark.parametrize("name", flow.SDE_STEPS)
def test_one_time_per_sample_equals_one_sample_per_time(name):
    step = flow.sde_step(name)
    z = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, t_next = torch.tensor([[1.0, 0.6, 0.3], [0.9, 0.5, 0.1]], dtype=torch.float64).view(2, 3, 1)
    together = flow.log_prob(z, step(z, -z, t, t_next, NOISE))
    for i in range(3):
        alone = flow.log_prob(z[i : i + 1], step(z[i : i + 1], -z[i : i + 1], float(t[i]), float(t_next[i]), NOISE))
        assert torch.allclose(together[i], alone[0], rtol=1e-12)


def test_log_prob_is_the_mean_of_torchs_normal():
    z = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step = Gaussian(z.roll(1, 0), torch.tensor(0.3, dtype=torch.float64))
    expected = distributions.Normal(step.mean, step.std).log_prob(z).mean((1, 2, 3))
    assert (flow.log_prob(z, step) - expected).abs().max() < 1e-10


def test_kl_is_the_mean_of_torchs_kl_of_two_normals():
    v, other = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step, reference = (flow.flow_sde_step(v, x, 0.7, 0.5, NOISE) for x in (v, other))
    normals = (distributions.Normal(x.mean, x.std) for x in (step, reference))
    expected = distributions.kl_divergence(*normals).mean((1, 2, 3))
    kl = flow.kl_divergence(step, reference)
    assert (kl - expected).abs().max() < 1e-10
    # With dt: Flow-GRPO's SD3 script divides by 2 sigma_t^2, which is |dt| times this.
    sigma2 = NOISE**2 * 0.7 / 0.3
    assert torch.allclose(kl * 0.2, ((step.mean - reference.mean) ** 2 / (2 * sigma2)).mean((1, 2, 3)), rtol=1e-12)
    assert torch.equal(flow.kl_divergence(step, step), torch.zeros(2))


def test_kl_is_the_expected_log_ratio():
    z = torch.zeros(1, 4)
    step, reference = (flow.flow_sde_step(z, v, 0.7, 0.5, NOISE) for v in (z + 1, z - 1))
    drawn = sampler.sample(Gaussian(step.mean.expand(20_000, 4), step.std), torch.Generator().manual_seed(0))
    log_ratio = flow.log_prob(drawn, step) - flow.log_prob(drawn, reference)
    kl = flow.kl_divergence(step, reference).item()
    assert log_ratio.mean().item() == pytest.approx(kl, abs=4 * log_ratio.std().item() / math.sqrt(20_000))
    assert kl > 0.05


@pytest.mark.parametrize("name", flow.SDE_STEPS)
def test_log_prob_and_kl_have_the_right_gradient_in_v(name):
    z, v, other, z_next = torch.randn(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step = flow.sde_step(name)

    def both(v):
        law = step(z, v, 0.8, 0.7, NOISE)
        return flow.log_prob(z_next, law), flow.kl_divergence(law, step(z, other, 0.8, 0.7, NOISE))

    assert torch.autograd.gradcheck(both, v.requires_grad_())


def test_two_stds_have_no_kl_here():
    z = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="same t, t_next and noise"):
        flow.kl_divergence(flow.flow_sde_step(z, z, 0.7, 0.5, 0.7), flow.flow_sde_step(z, z, 0.7, 0.5, 0.6))


@pytest.mark.parametrize("name", flow.SDE_STEPS)
@pytest.mark.parametrize(
    ("t", "t_next", "noise", "says"),
    [
        (0.1, 0.0, 0.7, "last step is an ODE step"),
        (0.5, 0.6, 0.7, "1 >= t > t_next > 0"),
        (0.5, 0.5, 0.7, "1 >= t > t_next > 0"),
        (1.1, 0.6, 0.7, "1 >= t > t_next > 0"),
        (math.nan, 0.6, 0.7, "1 >= t > t_next > 0"),
        (0.5, 0.4, 0.0, "noise > 0"),
        (0.5, 0.4, -1.0, "noise > 0"),
        (0.5, 0.4, math.nan, "noise > 0"),
    ],
)
def test_a_step_that_cannot_be_taken_says_why(name, t, t_next, noise, says):
    with pytest.raises(ValueError, match=says):
        flow.sde_step(name)(torch.zeros(2), torch.zeros(2), t, t_next, noise)


def test_more_than_a_quarter_turn_and_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"\(0, 1\]; got 1.5"):
        flow.flow_cps_step(torch.zeros(2), torch.zeros(2), 0.5, 0.4, 1.5)
    with pytest.raises(ValueError, match=r"unknown sde 'ddpm': choose one of flow_sde, dance_sde, flow_cps"):
        flow.sde_step("ddpm")
