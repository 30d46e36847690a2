"""Group-relative policy optimisation: rewards -> advantage -> surrogate. Torch only; knows nothing of video.

    r   reward, [B K]: K samples (a group) for each of B prompts
    A   advantage, [B K]: 0 for whoever did as well as its group
    rho ratio pi_now / pi_rollout of one decision, exp(log_ratio)

Sources: Flow-GRPO (arXiv 2505.05470) for the objective, VGGRPO (arXiv 2603.26599) for the average of z-scores,
GRPO-Guard (arXiv 2510.22319) for RatioNorm.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Aggregate = Literal["normalize_then_sum", "sum_then_normalize"]
Baseline = Literal["z_score", "leave_one_out"]
Silent = Literal["count", "drop"]

# Rewards of a group that differ by less than this, relative to their size, differ by rounding: nothing to learn there.
ROUNDING = 1e-6


def group_advantage(
    rewards: Mapping[str, Float[Tensor, "B K"]],
    weights: Mapping[str, float] | None = None,
    *,
    aggregate: Aggregate = "normalize_then_sum",
    baseline: Baseline = "z_score",
    silent: Silent = "count",
    clamp: float | None = None,
    gates: Mapping[str, str] = {},
) -> Float[Tensor, "B K"]:
    """How much better each sample is than its group: A = sum_i w_i A_i / sum_i w_i (VGGRPO: two rewards, w = 1/2).

    A sample with a reward that is not finite cannot be scored: its advantage is 0, and its group is judged without it.
    A group in which fewer than two samples can be scored, or all do equally well, has advantage 0.

    Args:
        rewards: one [B K] tensor per reward; bigger is better. Not finite: cannot be scored.
        weights: one number >= 0 per reward, default 1 each. A reward of weight 0 is ignored, its NaN too.
        aggregate: "normalize_then_sum" compares within each reward and then averages (the paper: rewards keep their
            weight whatever their scale); "sum_then_normalize" averages raw rewards and then compares.
        baseline: "z_score" is (r - mean) / std of the group (population std); "leave_one_out" is r minus the mean of
            the *other* members, whose policy gradient is unbiased but keeps the rewards' scale.
        silent: what becomes of the weight of a reward that cannot tell a group apart: "count" keeps it in the average
            (the paper: the others then say less), "drop" averages over the rewards that have a say in that group, so
            that a floor that nobody touches does not make all steps smaller.
        clamp: limit |A|; Flow-GRPO uses 5.
        gates: reward -> the reward that it is `gated` by; one of weight 0 may gate.

    Raises:
        ValueError: no rewards, groups of one, shapes that differ, weights that do not name the rewards, or a gate that
            is none of them, or not in [0, 1].
    """
    used = _weighted(rewards, weights)
    rewards = {**rewards, **{name: _gate(rewards, name, gate) for name, gate in gates.items()}}
    scored = torch.stack([rewards[name].isfinite() for name in used]).all(0)
    # float64: a sum of K equal fp32 rewards is then exact, so that equal rewards have std 0 and not 1e-9.
    r = torch.stack([rewards[name].double() for name in used]).where(scored, 0.0)
    w = torch.tensor(list(used.values()), dtype=r.dtype, device=r.device)[:, None, None] / sum(used.values())
    if aggregate == "sum_then_normalize":
        advantage = _compare((w * r).sum(0), scored, baseline)
    else:
        each = torch.stack([_compare(one, scored, baseline) for one in r])
        if silent == "drop":
            w = w * (each != 0).any(-1, keepdim=True)
            w = w / w.sum(0).clamp(min=ROUNDING)
        advantage = (w * each).sum(0)
    if clamp is not None:
        advantage = advantage.clamp(-clamp, clamp)
    return advantage.to(next(iter(rewards.values())).dtype)


def gated(reward: Float[Tensor, "B K"], gate: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """low + g (r - low): a sample whose gate is 1 has its reward; one whose gate is 0 is below all of its group.

    low is as far below the group's worst as its best is above it, so that what the gate shuts out loses to every sample
    that passes, whatever the reward's sign: to multiply a reward <= 0 by a gate of 0 would make it the best. The units
    of the reward do not matter. Not finite where either is not; best and worst are of those samples where both are.
    """
    scored = reward.isfinite() & gate.isfinite()
    r = reward.double()
    best = r.masked_fill(~scored, -torch.inf).amax(-1, keepdim=True)
    worst = r.masked_fill(~scored, torch.inf).amin(-1, keepdim=True)
    low = 2 * worst - best
    return torch.where(gate == 1, r, low + gate.double() * (r - low)).masked_fill(~scored, torch.nan).to(reward.dtype)


def indifferent(reward: Float[Tensor, "B K"]) -> Bool[Tensor, " B"]:
    """Groups that `reward` cannot tell apart: all equal up to rounding, or fewer than two finite values."""
    scored = reward.isfinite()
    r = reward.double().where(scored, 0.0)
    return _equal(r, _centre(r, scored)[1])


def clipped_surrogate(
    log_ratio: Float[Tensor, " n"], advantage: Float[Tensor, " n"], clip: float
) -> Float[Tensor, " n"]:
    """min(rho A, clip(rho, 1 - clip, 1 + clip) A): to be maximised, decision by decision (PPO; Flow-GRPO).

    No gain, hence no gradient, from moving a decision further than `clip` in the direction that its advantage asks for.
    """
    ratio = log_ratio.exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def ratio_norm(
    log_ratio: Float[Tensor, " n"], drift: Float[Tensor, " n"], std: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """(log_ratio + drift) std: centred on 0, and of one size at every noise level (RatioNorm, GRPO-Guard).

    With d = (mean_now - mean_then) / std over D latent dimensions and eps the rollout's noise, a mean log-ratio is
    mean(eps d) - mean(d^2)/2. Its noise shrinks as 1/sqrt(D) and its bias does not: over a video's 2 million dimensions
    a plain ratio is nearly always < 1, and the clip acts on negative advantages alone. `drift` = mean(d^2)/2 takes the
    bias out; `std` turns d into mean_now - mean_then, so that a clip means the same at every step. Clips are ~500 times
    smaller than for the plain ratio (GRPO-Guard: 2e-6), and the gain is divided by |dt|, which evens the gradients out.
    """
    return (log_ratio + drift) * std


def _gate(rewards: Mapping[str, Tensor], name: str, gate: str) -> Float[Tensor, "B K"]:
    for one in (name, gate):
        if one not in rewards:
            raise ValueError(f"gates name {one!r} but the rewards are {sorted(rewards)}")
    g = rewards[gate]
    finite = g[g.isfinite()]
    if not ((finite >= 0) & (finite <= 1)).all():
        raise ValueError(
            f"{gate} cannot gate {name}: a gate must be in [0, 1], as motion_prior is, and it went from "
            f"{float(finite.min()):.3g} to {float(finite.max()):.3g}"
        )
    return gated(rewards[name], g)


def _weighted(rewards: Mapping[str, Tensor], weights: Mapping[str, float] | None) -> dict[str, float]:
    if not rewards:
        raise ValueError("no rewards: a group is compared by at least one")
    weights = dict.fromkeys(rewards, 1.0) if weights is None else weights
    if set(weights) != set(rewards):
        raise ValueError(f"weights name {sorted(weights)} but the rewards are {sorted(rewards)}")
    shapes = {tuple(r.shape) for r in rewards.values()}
    if len(shapes) > 1:
        raise ValueError(f"rewards must share one shape [B K], got {sorted(shapes)}")
    if next(iter(shapes))[1] < 2:
        raise ValueError("a group of 1 has nothing to be compared with: group_size must be >= 2")
    if any(w < 0 for w in weights.values()) or not any(weights.values()):
        raise ValueError(f"weights must be >= 0 and not all 0, got {dict(weights)}")
    return {name: float(w) for name, w in weights.items() if w > 0}


def _compare(r: Float[Tensor, "B K"], scored: Bool[Tensor, "B K"], baseline: Baseline) -> Float[Tensor, "B K"]:
    num, centred = _centre(r, scored)
    if baseline == "leave_one_out":  # r_k - mean of the others = K/(K-1) (r_k - mean)
        advantage = centred * num / (num - 1).clamp(min=1)
    else:
        advantage = centred / (centred.square().sum(-1, keepdim=True) / num.clamp(min=1)).sqrt()
    return advantage.where(scored & ~_equal(r, centred)[:, None], 0.0)


def _centre(r: Float[Tensor, "B K"], scored: Bool[Tensor, "B K"]) -> tuple[Float[Tensor, "B 1"], Float[Tensor, "B K"]]:
    num = scored.sum(-1, keepdim=True).to(r)
    return num, (r - r.sum(-1, keepdim=True) / num.clamp(min=1)).where(scored, 0.0)


def _equal(r: Float[Tensor, "B K"], centred: Float[Tensor, "B K"]) -> Bool[Tensor, " B"]:
    return centred.abs().amax(-1) <= ROUNDING * r.abs().amax(-1)
