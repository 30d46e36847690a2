"""Rectified flow: the straight path from data to noise, and every step that walks it back.

Legend
    t in [0, 1]: **t = 1 is noise, t = 0 is data**. Sampling walks down, t_next < t, so dt = t_next - t < 0.
    z_t = (1 - t) z0 + t eps,  v = dz_t/dt = eps - z0,  hence  z0 = z_t - t v  and  eps = z_t + (1 - t) v.
    score = grad log p_t(z_t) = -eps / t, with eps the network's prediction.
Times are floats or tensors that broadcast against z_t. All maths is fp32, or float64 where the latents are: in bf16 the
probability ratio drifts from 1 before the first update.

Stochastic steps return the Gaussian of z_{t_next} given z_t. A marginal is kept for *any* sigma_t (Fokker-Planck):
    dz = [v - sigma_t^2 / 2 score] dt + sigma_t dw = [v + sigma_t^2 / (2t) eps] dt + sigma_t dw,
so the steps differ in sigma_t alone: Flow-SDE a sqrt(t / (1 - t)), Dance-SDE a constant. Flow-CPS is DDIM's step.

The two ends, decided here and nowhere else
    t = 1: Flow-SDE's sigma_t is infinite. There 1 - t becomes t - t_next: the first step has std a sqrt(t) on any grid
        (at t = 1 this is Flow-GRPO's guard). "There" is t >= 0.999: schedulers start at 1, at 1 - 1e-6 or at 999/1000,
        and a guard that waits for t == 1 lets the last two through, with noise larger than the latents.
    t = 0: no stochastic step ends there. The last step is always an ODE step.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Latent = Float[Tensor, "..."]
Time = float | Float[Tensor, "..."]
Velocity = Callable[[Latent, Time], Latent]
"""(z_t, t) -> v, the condition already bound. Samplers pass t as the grid holds it: a float64 scalar on the CPU."""

NOISE_END = 0.999


class Gaussian(NamedTuple):
    """Independent normals: the law of z_{t_next} given z_t."""

    mean: Latent
    std: Latent
    """Broadcasts to `mean`; a step's std is the same in every dimension."""


def interpolate(z0: Latent, eps: Latent, t: Time) -> Latent:
    """z_t = (1 - t) z0 + t eps: the forward process."""
    return (1 - t) * _exact(z0) + t * _exact(eps)


def predict_z0(z_t: Latent, v: Latent, t: Time) -> Latent:
    """The clean latent that v points at: z0 = z_t - t v."""
    return _exact(z_t) - t * _exact(v)


def predict_eps(z_t: Latent, v: Latent, t: Time) -> Latent:
    """The noise that v comes from: eps = z_t + (1 - t) v."""
    return _exact(z_t) + (1 - t) * _exact(v)


def euler_step(z_t: Latent, v: Latent, t: Time, t_next: Time) -> Latent:
    """One explicit Euler step of dz = v dt; global error O(dt)."""
    return _exact(z_t) + (t_next - t) * _exact(v)


def heun_step(velocity: Velocity, z_t: Latent, t: Time, t_next: Time) -> Latent:
    """One Heun (trapezoid) step of dz = v dt, two evaluations; global error O(dt^2)."""
    v = velocity(z_t, t)
    v_next = velocity(euler_step(z_t, v, t, t_next), t_next)
    return euler_step(z_t, (_exact(v) + _exact(v_next)) / 2, t, t_next)


def flow_sde_step(z_t: Latent, v: Latent, t: Time, t_next: Time, noise: float) -> Gaussian:
    """The paper's step (VGGRPO, arXiv 2603.26599; from Flow-GRPO): sigma_t = a sqrt(t / (1 - t)), `noise` is a (0.7).

    Raises:
        ValueError: noise <= 0, or not 1 >= t > t_next > 0.
    """
    t, t_next = _check_times(t, t_next, noise)
    distance = torch.where(t >= NOISE_END, t - t_next, 1 - t)
    return _sde_step(z_t, v, t, t_next, sigma=noise * (t / distance).sqrt())


def dance_sde_step(z_t: Latent, v: Latent, t: Time, t_next: Time, noise: float) -> Gaussian:
    """DanceGRPO's step (arXiv 2505.07818): sigma_t = `noise` > 0 (0.3), constant. The drift holds noise^2 / (2t).

    Raises:
        ValueError: noise <= 0, or not 1 >= t > t_next > 0.
    """
    t, t_next = _check_times(t, t_next, noise)
    return _sde_step(z_t, v, t, t_next, sigma=torch.full_like(t, noise))


def flow_cps_step(z_t: Latent, v: Latent, t: Time, t_next: Time, noise: float) -> Gaussian:
    """Flow-CPS's step (arXiv 2509.05952): keep z0, turn a part of the noise into fresh noise; `noise` in (0, 1] (0.7).

    mean = (1 - t_next) z0 + t_next cos(noise pi/2) eps and std = t_next sin(noise pi/2): the noise level of z_{t_next}
    is right by construction, even in one big step. But std holds no dt, so the more steps are stochastic the more the
    samples shrink towards the mean: use it in a short window. Its Gaussian is exact here; the authors drop 1/(2 std^2)
    from the log-probability, so their clip range does not transfer.

    Raises:
        ValueError: noise outside (0, 1], or not 1 >= t > t_next > 0.
    """
    t, t_next = _check_times(t, t_next, noise)
    if noise > 1:
        raise ValueError(f"flow_cps noise is a fraction of a quarter turn, in (0, 1]; got {noise:g}")
    angle = noise * math.pi / 2
    kept = t_next * math.cos(angle) * predict_eps(z_t, v, t)
    return Gaussian((1 - t_next) * predict_z0(z_t, v, t) + kept, t_next * math.sin(angle))


SdeStep = Callable[[Latent, Latent, Time, Time, float], Gaussian]
SDE_STEPS: dict[str, SdeStep] = {"flow_sde": flow_sde_step, "dance_sde": dance_sde_step, "flow_cps": flow_cps_step}


def sde_step(name: str) -> SdeStep:
    """The stochastic step of that name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in SDE_STEPS:
        raise ValueError(f"unknown sde {name!r}: choose one of {', '.join(SDE_STEPS)}")
    return SDE_STEPS[name]


def log_prob(z_next: Float[Tensor, "n *latent"], step: Gaussian) -> Float[Tensor, " n"]:
    """log N(z_next; mean, std) of n samples, the **mean** over the latent axes.

    The mean, not the sum, is Flow-GRPO's convention: a clip range of 1e-3 has its meaning only with it. `z_next` is a
    constant of the policy gradient: pass a stored, detached state.
    """
    mean, std = step
    density = -((_exact(z_next) - mean) ** 2) / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2
    return density.flatten(1).mean(-1)


def kl_divergence(step: Gaussian, reference: Gaussian) -> Float[Tensor, " n"]:
    """KL(step || reference), exact, of two steps [n *latent] with one std: the mean over the latent axes.

    |mean - mean_ref|^2 / (2 std^2) with std^2 = sigma_t^2 |dt|: this is the KL of the step *with* dt (Flow-GRPO's Wan
    script, beta 0.004). Their SD3 script divides by 2 sigma_t^2, without dt: a beta does not transfer between the two.

    Raises:
        ValueError: the stds differ, so that the two are not steps of one SDE at one time.
    """
    if not torch.equal(step.std, reference.std):
        raise ValueError(
            "kl_divergence compares two means under one std: take both steps at the same t, t_next and noise"
        )
    return ((step.mean - reference.mean) ** 2 / (2 * step.std**2)).flatten(1).mean(-1)


def _sde_step(z_t: Latent, v: Latent, t: Tensor, t_next: Tensor, sigma: Tensor) -> Gaussian:
    """Euler-Maruyama for dz = [v + sigma^2 / (2t) eps] dt + sigma dw."""
    drift = _exact(v) + sigma**2 / (2 * t) * predict_eps(z_t, v, t)
    return Gaussian(euler_step(z_t, drift, t, t_next), sigma * (t - t_next).sqrt())


def _check_times(t: Time, t_next: Time, noise: float) -> tuple[Tensor, Tensor]:
    # A float becomes a float64 scalar on the CPU: exact, and it neither promotes the latents nor waits for a device.
    t, t_next = (torch.tensor(x, dtype=torch.float64) if isinstance(x, float) else x for x in (t, t_next))
    if not noise > 0:
        raise ValueError(f"a stochastic step needs noise > 0, got {noise:g}; for a deterministic step use euler_step")
    if not bool(((t <= 1) & (t > t_next) & (t_next > 0)).all()):
        raise ValueError(
            f"a stochastic step needs 1 >= t > t_next > 0, got t = {t}, t_next = {t_next}; the last step is an ODE step"
        )
    return t, t_next


def _exact(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))
