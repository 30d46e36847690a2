"""Guidance: a velocity in, a velocity out. It changes where a sample goes without changing the network."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from vggrpo.flow import Latent, Time, Velocity, predict_z0


def classifier_free(conditional: Velocity, unconditional: Velocity, scale: float) -> Velocity:
    """v = v_u + scale (v_c - v_u) (arXiv 2207.12598): 0 is unconditional, 1 conditional, more exaggerates the prompt.

    `unconditional` is the network under the empty prompt, or under a negative prompt to move away from. At 0 and 1 one
    network alone runs, and its result is exact to the bit. (This does not sample p(z|c)^scale p(z)^(1 - scale): the
    marginals of that density do not have this velocity.)
    """
    if scale == 0:
        return unconditional
    if scale == 1:
        return conditional

    def velocity(z_t: Latent, t: Time) -> Latent:
        v = unconditional(z_t, t)
        return v + scale * (conditional(z_t, t) - v)

    return velocity


def guided(
    velocity: Velocity,
    reward: Callable[[Latent], Float[Tensor, "*batch"]],
    scale: float,
    grid: Float[Tensor, " times"],
    every: int = 1,
    through_network: bool = True,
) -> Velocity:
    """Latent reward guidance (VGGRPO, arXiv 2603.26599): v - scale t/(1 - t) grad_{z_t} r(z0), where z0 = z_t - t v.

    As v = -(z_t + t score) / (1 - t), this adds scale grad r to the score. With scale 1 and a reward that is linear in
    Gaussian latents, the samples follow p(z0) exp(r(z0)) exactly. `reward` maps clean latents to a number per sample,
    [*batch *latent] -> [*batch], through the latent geometry model; where it is not finite (the sample cannot be
    scored), or its gradient is not, that sample goes unguided at that step.

    Guidance acts at grid[every], grid[2 every], ... (the paper: every 20 of 50 steps) and leaves all other times alone.
    So it never acts at the first step, where the weight is infinite and z0 is still the mean of all data.

    The paper prints r(z_t) and does not say whether the gradient passes through the network. A latent geometry model
    reads clean latents, hence z0. `through_network` False treats v as a constant: no backward pass through the network,
    but the pull then grows as t/(1 - t) near the noise, so guide late.

    Raises:
        ValueError: every < 1; at the first guided step, a reward that carries no gradient.
    """
    if every < 1:
        raise ValueError(f"guidance acts at every n-th step, n >= 1; got every = {every}")
    times = {float(t) for t in grid[every:-1:every]}

    def guided_velocity(z_t: Latent, t: Time) -> Latent:
        if float(t) not in times:
            return velocity(z_t, t)
        with torch.enable_grad():
            z = z_t.detach().requires_grad_()
            v = velocity(z, t) if through_network else velocity(z.detach(), t)
            r = reward(predict_z0(z, v, t))
            if not r.requires_grad:
                raise ValueError(
                    "guidance needs the reward's gradient: drop no_grad and detach from reward and geometry"
                )
            (slope,) = torch.autograd.grad(torch.where(r.isfinite(), r, 0).sum(), z)
        usable = slope.isfinite().flatten(r.ndim).all(-1)
        slope = slope.where(usable.view(*r.shape, *[1] * (z_t.ndim - r.ndim)), 0)
        return v.detach() - scale * t / (1 - t) * slope

    return guided_velocity
