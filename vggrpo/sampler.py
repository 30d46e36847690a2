"""From noise to data: time grids, ODE sampling, and rollouts that are stochastic inside a window of steps.

Latents are [n *latent]: all videos of all groups in one axis. A group that shares its initial noise is one sample until
its window begins: walk that one there, `ode_sample(velocity, z, grid[: steps.start + 1])`, repeat it, and roll out on
`grid[steps.start :]`.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vggrpo.flow import Gaussian, Latent, SdeStep, Time, Velocity, euler_step, heun_step, log_prob
from vggrpo.guidance import classifier_free

Randomness = torch.Generator | Sequence[torch.Generator]
"""One generator, or one per sample: then a sample's noise does not depend on which rank or batch it is in."""


def time_grid(num_steps: int, shift: float = 1.0) -> Float[Tensor, " {num_steps}+1"]:
    """Times t_0 > ... > t_S = 0 of S = `num_steps` steps, float64 on the CPU.

    Uniform in u from 1 to 0, then t = shift u / (1 + (shift - 1) u): Wan spends more steps near the noise (shift 3 at
    480p, 5 at 720p). A diffusers scheduler's own `sigmas` will do as a grid too: UniPC's are these, with u from
    1 - 1e-6 to 0.001 and then 0.

    Raises:
        ValueError: num_steps < 1 or shift <= 0.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if not shift > 0:
        raise ValueError(f"shift must be > 0 (1 is uniform, Wan uses 3 or 5), got {shift:g}")
    u = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return shift * u / (1 + (shift - 1) * u)


@dataclass(frozen=True)
class Window:
    """Which steps are stochastic and trained: a range that the whole batch, on every rank, shares.

    A window of one's own per prompt or per rank adds its variance to the rewards that a group compares.
    """

    size: int = 2
    """Number of stochastic, trained steps."""
    kind: Literal["fixed", "random", "progressive"] = "fixed"
    """Stay at `start`; a random place at every iteration; or walk down the grid (MixGRPO, arXiv 2507.21802)."""
    start: int = 0
    """First step that may be trained."""
    stop: int | None = None
    """One past the last step that may be trained; by default all but the last step, which is always an ODE step."""
    advance_every: int = 25
    """Iterations that a progressive window stays before it moves on by `stride`; past the end it returns to `start`."""
    stride: int = 1
    """Steps that a progressive window moves by."""
    seed: int = 0
    """Of the random window: its place depends on seed and iteration alone, alike on every rank and after a resume."""

    def check(self, num_steps: int) -> None:
        """Refuse a window that does not fit a grid of `num_steps` steps.

        Raises:
            ValueError: naming the field, the grid and the remedy.
        """
        stop = self._stop(num_steps)
        if self.kind not in ("fixed", "random", "progressive"):
            raise ValueError(f"window.kind must be fixed, random or progressive, got {self.kind!r}")
        if min(self.size, self.advance_every, self.stride) < 1:
            sizes = f"{self.size}, {self.advance_every} and {self.stride}"
            raise ValueError(f"window.size, advance_every and stride must be at least 1, got {sizes}")
        if stop > num_steps - 1:
            raise ValueError(
                f"window.stop = {stop} takes in the last of {num_steps} steps, an ODE step: at most {num_steps - 1}"
            )
        if self.start < 0 or self.start + self.size > stop:
            raise ValueError(
                f"a window of {self.size} from step {self.start} does not fit before step {stop} of {num_steps}: "
                "lower window.size or window.start, or sample with more steps"
            )

    def steps(self, iteration: int, num_steps: int) -> range:
        """The steps s (from t_s to t_{s+1}) to train at this iteration.

        Raises:
            ValueError: the window does not fit (see `check`).
        """
        self.check(num_steps)
        last = self._stop(num_steps) - self.size
        if self.kind == "random":
            start = int(np.random.default_rng([self.seed, iteration]).integers(self.start, last + 1))
        elif self.kind == "progressive":
            places = range(self.start, last + 1, self.stride)
            start = places[iteration // self.advance_every % len(places)]
        else:
            start = self.start
        return range(start, start + self.size)

    def _stop(self, num_steps: int) -> int:
        return num_steps - 1 if self.stop is None else self.stop


@dataclass(frozen=True)
class Trajectory:
    """What a rollout keeps: the sample, and the states at the trained steps alone."""

    z0: Float[Tensor, "n *latent"]
    """The samples, fp32 (float64 if the noise was)."""
    states: Float[Tensor, "states n *latent"]
    """In the storage dtype; trained step i goes from states[i] (its z_t) to states[i+1] (its z_next)."""
    log_prob: Float[Tensor, "n steps"]
    """Of states[i+1] as stored: a replay that reads `states` back finds the same number."""
    steps: range
    """The trained steps: grid[steps[i]] is the time of states[i]."""


def ode_sample(velocity: Velocity, z: Latent, grid: Float[Tensor, " times"], solver: str = "euler") -> Latent:
    """Walk z from grid[0] to grid[-1] along dz = v dt. Any part of a grid will do; one time alone returns z.

    Raises:
        ValueError: an unknown solver.
    """
    if solver not in ("euler", "heun"):
        raise ValueError(f"unknown solver {solver!r}: choose euler or heun")
    for t, t_next in itertools.pairwise(grid):
        z = heun_step(velocity, z, t, t_next) if solver == "heun" else euler_step(z, velocity(z, t), t, t_next)
    return z


@torch.no_grad()
def draw(
    network: Callable[[Tensor, Tensor, Tensor], Tensor],
    z: Float[Tensor, "n *latent"],
    text: Float[Tensor, "m tokens channels"],
    negative: Float[Tensor, "o tokens channels"],
    grid: Float[Tensor, " times"],
    guidance_scale: float,
    change: Callable[[Velocity], Velocity] | None = None,
) -> Float[Tensor, "n *latent"]:
    """Samples of a network (z_t [n *latent], t [n], text [n ...]) -> v from the noise z: Euler steps of the guided ODE.

    `text` and `negative`, what the samples move towards and away from, are one for all samples or one for each.
    `change` makes another velocity of the guided one: guidance by reward, for one.
    """

    def under(told: Tensor) -> Velocity:
        def velocity(z_t: Latent, t: Time) -> Latent:
            return network(z_t, torch.full((len(z_t),), float(t), device=z_t.device), told.expand(len(z_t), -1, -1))

        return velocity

    velocity = classifier_free(under(text), under(negative), guidance_scale)
    return ode_sample(velocity if change is None else change(velocity), z, grid)


@torch.no_grad()
def rollout(
    velocity: Velocity,
    z: Float[Tensor, "n *latent"],
    grid: Float[Tensor, " times"],
    steps: range,
    sde: SdeStep,
    noise: float,
    generator: Randomness,
    dtype: torch.dtype = torch.float32,
) -> Trajectory:
    """Walk the noise z from grid[0] to data: Euler steps of the ODE, but for the window, whose steps are stochastic.

    States in the window are rounded to `dtype` before they are used, by velocity and log-probability alike.

    Raises:
        ValueError: a window outside the grid or at its last step, noise <= 0, a grid that does not end at 0, or a
            number of generators that is not the number of samples.
    """
    num_steps = len(grid) - 1
    if len(steps) == 0 or steps.step != 1 or steps.start < 0 or steps.stop > num_steps - 1:
        raise ValueError(
            f"trained steps must be a range in 0..{num_steps - 2}, got {steps}: the last of {num_steps} is an ODE step"
        )
    if not noise > 0:
        raise ValueError(f"trained steps need noise > 0, got {noise:g}")
    if grid[-1] != 0:
        raise ValueError(f"the grid must end at t = 0 (data), got {float(grid[-1]):g}")
    if not isinstance(generator, torch.Generator) and len(generator) != len(z):
        raise ValueError(f"give one generator, or one per sample: {len(generator)} generators for {len(z)} samples")

    z = ode_sample(velocity, z, grid[: steps.start + 1])
    states, log_probs = [z.to(dtype)], []
    for s in steps:
        z = states[-1].to(z.dtype)
        step = sde(z, velocity(z, grid[s]), grid[s], grid[s + 1], noise)
        states.append(sample(step, generator).to(dtype))
        log_probs.append(log_prob(states[-1], step))
    z0 = ode_sample(velocity, states[-1].to(z.dtype), grid[steps.stop :])
    return Trajectory(z0, torch.stack(states), torch.stack(log_probs, dim=-1), steps)


def sample(step: Gaussian, generator: Randomness) -> Latent:
    """Draw z_next from the Gaussian of a step."""
    return step.mean + step.std * normal(step.mean.shape, generator).to(step.mean)


def normal(shape: Sequence[int], generator: Randomness) -> Float[Tensor, "..."]:
    """Standard normal noise, fp32, drawn on the generator's device; with one generator per row, a row from each."""
    if isinstance(generator, torch.Generator):
        return torch.randn(*shape, generator=generator, device=generator.device)
    return torch.stack([torch.randn(*shape[1:], generator=row, device=row.device) for row in generator])
