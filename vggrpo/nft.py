"""DiffusionNFT (arXiv 2509.16117): reinforcement on the forward process. No trajectory, no log-probability, any solver.

Where Algorithm 1 asks how likely each denoising step was, this asks nothing about the sampler: finished samples are
noised again, and the velocity that leads to good ones is pulled towards, the one that leads to bad ones pushed from.

    v_old   the velocity that drew the samples, a slow average of v      r   in [0, 1], how good the sample was
    v+ = (1 - beta) v_old + beta v        v- = (1 + beta) v_old - beta v       (v- mirrors v+ at v_old)
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vggrpo import sampler
from vggrpo.config import GrpoConfig, NftConfig
from vggrpo.flow import interpolate, predict_z0
from vggrpo.policy.flow_policy import FlowPolicy, rows
from vggrpo.runtime import Run
from vggrpo.trainer import GeometryFn, RewardFn, advantage_of, score
from vggrpo.types import Condition, Rollout, Streams

LIMIT = 5.0
"""An advantage of 5 or more is as good as a sample can be; the loss is scaled by it (the authors' constant)."""


def optimality(advantage: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """An advantage as a probability of being good: r = 1/2 + clamp(A, -5, 5) / 10."""
    return 0.5 + advantage.clamp(-LIMIT, LIMIT) / (2 * LIMIT)


def nft_loss(
    v: Float[Tensor, "n *latent"],
    v_old: Float[Tensor, "n *latent"],
    z0: Float[Tensor, "n *latent"],
    z_t: Float[Tensor, "n *latent"],
    t: Float[Tensor, " n"],
    r: Float[Tensor, " n"],
    beta: float,
) -> Float[Tensor, " n"]:
    """r / beta |z0+ - z0|^2 / w+ + (1 - r) / beta |z0- - z0|^2 / w-, means over latent dimensions.

    z0+- = z_t - t v+- is what each velocity denoises to, and w+- = mean |z0+- - z0|, held constant and at least 1e-5,
    evens out the times. Only `v` carries a gradient; at v = v_old and r = 1/2 it is 0.
    """
    t = t.view(-1, *[1] * (z_t.ndim - 1))
    v_old = v_old.detach()
    positive = _error(predict_z0(z_t, (1 - beta) * v_old + beta * v, t), z0)
    negative = _error(predict_z0(z_t, (1 + beta) * v_old - beta * v, t), z0)
    return (r * positive + (1 - r) * negative) / beta


def train_nft(
    policy: FlowPolicy,
    network: nn.Module,
    geometry: GeometryFn,
    rewards: Mapping[str, RewardFn],
    conditions: Iterable[Condition],
    optimizer: torch.optim.Optimizer,
    run: Run,
    cfg: GrpoConfig,
    nft: NftConfig,
) -> Iterator[dict[str, float]]:
    """Algorithm 1 with its second half replaced: `network` learns, while `policy` samples with a slow average of it.

    `policy.network` is that average (begin with `frozen_copy(network)`), `policy.reference` what v is anchored to. Of
    `cfg`, the ratio and the KL mean nothing here.

    Raises:
        ValueError, FloatingPointError: as `trainer.train`.
    """
    for update, cond in enumerate(conditions):
        generator = run.streams(cfg.seed, update)
        with torch.no_grad():
            rollout = policy.rollout(run.mine(cond), run.num_members, generator)
            reward = run.gather(score(rewards, geometry(rollout.z0), rollout))
        advantage = advantage_of(reward, cfg)
        loss = nft_backward(policy, network, rollout, run.local(advantage), generator, run, nft)
        grad_norm = run.clip_and_step(optimizer, cfg.max_grad_norm)
        follow(
            cast(nn.Module, policy.network),
            run.accelerator.unwrap_model(network),
            min(nft.slowing * update, nft.slowest),
        )
        means = {f"reward/{name}/mean": float(r[r.isfinite()].mean()) for name, r in reward.items()}
        yield {"update": update, "loss": loss, "grad_norm": grad_norm} | means


def nft_backward(
    policy: FlowPolicy,
    network: nn.Module,
    rollout: Rollout,
    advantage: Float[Tensor, "B K"],
    generator: Streams,
    run: Run,
    nft: NftConfig,
) -> float:
    """Add the gradient of mean(limit nft_loss + anchor |v - v_ref|^2) over this rank's samples; returns the loss."""
    B, K = advantage.shape
    z0, r = rollout.trajectory.sampled, optimality(advantage).flatten()  # a first frame that is given stays out of it
    streams = [generator.noising(b, k) for b in range(B) for k in range(K)]
    total = 0.0
    for part in policy.chunks(B * K):
        c = rows(rollout.trajectory.cond, part)
        for _ in range(nft.num_times):
            t = torch.cat([torch.rand(1, generator=stream) for stream in streams[part]]).to(z0)
            eps = sampler.normal(z0[part].shape, streams[part]).to(z0)
            z_t = interpolate(z0[part], eps, t.view(-1, *[1] * (z0.ndim - 1)))
            v = network(z_t, t, c)
            with torch.no_grad():
                v_old = policy.network(z_t, t, c)
                v_ref = v_old if policy.reference is None else policy.reference(z_t, t, c)
            anchor = (v - v_ref).square().flatten(1).mean(-1)
            each = LIMIT * nft_loss(v, v_old, z0[part], z_t, t, r[part], nft.beta) + nft.anchor * anchor
            loss = each.sum() / (B * K * nft.num_times)
            run.backward(loss)
            total += float(loss.detach())
    return total


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, kept: float) -> None:
    """average <- kept average + (1 - kept) network, parameter by parameter."""
    for old, new in zip(average.parameters(), network.parameters(), strict=True):
        old.lerp_(new, 1 - kept)


def _error(predicted: Tensor, z0: Tensor) -> Float[Tensor, " n"]:
    # float64, as the authors: w is small near the data, where the squares are smaller still.
    gap = (predicted - z0).flatten(1).double()
    weight = gap.detach().abs().mean(-1).clamp(min=1e-5)
    return (gap.square().mean(-1) / weight).to(z0.dtype)
