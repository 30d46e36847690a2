"""A policy out of any velocity network: denoising steps are its decisions.

    rollout  ODE steps to the window, SDE steps in it, ODE steps after it; keeps the states at the window's steps
    replay   the same Gaussian steps again from the stored states, now with a graph, and their KL to the reference

Replay repeats the rollout's dtype, guidance, micro-batches and stored states, so that the ratio is 1 before any update.
Latents in flight are [n *latent], n = B K videos. Every video has its own random stream, so that it does not depend on
which others share its rank or micro-batch.
"""

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vggrpo import sampler
from vggrpo.config import SamplingConfig
from vggrpo.flow import Gaussian, Latent, Time, Velocity, kl_divergence, log_prob, sde_step
from vggrpo.guidance import classifier_free
from vggrpo.memory import Agree, OutOfMemory, agreed, halved
from vggrpo.types import Condition, Replay, Rollout, Shift, Streams

Told = Tensor | tuple[Tensor, ...]
"""What a network reads of n conditions: [n ...], or several of that; prompt embeddings and first frames, for two."""
Network = Callable[[Tensor, Tensor, Any], Tensor]
"""(z_t [n *latent], t [n] in [0, 1], told [n ...]) -> v [n *latent]."""
Encoder = Callable[[Condition], Told]
"""B conditions -> what the network reads of them."""
TextEncoder = Callable[[Condition], Tensor]
"""B conditions -> embeddings of their prompts, [B tokens channels]."""
Complete = Callable[[Told, Latent], Latent]
"""(told [n ...], z0 [n *latent] of the policy) -> z0 [n *whole], with what was given and not sampled."""


@dataclass(frozen=True)
class FlowTrajectory:
    """A rollout's notes on n = B K videos. Step `steps[i]` goes from states[i] to states[i + 1]: N = S + 1 states."""

    steps: range
    states: Float[Tensor, "N n *latent"]
    means: Float[Tensor, "S n *latent"] | None
    """Of the Gaussian steps, fp32; only for RatioNorm."""
    cond: Told
    negative: Told
    sampled: Float[Tensor, "n *latent"]
    """The samples, without what was given and not sampled."""


class FlowPolicy:
    """Samples by denoising with `network`, and is trained at the steps of a window."""

    def __init__(
        self,
        network: Network,
        encode: Encoder,
        latent_shape: Sequence[int],
        cfg: SamplingConfig,
        reference: Network | None = None,
        keep_means: bool = False,
        agree: Agree = bool,
        complete: Complete | None = None,
    ) -> None:
        """A policy over `network`, which stays the caller's: prepare it for the launch first.

        Args:
            network: the velocity that is trained, called as a `Network`.
            encode: turns conditions into what `network` reads; the negative prompt passes through it too.
            latent_shape: of what is sampled of one video, such as (C, L, h, w).
            cfg: grid, window, noise, guidance, micro-batches.
            reference: what KL is measured against, `frozen_copy(network)` or `lora_off(network)`. None: KL is 0.
            keep_means: remember each step's mean, one more fp32 latent per step; RatioNorm needs it.
            agree: asked after every micro-batch of a rollout (`Run.agree`).
            complete: puts what was given, such as a first frame, to what was sampled. States, log-probabilities and
                KL have the sampled part alone.
        """
        self.network, self.reference = network, reference
        self.encode, self.latent_shape = encode, tuple(latent_shape)
        self.cfg, self.keep_means, self.agree = cfg, keep_means, agree
        self.complete: Complete = complete or (lambda told, z0: z0)
        modules = network.modules() if isinstance(network, nn.Module) else ()  # a reference is a function
        by_block = any(getattr(module, "gradient_checkpointing", False) for module in modules)
        self._recompute = cfg.gradient_checkpointing and not by_block  # one that recomputes its blocks does so itself
        self.micro_batch = cfg.micro_batch
        self.grid = sampler.time_grid(cfg.num_steps, cfg.shift)
        self.sde = sde_step(cfg.sde)

    @torch.no_grad()
    def rollout(self, cond: Condition, group_size: int, generator: Streams) -> Rollout:
        """Draw K = `group_size` samples for each of B conditions. Members that share their noise part at the window.

        Out of memory, it begins again with half the micro-batch, and keeps to it: the result is that of a policy which
        had the smaller one from the start.

        Raises:
            ValueError: one video does not fit in memory.
        """
        while True:
            try:
                return self._rollout(cond, group_size, generator)
            except OutOfMemory:
                self.micro_batch = halved(self.micro_batch, "sampling.micro_batch")
                print(f"out of memory in a rollout: micro-batches of {self.micro_batch} now", file=sys.stderr)

    def _rollout(self, cond: Condition, group_size: int, generator: Streams) -> Rollout:
        B, K, cfg = len(cond), group_size, self.cfg
        steps = cfg.window.steps(generator.iteration, cfg.num_steps)
        streams = [generator.member(b, k) for b in range(B) for k in range(K)]
        c, negative = self._told(cond)
        to_videos = torch.arange(B, device=_device(c)).repeat_interleave(K)

        if cfg.share_noise:  # one sample per group until the window begins
            z = self._to_window([generator.group(b) for b in range(B)], c, negative, steps)[to_videos]
        else:
            z = self._to_window(streams, rows(c, to_videos), rows(negative, to_videos), steps)
        c, negative = rows(c, to_videos), rows(negative, to_videos)

        means: list[Tensor] = []

        def walk(part: slice) -> sampler.Trajectory:
            return sampler.rollout(
                self._velocity(self.network, rows(c, part), rows(negative, part)),
                z[part],
                self.grid[steps.start :],
                range(len(steps)),
                self._recorded(means) if self.keep_means else self.sde,
                cfg.noise,
                streams[part],
                dtype=getattr(torch, cfg.storage),
            )

        walks = [agreed(partial(walk, part), self.agree) for part in self.chunks(B * K)]
        trajectory = FlowTrajectory(
            steps=steps,
            states=torch.cat([walk.states for walk in walks], dim=1),
            means=_by_step(means, len(steps)) if self.keep_means else None,
            cond=c,
            negative=negative,
            sampled=torch.cat([walk.z0 for walk in walks]),
        )
        z0 = self.complete(c, trajectory.sampled).unflatten(0, (B, K))
        return Rollout(cond, z0, torch.cat([walk.log_prob for walk in walks]).view(B, K, len(steps)), trajectory)

    @torch.no_grad()
    def sample(self, cond: Condition, generator: Streams) -> Float[Tensor, "B *latent"]:
        """One video for each of B conditions, by the ODE alone."""
        c, negative = self._told(cond)
        whole = range(self.cfg.num_steps, self.cfg.num_steps)
        streams = [generator.member(b, 0) for b in range(len(cond))]
        return self.complete(c, self._to_window(streams, c, negative, whole))

    def _told(self, cond: Condition) -> tuple[Told, Told]:
        """What the network reads of these conditions, and of them under the negative prompt."""
        negative = dataclasses.replace(cond, prompt=[self.cfg.negative_prompt] * len(cond))
        return self.encode(cond), self.encode(negative)

    def replay(self, rollout: Rollout) -> Iterator[Replay]:
        """Every trained step, `micro_batch` videos at a time, in the rollout's own chunks."""
        notes: FlowTrajectory = rollout.trajectory
        B, K, S = rollout.log_prob.shape
        for i in range(S):
            for part in self.chunks(B * K):
                step = self._step(self.network, notes, i, part, training=True)
                if self.reference is None:
                    kl = torch.zeros_like(step.mean).flatten(1).mean(-1)
                else:
                    with torch.no_grad():
                        anchor = self._step(self.reference, notes, i, part)
                    kl = kl_divergence(step, anchor)
                video = torch.arange(B * K, device=kl.device)[part]
                yield Replay(
                    at=(video // K, video % K, torch.full_like(video, i)),
                    log_prob=log_prob(notes.states[i + 1, part], step),
                    kl=kl,
                    shift=self._shift(step, notes, i, part),
                )

    def _step(self, network: Network, notes: FlowTrajectory, i: int, part: slice, training: bool = False) -> Gaussian:
        t, t_next = self.grid[notes.steps[i]], self.grid[notes.steps[i] + 1]
        z_t = notes.states[i, part].float()
        if training and self._recompute:
            network = _checkpointed(network)
        v = self._velocity(network, rows(notes.cond, part), rows(notes.negative, part))(z_t, t)
        return self.sde(z_t, v, t, t_next, self.cfg.noise)

    def _velocity(self, network: Network, cond: Told, negative: Told) -> Velocity:
        """Guided; both branches of guidance are one batch."""
        scale = self.cfg.guidance_scale
        c = negative if scale == 0 else cond if scale == 1 else _joined(negative, cond)

        def evaluated(z_t: Latent, t: Time) -> Latent:
            return network(z_t, torch.full((len(z_t),), float(t), device=z_t.device), c)

        def guided(z_t: Latent, t: Time) -> Latent:
            without, under = evaluated(torch.cat([z_t, z_t]), t).chunk(2)
            return classifier_free(lambda *_: under, lambda *_: without, scale)(z_t, t)

        return evaluated if scale in (0, 1) else guided

    def _to_window(self, streams: Sequence[torch.Generator], c: Told, negative: Told, steps: range) -> Tensor:
        """Noise from `streams`, walked along the ODE to where the window begins."""
        z = sampler.normal((len(streams), *self.latent_shape), streams).to(_device(c))
        grid = self.grid[: steps.start + 1]

        def walk(part: slice) -> Tensor:
            return sampler.ode_sample(self._velocity(self.network, rows(c, part), rows(negative, part)), z[part], grid)

        return torch.cat([agreed(partial(walk, part), self.agree) for part in self.chunks(len(z))])

    def chunks(self, num: int) -> list[slice]:
        """`num` videos in micro-batches."""
        size = self.micro_batch
        return [slice(i, min(i + size, num)) for i in range(0, num, size)]

    def _recorded(self, means: list[Tensor]) -> Callable[[Latent, Latent, Time, Time, float], Gaussian]:
        def step(z_t: Latent, v: Latent, t: Time, t_next: Time, noise: float) -> Gaussian:
            gaussian = self.sde(z_t, v, t, t_next, noise)
            means.append(gaussian.mean)
            return gaussian

        return step

    def _shift(self, step: Gaussian, notes: FlowTrajectory, i: int, part: slice) -> Shift | None:
        if notes.means is None:
            return None
        drift = kl_divergence(step, Gaussian(notes.means[i, part], step.std))
        dt = self.grid[notes.steps[i]] - self.grid[notes.steps[i] + 1]
        return Shift(drift, torch.full_like(drift, float(step.std)), torch.full_like(drift, float(dt)))


def frozen_copy(network: nn.Module) -> nn.Module:
    """The reference for small networks: this network as it is now. Take it before the launch wraps the network."""
    return copy.deepcopy(network).requires_grad_(False).eval()


def lora_off(network: nn.Module) -> Network:
    """The reference that costs no memory: the same network with its LoRA adapters (peft) switched off for the call.

    Raises:
        ValueError: the network has no adapters, so that it would be its own reference.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise ValueError("lora_off: the network has no LoRA layers; use frozen_copy, or add the adapters first")

    def reference(z_t: Tensor, t: Tensor, cond: Told) -> Tensor:
        for layer in layers:
            layer.enable_adapters(False)
        try:
            v: Tensor = network(z_t, t, cond)
        finally:
            for layer in layers:
                layer.enable_adapters(True)
        return v

    return reference


def rows(told: Told, which: slice | Tensor) -> Told:
    """What is told of some of the videos."""
    return told[which] if isinstance(told, Tensor) else tuple(part[which] for part in told)


def _joined(a: Told, b: Told) -> Told:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.cat([a, b])  # type: ignore[list-item]
    return tuple(torch.cat(pair) for pair in zip(a, b, strict=True))


def _device(told: Told) -> torch.device:
    return told.device if isinstance(told, Tensor) else told[0].device


def _checkpointed(network: Network) -> Network:
    def recomputed(z_t: Tensor, t: Tensor, cond: Told) -> Tensor:
        v: Tensor = checkpoint(network, z_t, t, cond, use_reentrant=False)
        return v

    return recomputed


def _by_step(means: list[Tensor], num_steps: int) -> Tensor:
    """Recorded chunk by chunk, step by step within each -> [S n *latent]."""
    return torch.stack([torch.cat(means[i::num_steps]) for i in range(num_steps)])
