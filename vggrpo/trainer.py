"""Algorithm 1 of VGGRPO (arXiv 2603.26599): sample groups, score their latents, and make the better samples likelier.

Everything here is said in the paper's words. What a policy is, how rewards are computed and on how many ranks this runs
is decided elsewhere: `types.Policy`, `geometry` and `rewards`, `runtime.Run`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vggrpo.config import GrpoConfig
from vggrpo.grpo import clipped_surrogate, group_advantage, indifferent, ratio_norm
from vggrpo.runtime import Clock, Run
from vggrpo.types import Condition, Policy, Replay, Rollout

GeometryFn = Callable[[Tensor], Any]
"""Samples [B K *latent] -> scene: a latent geometry model; no VAE decode."""


class OfCondition(NamedTuple):
    """A reward that must know what was asked for."""

    reward: Callable[[Any, Condition], Tensor]
    """Scene and its B conditions -> [B K]."""


class OfRollout(NamedTuple):
    """A reward of the samples themselves: of their pixels, or someone else's."""

    ask: Callable[[Rollout], Callable[[], Tensor]]
    """The rollout -> what waits for its [B K]: all such rewards are asked before the others are computed."""


class OfBoth(NamedTuple):
    """A reward that compares a geometry with the samples themselves."""

    reward: Callable[[Any, Rollout], Tensor]
    """Scene and rollout -> [B K]."""


RewardFn = Callable[[Any], Tensor] | OfCondition | OfRollout | OfBoth
"""Scene -> [B K]; bigger is better, NaN is 'cannot be scored'."""


def train(
    policy: Policy,
    geometry: GeometryFn,
    rewards: Mapping[str, RewardFn],
    conditions: Iterable[Condition],
    optimizer: torch.optim.Optimizer,
    run: Run,
    cfg: GrpoConfig,
    first: int = 0,
) -> Iterator[dict[str, float]]:
    """Train on each global batch of `conditions` (B prompts, the same on every rank); yield what happened, in numbers.

    `first` is the number of the first iteration, for a run that goes on where it stopped.

    Raises:
        ValueError: a batch of another size than the run's, a reward that is not [B K], RatioNorm on a policy without
            Gaussian steps.
        FloatingPointError: too many gradients in a row were not finite (`Run.clip_and_step`).
    """
    for step, cond in enumerate(conditions, first):
        clock = Clock()
        update, turn = divmod(step, cfg.accumulate)
        generator = run.streams(cfg.seed, update, first_prompt=turn * run.num_prompts)
        with torch.no_grad():
            with clock("rollout"):
                rollout = policy.rollout(run.mine(cond), run.num_members, generator)
            with clock("geometry"):
                scene = geometry(rollout.z0)
            with clock("reward"):
                reward = run.gather(score(rewards, scene, rollout))
        advantage = advantage_of(reward, cfg)
        grad_norm = None
        with clock("update"):
            for _ in range(cfg.num_updates):
                last = turn == cfg.accumulate - 1
                replayed = replay_backward(policy, rollout, run.local(advantage), run, cfg, last=last)
                if last:
                    grad_norm = run.clip_and_step(optimizer, cfg.max_grad_norm)
        yield {"step": step, "update": update} | summary(reward, advantage, replayed, run, cfg, clock, grad_norm)


class Replayed(NamedTuple):
    """What a replay found at each decision, without graph."""

    log_ratio: Float[Tensor, "B K S"]
    gain: Float[Tensor, "B K S"]
    kl: Float[Tensor, "B K S"]


def replay_backward(
    policy: Policy,
    rollout: Rollout,
    advantage: Float[Tensor, "B K"],
    run: Run,
    cfg: GrpoConfig,
    *,
    last: bool = True,
) -> Replayed:
    """Add the gradient of -mean(gain - beta KL) over this rank's decisions, micro-batch by micro-batch.

    `last`: an optimiser step follows, and not another rollout of the same batch.
    """
    found = Replayed(*(torch.full_like(rollout.log_prob, float("nan")) for _ in range(3)))
    left = rollout.log_prob.numel()
    for chunk in policy.replay(rollout):
        left -= len(chunk.log_prob)
        log_ratio, gain = surrogate(chunk, rollout, advantage, cfg)
        loss = -(gain - cfg.beta * chunk.kl).sum() / rollout.log_prob.numel()
        run.backward(loss / cfg.accumulate, last=last and left == 0)
        for kept, value in zip(found, (log_ratio, gain, chunk.kl), strict=True):
            kept[chunk.at] = value.detach()
    return found


def surrogate(
    chunk: Replay, rollout: Rollout, advantage: Float[Tensor, "B K"], cfg: GrpoConfig
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """The log-ratio of each decision, and its clipped gain."""
    b, k, _ = chunk.at
    log_ratio = chunk.log_prob - rollout.log_prob[chunk.at]
    if cfg.ratio == "plain":
        return log_ratio, clipped_surrogate(log_ratio, advantage[b, k], cfg.clip)
    if chunk.shift is None:
        raise ValueError('ratio: "norm" needs a policy of Gaussian steps that keeps their means (keep_means=True)')
    log_ratio = ratio_norm(log_ratio, chunk.shift.drift, chunk.shift.std)
    return log_ratio, clipped_surrogate(log_ratio, advantage[b, k], cfg.clip) / chunk.shift.dt


def advantage_of(reward: Mapping[str, Float[Tensor, "B K"]], cfg: GrpoConfig) -> Float[Tensor, "B K"]:
    """`group_advantage` with a recipe's weights, gates and kinds of comparison."""
    return group_advantage(
        reward,
        cfg.named,
        aggregate=cfg.aggregate,
        baseline=cfg.baseline,
        silent=cfg.silent,
        clamp=cfg.clamp,
        gates=cfg.gates,
    )


def score(rewards: Mapping[str, RewardFn], scene: Any, rollout: Rollout) -> dict[str, Float[Tensor, "B K"]]:
    """Every reward of this rank's samples.

    Raises:
        ValueError: a reward that is not one number per sample, by name.
    """
    asked = {name: fn.ask(rollout) for name, fn in rewards.items() if isinstance(fn, OfRollout)}
    found = {name: _now(fn, scene, rollout) for name, fn in rewards.items() if not isinstance(fn, OfRollout)}
    found |= {name: wait() for name, wait in asked.items()}
    reward = {name: found[name] for name in rewards}
    for name, r in reward.items():
        if r.shape != rollout.z0.shape[:2]:
            raise ValueError(f"reward {name!r} must be [B K] = {list(rollout.z0.shape[:2])}, got {list(r.shape)}")
    return reward


def _now(fn: Callable[[Any], Tensor] | OfCondition | OfBoth, scene: Any, rollout: Rollout) -> Tensor:
    if isinstance(fn, OfCondition):
        return fn.reward(scene, rollout.cond)
    return fn.reward(scene, rollout) if isinstance(fn, OfBoth) else fn(scene)


def summary(
    reward: Mapping[str, Float[Tensor, "B K"]],
    advantage: Float[Tensor, "B K"],
    replayed: Replayed,
    run: Run,
    cfg: GrpoConfig,
    clock: Clock,
    grad_norm: float | None,
) -> dict[str, float]:
    """The numbers that tell learning from noise, over all ranks; `replayed` is the last pass over the rollout."""
    log_ratio, gain, kl = run.gather(replayed._asdict()).values()
    ratio, signs = log_ratio.exp(), advantage.sign()[..., None]
    clipped = ((ratio - 1) * signs > cfg.clip).double()
    numbers: dict[str, float] = {}
    for name, r in reward.items():
        scored = r[r.isfinite()].double()
        numbers[f"reward/{name}/mean"] = float(scored.mean())
        numbers[f"reward/{name}/std"] = float((scored - scored.mean()).square().mean().sqrt())
        numbers[f"reward/{name}/nan"] = 1 - len(scored) / r.numel()
        numbers[f"reward/{name}/zero_std"] = float(indifferent(r).double().mean())
    numbers |= {
        "loss": -float((gain - cfg.beta * kl).double().mean()),
        "advantage/std": float(advantage.double().std(correction=0)),
        "advantage/zero_groups": float((advantage == 0).all(-1).double().mean()),
        "ratio/mean": float(ratio.double().mean()),
        "ratio/max": float(ratio.max()),
        "clip_fraction": float(clipped.mean()),
        "kl": float(kl.double().mean()),
    }
    if grad_norm is not None:
        numbers |= {"grad_norm": grad_norm, "skipped": float(run.skipped)}
    numbers |= {f"seconds/{phase}": seconds for phase, seconds in clock.seconds.items()}
    numbers["samples_per_second"] = advantage.numel() / sum(clock.seconds.values())
    return numbers
