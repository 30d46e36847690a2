"""What GRPO does to a flow, drawn: a learned velocity field in the plane, its samples, and both again after training.

    python launch/fields.py                 # any CPU, about a minute: learn, sample, train, write fields.npz, draw
    python launch/fields.py --draw-only     # draw fields.png from the fields.npz that is there

A small network learns the velocity of four modes by flow matching; it never sees the closed form. Then the trainer that
finetunes video models moves its mass to the east, once held back by the KL to where it began and once not. The picture
is drawn from the arrays in fields.npz and nothing else. Expect: velocity error under 1 % of the velocity's variance;
nearness to the east from 0.29 to about 0.7 with KL, and to 1.0 in a single point without.
"""

import argparse
import itertools
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vggrpo.config import GrpoConfig, SamplingConfig
from vggrpo.flow import Velocity, euler_step, flow_sde_step, interpolate
from vggrpo.guidance import guided
from vggrpo.policy.flow_policy import FlowPolicy, frozen_copy
from vggrpo.policy.mixture import MODES, STD, encode_modes, mixture_velocity, nearness
from vggrpo.runtime import Run
from vggrpo.sampler import Window, ode_sample, sample, time_grid
from vggrpo.trainer import train
from vggrpo.types import Condition

EXTENT = 3.1
"""Half the side of every panel."""
PIXELS = 96
TIMES = [0.0, 0.3, 0.5, 1.0]
"""Of the forward process."""
ADDED_AT = 0.7
"""The time at which the field before is taken from the field after."""
BETA = 0.7
"""Weight of the KL. It is large because nothing else holds back a reward that wants a single point."""
reward = partial(nearness, "east")


class Field(nn.Module):
    """A velocity network with nothing built in: (z_t [n 2], t [n], a prompt that it ignores) -> v [n 2]."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(7, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, z_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Time enters as t and as two waves."""
        t = t[:, None] * torch.pi
        waves = [t / torch.pi, t.sin(), t.cos(), (2 * t).sin(), (2 * t).cos()]
        v: Tensor = self.layers(torch.cat([z_t, *waves], dim=-1))
        return v


def velocity_of(network: nn.Module) -> Velocity:
    """The network as the samplers call it."""
    return lambda z_t, t: network(z_t, torch.full((len(z_t),), float(t)))


def draw_data(num: int, generator: torch.Generator) -> Tensor:
    """Samples of the four modes [n 2]."""
    modes = torch.tensor(list(MODES.values()))
    return modes[torch.randint(4, (num,), generator=generator)] + STD * torch.randn(num, 2, generator=generator)


def learn(network: nn.Module, generator: torch.Generator, num_steps: int = 4000, batch: int = 1024) -> None:
    """Flow matching: regress eps - z0 on z_t."""
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        z0, eps = draw_data(batch, generator), torch.randn(batch, 2, generator=generator)
        t = torch.rand(batch, 1, generator=generator)
        v = network(interpolate(z0, eps, t), t[:, 0])
        loss = (v - (eps - z0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def unexplained(network: nn.Module, generator: torch.Generator) -> float:
    """Squared error of the learned velocity against the closed form, over the variance of the latter."""
    z0, eps = draw_data(20_000, generator), torch.randn(20_000, 2, generator=generator)
    t = torch.rand(20_000, generator=generator)
    z_t = interpolate(z0, eps, t[:, None])
    exact = mixture_velocity(z_t, t, torch.full((20_000, 4), 0.25))
    return float((network(z_t, t) - exact).square().mean() / exact.var())


def paths(velocity: Velocity, z: Tensor, grid: Tensor, steps: range, generator: torch.Generator) -> Tensor:
    """All states [S+1 n 2] of a walk whose `steps` are Flow-SDE steps and whose others are Euler steps."""
    states = [z]
    for s, (t, t_next) in enumerate(itertools.pairwise(grid)):
        v = velocity(z, t)
        if s in steps:
            z = sample(flow_sde_step(z, v, t, t_next, noise=0.7), generator)
        else:
            z = euler_step(z, v, t, t_next)
        states.append(z)
    return torch.stack(states)


def axis(num: int) -> Tensor:
    """Centres of `num` pixels across a panel."""
    return EXTENT * ((torch.arange(num) + 0.5) / num * 2 - 1)


def lattice(num: int) -> Tensor:
    """[num num 2] points, row by row from the south."""
    y, x = torch.meshgrid(axis(num), axis(num), indexing="ij")
    return torch.stack([x, y], dim=-1)


def arrows(network: nn.Module, t: float, num: int = 15) -> Tensor:
    """-v [num num 2] on a lattice: the direction in which sampling walks."""
    return -velocity_of(network)(lattice(num).flatten(0, 1), t).view(num, num, 2)


def forward_density(t: float) -> Tensor:
    """p_t on the pixels: exact."""
    means = (1 - t) * torch.tensor(list(MODES.values()))
    variance = ((1 - t) * STD) ** 2 + t**2
    squared = (lattice(PIXELS)[..., None, :] - means).square().sum(-1)
    return ((-squared / (2 * variance)).exp() / (2 * torch.pi * variance)).mean(-1)


def sample_density(z: Tensor, width: float = 0.12) -> Tensor:
    """A kernel density estimate on the pixels."""
    kernel = [(-((axis(PIXELS)[:, None] - z[:, i]) ** 2) / (2 * width**2)).exp() for i in range(2)]
    return kernel[1] @ kernel[0].T / (len(z) * 2 * torch.pi * width**2)


def finetune(start: nn.Module, beta: float, seed: int) -> tuple[nn.Module, float]:
    """GRPO on nearness to the east from `start`, by the trainer; the network, and the KL of its last iteration."""
    network = Field()
    network.load_state_dict(start.state_dict())
    sampling = SamplingConfig(num_steps=10, window=Window(size=8), micro_batch=64)
    grpo = GrpoConfig(num_prompts=1, group_size=64, num_iterations=60, beta=beta, seed=seed)
    run = Run(Accelerator(cpu=True), grpo.num_prompts, grpo.group_size)
    prepared, optimizer = run.prepare(network, torch.optim.AdamW(network.parameters(), lr=1e-3))
    policy = FlowPolicy(prepared, encode_modes, (2,), sampling, reference=start)
    conditions = itertools.repeat(Condition([""]), grpo.num_iterations)
    *_, last = train(policy, lambda z0: z0, {"nearness": reward}, conditions, optimizer, run, grpo)
    return network, last["kl"]


def compute(seed: int) -> dict[str, np.ndarray]:
    """Every array that the picture shows."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = Field()
    learn(network, generator)
    network = frozen_copy(network)
    with_kl, kl = finetune(network, BETA, seed)
    without_kl, _ = finetune(network, 0.0, seed)

    with torch.no_grad():
        velocity, grid, coarse = velocity_of(network), time_grid(100), time_grid(10)
        pull = guided(velocity, reward, 5.0, grid)
        noise = torch.randn(28, 2, generator=generator)
        group = paths(velocity, torch.tensor([[1.6, 1.75]]).expand(40, -1), coarse, range(3, 7), generator)
        arrays = {
            "extent": torch.tensor(EXTENT),
            "east": torch.tensor(MODES["east"]),
            "beta": torch.tensor(BETA),
            "unexplained": torch.tensor(unexplained(network, generator)),
            "times": torch.tensor(TIMES),
            "forward_density": torch.stack([forward_density(t) for t in TIMES]),
            "forward_arrows": torch.stack([arrows(network, t) for t in TIMES]),
            "added_arrows": arrows(with_kl, ADDED_AT) - arrows(network, ADDED_AT),
            "added_density": forward_density(ADDED_AT),
            "added_at": torch.tensor(ADDED_AT),
            "ode_paths": paths(velocity, noise, grid, range(0), generator),
            "sde_paths": paths(velocity, noise[:10], grid, range(99), generator),
            "guided_paths": paths(pull, noise, grid, range(0), generator),
            "group_paths": group,
            "group_window": torch.tensor([3, 7]),
            "group_reward": reward(group[-1]),
            "kl": torch.tensor(kl),
        }
        many = torch.randn(20_000, 2, generator=generator)
        after, collapsed = velocity_of(with_kl), velocity_of(without_kl)
        for name, flow in {"before": velocity, "guided": pull, "after": after, "without_kl": collapsed}.items():
            z0 = ode_sample(flow, many, grid)
            arrays |= {f"{name}_density": sample_density(z0), f"{name}_reward": reward(z0).mean()}
    return {name: value.float().numpy() for name, value in arrays.items()}


def main() -> None:
    """Compute, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("assets/pictures"), help="folder of fields.npz and fields.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draw-only", action="store_true", help="draw the fields.npz that is there")
    args = parser.parse_args()
    archive = args.out / "fields.npz"
    if args.draw_only and not archive.is_file():
        parser.error(f"no {archive} to draw: run without --draw-only first")
    if not args.draw_only:
        args.out.mkdir(parents=True, exist_ok=True)
        arrays = compute(args.seed)
        np.savez_compressed(archive, **arrays)
        rewards = ", ".join(f"{n} {arrays[f'{n}_reward']:.3f}" for n in ("before", "guided", "after", "without_kl"))
        print(f"velocity error {arrays['unexplained']:.2%}; nearness: {rewards}; KL after {arrays['kl']:.4f}")
    from draw_fields import draw  # matplotlib is an extra: needed from here on

    with np.load(archive) as arrays:
        draw(dict(arrays), args.out / "fields.png")


if __name__ == "__main__":
    main()
