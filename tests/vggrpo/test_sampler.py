"""Grids, windows and rollouts."""

import itertools

import pytest
import torch

from vggrpo import flow, sampler
from vggrpo.sampler import Window, draw, ode_sample, rollout, time_grid

GRID = time_grid(6, shift=3.0)


def velocity(z, t):
    return z.sin() * (1 + t) - z * 0.3


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(z=None, *, grid=GRID, steps=range(1, 3), noise_level=0.7, seed=1, velocity=velocity, **options):
    z = noise(12, 2, 5) if z is None else z
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    return rollout(velocity, z, grid, steps, flow.flow_sde_step, noise_level, generator, **options)


# Grids


@pytest.mark.parametrize(("num_steps", "shift"), [(1, 1.0), (10, 1.0), (50, 5.0)])
def test_a_grid_walks_from_noise_to_data(num_steps, shift):
    grid = time_grid(num_steps, shift)
    assert grid[0] == 1
    assert grid[-1] == 0
    assert len(grid) == num_steps + 1
    assert (grid.diff() < 0).all()


def test_the_shift_of_a_half_is_three_quarters():
    assert time_grid(2, shift=3.0).tolist() == [1.0, 0.75, 0.0]
    assert time_grid(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize(("num_steps", "shift"), [(4, 3.0), (20, 5.0), (50, 8.0)])
def test_the_grid_is_that_of_wans_scheduler_to_a_thousandth(num_steps, shift):
    """Diffusers ends u at 0.001 and starts it at 1 - 1e-6; where one undoes the shift, that is the whole difference."""
    diffusers = pytest.importorskip("diffusers")

    def u(t):
        return t / (shift - (shift - 1) * t)

    unipc = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, num_train_timesteps=1000
    )
    unipc.set_timesteps(num_steps)
    assert (u(time_grid(num_steps, shift)) - u(unipc.sigmas.double())).abs().max() < 1.01e-3
    assert (u(time_grid(num_steps, shift + 0.5)) - u(unipc.sigmas.double())).abs().max() > 5e-3
    kept = run(grid=unipc.sigmas, steps=range(2))
    assert kept.z0.isfinite().all()
    assert (kept.states[1] - kept.states[0]).std() < 1.5  # the guard: unguarded, the first std is over 100


# Windows


def test_a_fixed_window_stays():
    window = Window(size=3, start=2)
    assert {window.steps(i, 10) for i in range(50)} == {range(2, 5)}


def test_a_progressive_window_advances_and_returns():
    window = Window(size=2, kind="progressive", start=1, stop=5, advance_every=3)
    assert [window.steps(i, 8).start for i in range(15)] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 1, 1, 1, 2, 2, 2]
    strided = Window(size=2, kind="progressive", advance_every=1, stride=3)
    assert [strided.steps(i, 10).start for i in range(5)] == [0, 3, 6, 0, 3]


def test_a_random_window_visits_every_place_and_depends_on_seed_and_iteration_alone():
    window = Window(size=2, kind="random", start=1, stop=6, seed=7)
    places = [window.steps(i, 10) for i in range(200)]
    assert {p.start for p in places} == {1, 2, 3, 4}
    assert {len(p) for p in places} == {2}
    torch.manual_seed(3)
    assert [Window(size=2, kind="random", start=1, stop=6, seed=7).steps(i, 10) for i in range(200)] == places
    assert [Window(size=2, kind="random", start=1, stop=6, seed=8).steps(i, 10) for i in range(200)] != places


@pytest.mark.parametrize("kind", ["fixed", "random", "progressive"])
def test_no_window_holds_the_last_step(kind):
    for num_steps in range(3, 9):
        window = Window(size=2, kind=kind, advance_every=1)
        assert max(window.steps(i, num_steps).stop for i in range(40)) <= num_steps - 1


@pytest.mark.parametrize(
    ("window", "says"),
    [
        (Window(size=10), "does not fit before step 9 of 10"),
        (Window(size=2, start=8), "lower window.size or window.start"),
        (Window(size=2, start=-1), "does not fit"),
        (Window(size=2, stop=10), "an ODE step: at most 9"),
        (Window(size=2, start=1, stop=2), "does not fit before step 2"),
        (Window(size=0), "at least 1, got 0"),
        (Window(advance_every=0), "at least 1"),
        (Window(stride=0), "at least 1"),
    ],
)
def test_a_window_outside_the_grid_says_what_to_change(window, says):
    with pytest.raises(ValueError, match=says):
        window.check(10)


def test_an_unknown_kind_of_window_is_refused():
    window = Window()
    object.__setattr__(window, "kind", "rolling")  # past the type checker, which runs under pytest alone
    with pytest.raises(ValueError, match="fixed, random or progressive, got 'rolling'"):
        window.check(10)


# Rollouts


def test_a_rollout_keeps_the_states_of_its_trained_steps_alone():
    kept = run(steps=range(2, 5))
    assert kept.states.shape == (4, 12, 2, 5)
    assert kept.log_prob.shape == (12, 3)
    assert kept.z0.shape == (12, 2, 5)
    assert kept.steps == range(2, 5)


def test_states_before_and_after_the_window_are_on_the_ode():
    z = noise(12, 2, 5)
    kept = run(z, steps=range(2, 4))
    assert torch.equal(kept.states[0], ode_sample(velocity, z, GRID[:3]))
    assert torch.equal(kept.z0, ode_sample(velocity, kept.states[-1], GRID[4:]))
    assert not torch.allclose(kept.states[1], ode_sample(velocity, kept.states[0], GRID[2:4]), atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_log_prob_is_of_the_state_as_stored(dtype):
    """Reads the stored states back, as a replay does: equal to the bit. A replay of unrounded states would not be."""
    kept = run(dtype=dtype)
    assert kept.states.dtype == dtype
    for i, s in enumerate(kept.steps):
        z_t, z_next = kept.states[i].float(), kept.states[i + 1].float()
        step = flow.flow_sde_step(z_t, velocity(z_t, GRID[s]), GRID[s], GRID[s + 1], 0.7)
        assert torch.equal(flow.log_prob(z_next, step), kept.log_prob[..., i])
    if dtype == torch.bfloat16:
        unrounded = run(dtype=torch.float32)
        assert (unrounded.log_prob - kept.log_prob).abs().max() > 1e-4


def test_rounding_reaches_the_sample():
    kept = run(dtype=torch.bfloat16)
    assert torch.equal(kept.z0, ode_sample(velocity, kept.states[-1].float(), GRID[3:]))


@pytest.mark.parametrize("steps", [range(2), range(2, 4)])
def test_a_group_that_shares_its_noise_shares_the_steps_before_the_window(steps):
    """3 groups of 4: walking one sample per group to the window and then repeating it changes nothing but the cost."""
    rows = []

    def counted(z, t):
        rows.append(len(z))
        return velocity(z, t)

    z = noise(3, 2, 5)
    start = ode_sample(counted, z, GRID[: steps.start + 1]).repeat_interleave(4, dim=0)
    shared = run(start, grid=GRID[steps.start :], steps=range(len(steps)), velocity=counted)
    assert rows == [3] * steps.start + [12] * (6 - steps.start)
    apart = run(z.repeat_interleave(4, dim=0), steps=steps)
    assert torch.equal(shared.z0, apart.z0)
    assert torch.equal(shared.states, apart.states)
    assert torch.equal(shared.log_prob, apart.log_prob)
    assert (shared.z0[0] != shared.z0[1]).all()


def test_with_a_generator_per_sample_a_sample_does_not_feel_the_others():
    def seeds(*values):
        return [torch.Generator().manual_seed(i) for i in values]

    z = noise(3, 2, 5)
    together = run(z, seed=seeds(5, 6, 7))
    alone = run(z[1:], seed=seeds(6, 7))
    assert torch.equal(together.z0[1:], alone.z0)
    assert torch.equal(together.log_prob[1:], alone.log_prob)
    assert not torch.equal(together.z0[1:], run(z[1:], seed=seeds(5, 6)).z0)


def test_the_noise_of_a_step_is_standard_and_independent_across_samples_and_steps():
    z = torch.zeros(2000, 6)
    kept = run(z, velocity=lambda z, t: torch.zeros_like(z), steps=range(2))
    whitened = []
    for i, s in enumerate(kept.steps):
        step = flow.flow_sde_step(kept.states[i], torch.zeros_like(z), GRID[s], GRID[s + 1], 0.7)
        whitened.append((kept.states[i + 1] - step.mean) / step.std)
    tolerance = 4 / z.numel() ** 0.5
    for eps in whitened:
        assert abs(eps.mean()) < tolerance
        assert abs(eps.std() - 1) < tolerance
    assert abs((whitened[0] * whitened[1]).mean()) < tolerance
    assert abs((whitened[0][1:] * whitened[0][:-1]).mean()) < tolerance


def test_a_rollout_builds_no_graph():
    weight = torch.ones((), requires_grad=True)
    kept = run(velocity=lambda z, t: weight * velocity(z, t))
    assert not any(x.requires_grad for x in (kept.z0, kept.log_prob, kept.states))


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"steps": range(4, 6)}, "range in 0..4, got range\\(4, 6\\): the last of 6 is an ODE step"),
        ({"steps": range(0)}, "range in 0..4"),
        ({"steps": range(-1, 2)}, "range in 0..4"),
        ({"steps": range(0, 4, 2)}, "range in 0..4"),
        ({"noise_level": 0.0}, "noise > 0, got 0"),
        ({"grid": GRID[:-1]}, "must end at t = 0"),
        ({"seed": [torch.Generator()]}, "1 generators for 12 samples"),
    ],
)
def test_a_bad_rollout_is_refused_before_any_compute(bad, says):
    def expensive(z, t):
        raise AssertionError("the network ran")

    with pytest.raises(ValueError, match=says):
        run(velocity=expensive, **bad)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: time_grid(0), "num_steps must be at least 1"),
        (lambda: time_grid(5, shift=0.0), "shift must be > 0"),
        (lambda: ode_sample(velocity, noise(2, 3), GRID[:1], solver="rk4"), "choose euler or heun"),
    ],
)
def test_bad_grids_and_solvers_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_one_time_alone_returns_the_latents():
    z = noise(2, 3)
    assert ode_sample(velocity, z, GRID[:1]) is z
    assert sampler.normal((2, 3), torch.Generator().manual_seed(0)).dtype == torch.float32


def test_draw_is_the_guided_ode_of_a_network_and_its_texts():
    """Against the loop written out; one text for all samples is the same as one for each."""

    def network(z_t, t, text):
        return z_t * t[:, None] + text.mean(1)

    z, grid = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), time_grid(4, 2.0)
    texts = torch.tensor([[[0.5, 1.0]], [[-1.0, 0.0]], [[0.0, 2.0]]])
    negative = torch.tensor([[[0.3, 0.3]]])
    drawn, slow = draw(network, z, texts, negative, grid, 3.0), z
    for t, t_next in itertools.pairwise(grid.tolist()):
        v = slow * t + negative.mean(1)
        slow = slow + (t_next - t) * (v + 3.0 * (slow * t + texts.mean(1) - v))
    torch.testing.assert_close(drawn, slow)
    one = draw(network, z, texts[:1], negative, grid, 3.0)
    torch.testing.assert_close(one, draw(network, z, texts[:1].expand(3, -1, -1), negative, grid, 3.0))
    assert not torch.allclose(one[1:], drawn[1:])
    still = draw(network, z, texts, negative, grid, 3.0, change=lambda velocity: lambda z_t, t: torch.zeros_like(z_t))
    assert torch.equal(still, z)
