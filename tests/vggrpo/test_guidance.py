"""Guidance against closed forms for Gaussian data, and on a mixture: it raises the reward without training."""

import math

import pytest
import torch
from scipy.integrate import quad

from vggrpo.flow import interpolate, predict_z0
from vggrpo.guidance import classifier_free, guided
from vggrpo.sampler import ode_sample, time_grid

SCALES = [0.0, 1.0, 2.0, 4.0]


def variance(t, std):
    return (1 - t) ** 2 * std**2 + t**2


def gaussian_velocity(mean, std):
    """The velocity of data N(mean, std^2): affine in z, slope(t) z + offset(t)."""

    def velocity(z, t):
        slope = (t - (1 - t) * std**2) / variance(t, std)
        return slope * (z - (1 - t) * mean) - mean

    return velocity


def guided_gaussian(conditional, unconditional, scale):
    """Gain A and offset b with z(0) = A z(1) + b, for the affine velocity v_u + scale (v_c - v_u), by its integrals.

    The slope of a Gaussian's velocity is d/dt log sqrt(variance), so its integral is exact: between t and 0 a state
    grows by G(t) = prod_i (std_i / sqrt(variance_i(t)))^weight_i. b integrates the offsets against G.
    """
    parts = [(scale, *conditional), (1 - scale, *unconditional)]

    def growth(t):
        return math.prod((std / math.sqrt(variance(t, std))) ** weight for weight, _, std in parts)

    def offset(t):
        return sum(weight * gaussian_velocity(mean, std)(0.0, t) for weight, mean, std in parts)

    return growth(1.0), -quad(lambda t: offset(t) * growth(t), 0, 1, epsabs=1e-12)[0]


EMPTY, NEGATIVE = (-0.5, 0.9), (2.0, 0.5)
CONDITIONAL = (1.0, 0.4)


@pytest.mark.parametrize("unconditional", [EMPTY, NEGATIVE], ids=["empty prompt", "negative prompt"])
@pytest.mark.parametrize("scale", SCALES)
def test_classifier_free_samples_follow_the_affine_closed_form(scale, unconditional):
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    velocity = classifier_free(gaussian_velocity(*CONDITIONAL), gaussian_velocity(*unconditional), scale)
    gain, offset = guided_gaussian(CONDITIONAL, unconditional, scale)
    got = ode_sample(velocity, z, time_grid(400), solver="heun")
    assert (got - (gain * z + offset)).abs().max() < 1e-3 * (1 + gain)
    # The control: half a unit of scale away, or the two prompts exchanged, is outside.
    for wrong in [
        guided_gaussian(CONDITIONAL, unconditional, scale + 0.5),
        guided_gaussian(unconditional, CONDITIONAL, scale),
    ]:
        assert (got - (wrong[0] * z + wrong[1])).abs().max() > 0.02


def test_the_closed_form_is_a_gaussian_where_it_must_be():
    assert guided_gaussian(CONDITIONAL, EMPTY, 1.0) == pytest.approx(CONDITIONAL[::-1], abs=1e-9)
    assert guided_gaussian(CONDITIONAL, EMPTY, 0.0) == pytest.approx(EMPTY[::-1], abs=1e-9)
    # Equal widths: guidance moves the mean to m_u + w (m_c - m_u) and keeps the width.
    assert guided_gaussian((1.0, 0.4), (-0.5, 0.4), 4.0) == pytest.approx((0.4, 5.5), abs=1e-9)


def test_scale_one_is_the_conditional_to_the_bit_and_runs_one_network():
    def never(z, t):
        raise AssertionError("the other network ran")

    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    network = gaussian_velocity(*CONDITIONAL)
    assert torch.equal(classifier_free(network, never, 1.0)(z, 0.7), network(z, 0.7))
    assert torch.equal(classifier_free(never, network, 0.0)(z, 0.7), network(z, 0.7))
    # Written out, scale 1 is not the conditional to the bit.
    v = gaussian_velocity(200.0, 0.5)(z, 0.7)
    assert not torch.equal(v + 1.0 * (network(z, 0.7) - v), network(z, 0.7))


# Reward guidance


DATA = (0.8, 0.6)
PULL = torch.tensor([0.7, -1.2], dtype=torch.float64)


def linear(z0):
    return z0 @ PULL


def tilted_error(velocity, scale=1.0):
    """Deviation from the velocity of p(z0) exp(scale r(z0)) = N(mean + scale std^2 PULL, std^2), on the grid."""
    grid = time_grid(10, shift=2.0)
    z = torch.randn(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, std = DATA
    expected = gaussian_velocity(mean + scale * std**2 * PULL, std)
    return max((velocity(z, t) - expected(z, t)).abs().max().item() for t in grid[1:-1])


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_a_linear_reward_tilts_gaussian_data_exactly(scale):
    velocity = guided(gaussian_velocity(*DATA), linear, scale, time_grid(10, shift=2.0))
    assert tilted_error(velocity, scale) < 1e-10


@pytest.mark.parametrize(
    "mutant",
    [
        lambda v, z, t: v(z, t) + t / (1 - t) * slope_through(v, z, t),
        lambda v, z, t: v(z, t) - t * slope_through(v, z, t),
        lambda v, z, t: v(z, t) - (1 - t) / t * slope_through(v, z, t),
        lambda v, z, t: v(z, t) - t / (1 - t) * PULL,
    ],
    ids=["wrong sign", "no 1/(1-t)", "weight upside down", "reward of z_t"],
)
def test_a_mutant_does_not_tilt(mutant):
    def right(z, t):
        return gaussian_velocity(*DATA)(z, t) - t / (1 - t) * slope_through(gaussian_velocity(*DATA), z, t)

    assert tilted_error(right) < 1e-10
    assert tilted_error(lambda z, t: mutant(gaussian_velocity(*DATA), z, t)) > 0.05


def slope_through(velocity, z, t):
    """grad_{z_t} r(z0(z_t)) for the linear reward and Gaussian data: PULL times dE[z0 | z_t] / dz_t."""
    return (1 - t) * DATA[1] ** 2 / variance(t, DATA[1]) * PULL


def test_without_the_network_the_gradient_is_that_of_the_reward_alone():
    grid = time_grid(10)
    seen = []

    def velocity(z, t):
        seen.append(z.requires_grad)
        return gaussian_velocity(*DATA)(z, t)

    z = torch.randn(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = grid[4]
    got = guided(velocity, lambda z0: (z0**3).sum(-1), 2.0, grid, through_network=False)(z, t)
    v = gaussian_velocity(*DATA)(z, t)
    assert torch.allclose(got, v - 2.0 * t / (1 - t) * 3 * predict_z0(z, v, t) ** 2, rtol=1e-12)
    assert seen == [False]


def test_guidance_acts_at_every_nth_step_and_never_at_the_first():
    grid = time_grid(50, shift=5.0)
    plain = gaussian_velocity(*DATA)
    z = torch.ones(3, 2, dtype=torch.float64)
    for every, expected in [(20, [20, 40]), (1, [*range(1, 50)]), (7, [7, 14, 21, 28, 35, 42, 49]), (50, [])]:
        velocity = guided(plain, linear, 1.0, grid, every)
        assert [s for s, t in enumerate(grid) if not torch.equal(velocity(z, t), plain(z, t))] == expected
    with pytest.raises(ValueError, match="every = 0"):
        guided(plain, linear, 1.0, grid, every=0)


@pytest.mark.parametrize(
    "lost",
    [
        lambda r, unscored: r.masked_fill(unscored, math.nan),
        lambda r, unscored: r * torch.ones_like(r).masked_fill(unscored, math.nan),
        lambda r, unscored: r + torch.zeros_like(r).masked_fill(unscored, math.inf),
        lambda r, unscored: r + (r.detach() - r).masked_fill(~unscored, 1.0).abs().sqrt(),
    ],
    ids=["NaN reward", "NaN reward and gradient", "infinite reward", "finite reward, NaN gradient"],
)
def test_a_sample_that_cannot_be_scored_goes_unguided_and_leaves_the_others_alone(lost):
    grid = time_grid(10)
    plain = gaussian_velocity(*DATA)
    z = torch.tensor([[1.0, 2.0], [-1.0, 2.0], [3.0, 1.0], [0.5, 0.5]], dtype=torch.float64).view(2, 2, 2)

    def partly(z0):
        return lost(linear(z0), torch.tensor([[False, True], [False, False]]))

    with torch.no_grad():
        got = guided(plain, partly, 1.0, grid)(z, grid[5])
        whole = guided(plain, linear, 1.0, grid)(z, grid[5])
    assert torch.equal(got[0, 1], plain(z, grid[5])[0, 1])
    assert torch.equal(got[[0, 1, 1], [0, 0, 1]], whole[[0, 1, 1], [0, 0, 1]])
    assert not torch.equal(whole[0, 1], got[0, 1])


@pytest.mark.parametrize("through_network", [True, False])
def test_guidance_leaves_no_graph_behind(through_network):
    z, grid = torch.ones(3, 2, dtype=torch.float64), time_grid(10)
    got = guided(gaussian_velocity(*DATA), linear, 1.0, grid, through_network=through_network)(z, grid[5])
    assert not got.requires_grad
    assert not z.requires_grad


def test_a_reward_without_a_gradient_is_refused():
    grid = time_grid(10)
    velocity = guided(gaussian_velocity(*DATA), lambda z0: linear(z0.detach()), 1.0, grid)
    with pytest.raises(ValueError, match="drop no_grad and detach"):
        velocity(torch.ones(3, 2, dtype=torch.float64), grid[5])


MODES = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0]])


def mixture_velocity(z, t):
    """E[eps - z0 | z_t] for three equal modes of width 0.4."""
    std = 0.4
    d2 = variance(t, std)
    off = z[..., None, :] - (1 - t) * MODES
    weight = (-(off**2).sum(-1) / (2 * d2)).softmax(-1)
    return (weight[..., None] * ((t - (1 - t) * std**2) / d2 * off - MODES)).sum(-2)


def test_guidance_raises_the_reward_of_a_mixture_without_training():
    """Towards one of three modes. Away from it or towards another mode lowers it; scale 0 changes nothing."""
    grid = time_grid(40)
    z = torch.randn(1500, 2, generator=torch.Generator().manual_seed(0))

    def reward(z0, mode=0):
        return -((z0 - MODES[mode]) ** 2).sum(-1) / 4

    def mean_reward(used, scale, every=1):
        velocity = guided(mixture_velocity, used, scale, grid, every)
        return reward(ode_sample(velocity, z, grid)).mean().item()

    plain = reward(ode_sample(mixture_velocity, z, grid)).mean().item()
    rising = [mean_reward(reward, scale) for scale in (0.0, 0.5, 1.0, 2.0)]
    assert rising[0] == plain
    assert rising == sorted(rising)
    assert rising[2] > plain / 2  # rewards are negative: at least half of the shortfall is gone
    assert mean_reward(reward, 4.0, every=10) > plain + 0.2
    assert mean_reward(lambda z0: -reward(z0), 1.0) < plain - 0.2
    assert mean_reward(lambda z0: reward(z0, mode=1), 1.0) < plain - 0.2


def test_interpolated_data_has_the_velocity_used_here():
    """The velocities above against samples: E[(v - velocity(z_t)) f(z_t)] = 0 is what makes them the regression."""
    generator = torch.Generator().manual_seed(0)
    z0 = MODES[torch.randint(3, (40_000,), generator=generator)] + 0.4 * torch.randn(40_000, 2, generator=generator)
    eps = torch.randn(40_000, 2, generator=generator)
    for t in (0.2, 0.6, 0.9):
        z_t = interpolate(z0, eps, t)
        for f in (torch.ones_like(z_t), z_t, z_t**2):
            residual = (eps - z0 - mixture_velocity(z_t, t)) * f
            assert (residual.mean(0).abs() < 4.5 * residual.std(0) / 200).all()
