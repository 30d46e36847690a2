"""Advantages by hand and by a slow readable version; the surrogate and the ratios by their definitions."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from vggrpo.config import GrpoConfig
from vggrpo.grpo import clipped_surrogate, gated, group_advantage, indifferent, ratio_norm
from vggrpo.trainer import advantage_of

NAN = float("nan")


def slow_advantage(
    rewards: dict[str, np.ndarray], weights: dict[str, float], aggregate: str, baseline: str
) -> np.ndarray:
    """Member by member, in plain Python, from the definitions in words."""
    first = next(iter(rewards.values()))
    result = np.zeros(first.shape)
    total = sum(weights.values())
    for b in range(first.shape[0]):
        scored = [k for k in range(first.shape[1]) if all(math.isfinite(r[b, k]) for r in rewards.values())]
        columns = {name: [float(r[b, k]) for k in scored] for name, r in rewards.items()}
        scale = dict(weights)
        if aggregate == "sum_then_normalize":
            mixed = [sum(weights[n] * columns[n][i] for n in columns) / total for i in range(len(scored))]
            columns, scale = {"mixed": mixed}, {"mixed": 1.0}
        for name, values in columns.items():
            for i, k in enumerate(scored):
                others = values[:i] + values[i + 1 :]
                if not others or max(values) == min(values):
                    continue
                gap = (
                    values[i] - np.mean(others)
                    if baseline == "leave_one_out"
                    else (values[i] - np.mean(values)) / np.std(values)
                )
                result[b, k] += scale[name] / sum(scale.values()) * gap
    return result


def test_two_rewards_by_hand():
    """Group (1, 2, 3): z-scores (-sqrt(3/2), 0, sqrt(3/2)). Group (0, 0, 4): (-1/sqrt2, -1/sqrt2, sqrt2)."""
    rewards = {"motion": torch.tensor([[1.0, 2.0, 3.0]]), "geometry": torch.tensor([[0.0, 0.0, 4.0]])}
    a, b = math.sqrt(1.5), math.sqrt(0.5)
    expected = torch.tensor([[(-a - b) / 2, -b / 2, (a + 2 * b) / 2]])
    torch.testing.assert_close(group_advantage(rewards), expected)
    torch.testing.assert_close(group_advantage(rewards, {"motion": 3.0, "geometry": 1.0})[0, 1], torch.tensor(-b / 4))


def test_leave_one_out_by_hand():
    advantage = group_advantage({"r": torch.tensor([[1.0, 2.0, 6.0]])}, baseline="leave_one_out")
    torch.testing.assert_close(advantage, torch.tensor([[-3.0, -1.5, 4.5]]))


@pytest.mark.parametrize("baseline", ["z_score", "leave_one_out"])
@pytest.mark.parametrize("aggregate", ["normalize_then_sum", "sum_then_normalize"])
def test_agrees_with_the_slow_version(aggregate, baseline):
    rng = np.random.default_rng(0)
    for trial in range(20):
        rewards = {name: rng.normal(size=(4, 6)) * scale for name, scale in (("a", 1.0), ("b", 100.0), ("c", 0.01))}
        for r in rewards.values():
            r[rng.random(r.shape) < 0.1 * (trial % 4)] = rng.choice([np.nan, np.inf, -np.inf])
        rewards["a"][1] = 0.1  # a group without differences
        weights = {"a": 1.0, "b": 0.5, "c": 2.0}
        fast = group_advantage(
            {n: torch.tensor(r) for n, r in rewards.items()}, weights, aggregate=aggregate, baseline=baseline
        )
        np.testing.assert_allclose(fast, slow_advantage(rewards, weights, aggregate, baseline), atol=1e-12)


def test_a_z_score_ignores_the_rewards_scale_and_a_raw_sum_does_not():
    torch.manual_seed(0)
    a, b = torch.randn(3, 8), torch.randn(3, 8)
    for aggregate, blind in (("normalize_then_sum", True), ("sum_then_normalize", False)):
        before = group_advantage({"a": a, "b": b}, aggregate=aggregate)
        after = group_advantage({"a": a, "b": 1000 * b - 7}, aggregate=aggregate)
        assert torch.allclose(before, after, atol=1e-3) == blind


def test_an_unscored_member_has_no_advantage_and_no_say():
    rewards = {
        "r": torch.tensor([[1.0, NAN, 3.0], [1.0, 2.0, 3.0]]),
        "s": torch.tensor([[5.0, 9.0, 7.0], [0.0, 1.0, 3.0]]),
    }
    advantage = group_advantage(rewards)
    without = group_advantage({name: r[:1, [0, 2]] for name, r in rewards.items()})
    torch.testing.assert_close(advantage[0, [0, 2]], without[0])
    assert advantage[0, 1] == 0
    torch.testing.assert_close(advantage[1], group_advantage({n: r[1:] for n, r in rewards.items()})[0])


@pytest.mark.parametrize(
    "row",
    [[NAN, NAN, NAN], [NAN, 2.0, NAN], [0.1, 0.1, 0.1], [1e-9, 1e-9, 1e-9], [0.0, 0.0, 0.0], [math.inf, 1.0, NAN]],
)
@pytest.mark.parametrize("baseline", ["z_score", "leave_one_out"])
def test_a_group_that_cannot_be_told_apart_teaches_nothing(row, baseline):
    for dtype in (torch.float32, torch.float64):
        reward = torch.tensor([row], dtype=dtype)
        assert indifferent(reward).all()
        assert (group_advantage({"r": reward}, baseline=baseline) == 0).all()


def test_equal_rewards_would_differ_under_fp32_statistics():
    """The control of the case above: the usual fp32 z-score, with 1e-8 for safety, makes a winner out of rounding."""
    r = torch.full((1, 24), 0.7)
    r[0, 0] = torch.nextafter(r[0, 0], torch.tensor(1.0))
    assert ((r - r.mean()) / (r.std(correction=0) + 1e-8)).abs().max() > 0.5
    assert (group_advantage({"r": r}) == 0).all()


def test_small_but_real_differences_are_kept():
    r = 100 + 1e-3 * torch.arange(4.0, dtype=torch.float64)[None]
    torch.testing.assert_close(
        group_advantage({"r": r})[0, -1], torch.tensor(1.5 / math.sqrt(1.25), dtype=torch.float64)
    )


def test_a_reward_of_weight_zero_is_only_watched():
    r = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    watched = torch.full((2, 4), NAN)
    torch.testing.assert_close(group_advantage({"r": r, "w": watched}, {"r": 2.0, "w": 0.0}), group_advantage({"r": r}))


def test_clamp_limits_an_outlier():
    r = torch.zeros(1, 64)
    r[0, 0] = 1.0
    assert group_advantage({"r": r})[0, 0] == pytest.approx(math.sqrt(63), rel=1e-5)
    assert group_advantage({"r": r}, clamp=5.0)[0, 0] == 5.0


@pytest.mark.parametrize(
    ("rewards", "weights", "message"),
    [
        ({}, None, "no rewards"),
        ({"r": torch.ones(2, 1)}, None, "group_size must be >= 2"),
        ({"r": torch.ones(2, 4)}, {"q": 1.0}, "weights name"),
        ({"r": torch.ones(2, 4)}, {"r": -1.0}, ">= 0"),
        ({"r": torch.ones(2, 4)}, {"r": 0.0}, "not all 0"),
    ],
)
def test_bad_input_is_refused(rewards, weights, message):
    with pytest.raises(ValueError, match=message):
        group_advantage(rewards, weights)


def test_the_surrogate_is_flat_beyond_the_clip_and_only_there():
    log_ratio = torch.tensor([0.0, 0.3, -0.3, 0.3, -0.3, 0.1], requires_grad=True)
    advantage = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    gain = clipped_surrogate(log_ratio, advantage, clip=0.2)
    expected = [2.0, 2 * 1.2, 2 * math.exp(-0.3), -2 * math.exp(0.3), -2 * 0.8, -2 * math.exp(0.1)]
    torch.testing.assert_close(gain, torch.tensor(expected))
    (gradient,) = torch.autograd.grad(gain.sum(), log_ratio)
    flat = gradient == 0
    assert flat.tolist() == [False, True, False, False, True, False]
    torch.testing.assert_close(gradient[0], torch.tensor(2.0))  # at ratio 1: A grad log_prob


@pytest.mark.parametrize("num_dims", [100, 100_000])
def test_ratio_norm_is_centred_and_of_one_size_where_the_plain_ratio_is_not(num_dims):
    """log_ratio re-derived from two Gaussians; the means differ by `gap` everywhere, whatever the std."""
    generator = torch.Generator().manual_seed(1)
    gap, sizes, biases = 0.02, [], []
    for std in (0.05, 0.5):
        eps = (
            torch.randn(400, num_dims, generator=generator)
            if num_dims < 1000
            else torch.randn(60, num_dims, generator=generator)
        )
        d = gap / std
        log_ratio = (-((eps - d) ** 2) / 2 + eps**2 / 2).mean(-1)
        drift = torch.full_like(log_ratio, d**2 / 2)
        normed = ratio_norm(log_ratio, drift, torch.full_like(log_ratio, std))
        standard_error = normed.std() / math.sqrt(len(normed))
        assert normed.mean().abs() < 4 * standard_error
        sizes.append(float(normed.std()))
        biases.append(float(log_ratio.mean().abs() / log_ratio.std()))
    for size in sizes:
        assert size == pytest.approx(gap / math.sqrt(num_dims), rel=0.3)
    if num_dims > 1000:  # the control: the plain log-ratio is then all bias
        assert max(biases) > 10


def test_a_silent_reward_can_be_left_out_of_the_average_group_by_group():
    told = torch.tensor([[1.0, 2.0, 4.0], [3.0, 1.0, 0.0]])
    floor = torch.tensor([[0.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    alone = group_advantage({"told": told})
    rewards, weights = {"told": told, "floor": floor}, {"told": 1.0, "floor": 3.0}
    counted = group_advantage(rewards, weights)
    dropped = group_advantage(rewards, weights, silent="drop")
    torch.testing.assert_close(counted[0], alone[0] / 4)
    torch.testing.assert_close(dropped[0], alone[0])
    torch.testing.assert_close(dropped[1], counted[1])  # there the floor has a say
    nobody = group_advantage({"a": torch.ones(1, 3), "b": torch.zeros(1, 3)}, silent="drop")
    assert torch.equal(nobody, torch.zeros(1, 3))


def test_a_gate_of_one_changes_nothing_and_a_gate_of_zero_is_below_the_whole_group():
    r = torch.tensor([[-0.3, -0.1, -0.5, -0.2]])  # a reward <= 0, as most are
    torch.testing.assert_close(gated(r, torch.ones(1, 4)), r, rtol=0, atol=0)
    half = gated(r, torch.tensor([[1.0, 0.0, 1.0, 0.5]]))
    torch.testing.assert_close(half, torch.tensor([[-0.3, -0.9, -0.5, -0.55]]))  # low = -0.5 - (0.5 - 0.1)
    shut = r * torch.tensor([[1.0, 0.0, 1.0, 0.5]])
    assert shut.argmax() == 1  # the control: to multiply would make the second, which is shut out, the best
    assert half.argmin() == 1
    torch.testing.assert_close(gated(3 * r - 7, torch.tensor([[1.0, 0.0, 1.0, 0.5]])), 3 * half - 7)


def test_a_gate_judges_only_those_that_both_can_score():
    r = torch.tensor([[1.0, 2.0, NAN, 9.0], [1.0, 1.0, 1.0, 1.0]])
    g = torch.tensor([[1.0, 0.5, 1.0, NAN], [0.0, 1.0, 0.2, 1.0]])
    found = gated(r, g)
    torch.testing.assert_close(found[0, :2], torch.tensor([1.0, 1.0]))  # low = 1 - (2 - 1); 9 does not count
    assert found[0, 2:].isnan().all()
    assert found[1].eq(1).all()  # no one is better than another: nothing to take away
    every = gated(torch.full((1, 3), NAN), torch.ones(1, 3))
    assert every.isnan().all()


def test_a_gate_needs_no_weight_and_its_gated_rewards_are_compared_as_any():
    r, gate = torch.tensor([[0.1, 0.4, 0.9]]), torch.tensor([[1.0, 1.0, 0.0]])
    cfg = GrpoConfig(weights={"r": 2.0}, gates={"r": "gate"})
    assert cfg.named == {"gate": 0.0, "r": 2.0}
    found = group_advantage({"gate": gate, "r": r}, cfg.named, gates=cfg.gates)
    assert torch.equal(advantage_of({"gate": gate, "r": r}, cfg), found), "as the trainer asks"
    assert advantage_of({"gate": gate, "r": r}, replace(cfg, clamp=0.5)).abs().max() == 0.5
    torch.testing.assert_close(found, group_advantage({"r": gated(r, gate)}))
    assert found.argmax() == 1
    assert group_advantage({"r": r}).argmax() == 2  # the control: without the gate
    both = GrpoConfig(weights={"r": 1.0, "gate": 3.0}, gates={"r": "gate"})
    assert both.named == {"gate": 3.0, "r": 1.0}
    assert GrpoConfig().named is None


def test_what_cannot_gate_is_one_line():
    rewards = {"r": torch.tensor([[0.1, 0.4]]), "floor": torch.tensor([[0.0, -1.0]])}
    with pytest.raises(ValueError, match=r"floor cannot gate r: a gate must be in \[0, 1\], .* it went from -1 to 0"):
        group_advantage(rewards, {"r": 1.0, "floor": 0.0}, gates={"r": "floor"})
    with pytest.raises(ValueError, match=r"gates name 'prior' but the rewards are \['floor', 'r'\]"):
        group_advantage(rewards, gates={"r": "prior"})
    with pytest.raises(ValueError, match="gates: 'r' is gated and has no weight: add it to weights"):
        GrpoConfig(gates={"r": "g"})
    with pytest.raises(ValueError, match="gates: 'b' gates 'a' and is gated itself: leave one out"):
        GrpoConfig(weights={"a": 1.0, "b": 1.0}, gates={"a": "b", "b": "c"})
