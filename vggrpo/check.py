"""The pre-flight: one rollout and one replay of a recipe, and whether training on them can mean anything.

Most failed runs of these methods had failed here already, unseen: a ratio that is not 1 before any update, adapters
that were never injected, rewards that cannot tell a group apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vggrpo.config import GrpoConfig
from vggrpo.grpo import indifferent
from vggrpo.runtime import Clock, Run
from vggrpo.trainer import GeometryFn, RewardFn, advantage_of, replay_backward, score
from vggrpo.types import Condition, Policy


@dataclass(frozen=True)
class Report:
    """What the pre-flight found. It is passed when `problems` is empty."""

    num_trainable: int
    ratio_error: list[float] = field(default_factory=list)
    """max |ratio - 1| of each trained decision."""
    kl: float = float("nan")
    grad_norm: float = float("nan")
    zero_std: dict[str, float] = field(default_factory=dict)
    """For each reward, the fraction of groups that it cannot tell apart."""
    clock: Clock = field(default_factory=Clock)
    problems: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report as a person reads it."""
        seconds, peak = self.clock.seconds, self.clock.peak_bytes
        return [
            f"trainable parameters   {self.num_trainable:,}",
            *(f"ratio error, step {s:<3}   {error:.1e}" for s, error in enumerate(self.ratio_error)),
            f"KL at start            {self.kl:.1e}",
            f"gradient norm          {self.grad_norm:.3g}",
            *(f"groups without signal  {share:.0%} ({name})" for name, share in self.zero_std.items()),
            *(f"{phase:<10} {seconds[phase]:8.2f} s  {peak[phase] / 2**20:8.0f} MiB at most" for phase in seconds),
            *(f"PROBLEM: {problem}" for problem in self.problems),
        ]


def check(
    policy: Policy,
    network: nn.Module,
    geometry: GeometryFn,
    rewards: Mapping[str, RewardFn],
    cond: Condition,
    run: Run,
    cfg: GrpoConfig,
) -> Report:
    """One rollout, one replay with its backward pass, no update: the network's gradients are cleared, its weights kept.

    Problems are: nothing trainable; a ratio off by more than 1e-6 on a CPU, whose arithmetic repeats, or by more than a
    tenth of the clip elsewhere, where kernels vary with the batch; a gradient that is 0 or not finite.
    """
    trainable = [p for p in network.parameters() if p.requires_grad]
    num_trainable = sum(p.numel() for p in trainable)
    if num_trainable == 0:
        return Report(0, problems=["nothing is trainable: no parameter requires a gradient (LoRA target names?)"])

    clock = Clock()
    with torch.no_grad():
        with clock("rollout"):
            rollout = policy.rollout(run.mine(cond), run.num_members, run.streams(cfg.seed, 0))
        with clock("geometry"):
            scene = geometry(rollout.z0)
        with clock("reward"):
            reward = run.gather(score(rewards, scene, rollout))
    advantage = advantage_of(reward, cfg)
    with clock("update"):
        replayed = replay_backward(policy, rollout, run.local(advantage), run, cfg)
    grad_norm = float(torch.stack([_norm(p.grad) for p in trainable]).norm())
    network.zero_grad()

    error = (run.gather({"log_ratio": replayed.log_ratio})["log_ratio"].exp() - 1).abs()
    zero_std = {name: float(indifferent(r).double().mean()) for name, r in reward.items()}
    tolerance = 1e-6 if error.device.type == "cpu" else cfg.clip / 10
    problems = []
    if not (error <= tolerance).all():
        problems.append(f"the ratio is off by {float(error.max()):.1e} before any update (at most {tolerance:.0e})")
    if not 0 < grad_norm < float("inf"):
        problems.append(f"the gradient's norm is {grad_norm:g}: nothing would be learnt")
    return Report(
        num_trainable=num_trainable,
        ratio_error=error.amax((0, 1)).tolist(),
        kl=float(run.gather({"kl": replayed.kl})["kl"].mean()),
        grad_norm=grad_norm,
        zero_std=zero_std,
        clock=clock,
        problems=problems,
    )


def _norm(gradient: Tensor | None) -> Tensor:
    return torch.zeros(()) if gradient is None else gradient.detach().norm().cpu()
