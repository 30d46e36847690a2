"""The smallest flow with everything that the large ones have: four modes in the plane, by name.

The data are four Gaussians on a compass. A prompt names the modes that it mixes ("east", "north west"); "" mixes all.
The velocity of such a mixture is known in closed form: that is the pretrained model. Training adds a correction to it.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vggrpo.types import Condition

MODES = {"east": (2.0, 0.0), "north": (0.0, 2.0), "west": (-2.0, 0.0), "south": (0.0, -2.0)}
STD = 0.3
"""Of each mode."""


def encode_modes(cond: Condition) -> Float[Tensor, "B 4"]:
    """Each prompt as the weights of the modes that it names.

    Raises:
        ValueError: a prompt with a word that names no mode.
    """
    for prompt in cond.prompt:
        if unknown := set(prompt.split()) - set(MODES):
            raise ValueError(f"prompt {prompt!r}: {sorted(unknown)[0]!r} is no mode; use {', '.join(MODES)}, or ''")
    named = torch.tensor([[float(mode in prompt.split() or not prompt) for mode in MODES] for prompt in cond.prompt])
    return named / named.sum(-1, keepdim=True)


def mixture_velocity(
    z_t: Float[Tensor, "n 2"], t: Float[Tensor, " n"], weights: Float[Tensor, "n 4"]
) -> Float[Tensor, "n 2"]:
    """E[eps - z0 | z_t], exactly: under mode i, z_t is N((1-t) m_i, (1-t)^2 std^2 + t^2)."""
    t = t[:, None, None]
    means = z_t.new_tensor(list(MODES.values()))
    variance = ((1 - t) * STD) ** 2 + t**2
    offset = z_t[:, None] - (1 - t) * means
    which = (weights.log() - offset.square().sum(-1) / (2 * variance[..., 0])).softmax(-1)
    v = (t - (1 - t) * STD**2) / variance * offset - means
    return (which[..., None] * v).sum(1)


class MixtureFlow(nn.Module):
    """The exact velocity plus a learned correction that starts at 0."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(7, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.head = nn.Linear(width, 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, z_t: Float[Tensor, "n 2"], t: Float[Tensor, " n"], weights: Float[Tensor, "n 4"]
    ) -> Float[Tensor, "n 2"]:
        """The velocity of n points under n prompts."""
        learned: Tensor = self.head(self.trunk(torch.cat([z_t, t[:, None], weights], dim=-1)))
        return mixture_velocity(z_t, t, weights) + learned


def nearness(mode: str, z0: Float[Tensor, "*batch 2"]) -> Float[Tensor, "*batch"]:
    """A reward: 1 at the mode's centre, 1/2 at a distance of 1, towards 0 far away.

    Raises:
        ValueError: no such mode.
    """
    if mode not in MODES:
        raise ValueError(f"no mode {mode!r}: choose one of {', '.join(MODES)}")
    return 1 / (1 + (z0 - z0.new_tensor(MODES[mode])).square().sum(-1))
