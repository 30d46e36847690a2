"""What passes between a policy and its trainer.

    B  prompts in a batch          S  trained decisions per sample: denoising steps (flow) or tokens (autoregressive)
    K  members of a group          n  decisions in one micro-batch of a replay

The trainer knows these types and nothing else about a policy. Groups are an axis, [B K ...], never a hashed prompt: two
prompts that read the same stay two groups.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64, Num
from torch import Tensor

At = tuple[Int64[Tensor, " n"], Int64[Tensor, " n"], Int64[Tensor, " n"]]
"""Which decisions: indices into the axes [B K S], so `log_prob[at]` is [n] and `advantage[at[:2]]` is [n]."""


@dataclass(frozen=True)
class Condition:
    """What a batch of videos is asked to show. Opaque to the trainer; `len` is B, slicing keeps the fields together."""

    prompt: list[str]
    """B texts."""
    first_frame: Float[Tensor, "B 3 H W"] | None = None
    """RGB in [0, 1] (image to video)."""
    camera: Float[Tensor, "B T 4 4"] | None = None
    """c2w, world = frame 0 (camera control)."""
    action: Float[Tensor, "B T D"] | None = None
    """Whatever a world model is driven by."""

    def __len__(self) -> int:
        return len(self.prompt)

    def __getitem__(self, part: slice) -> "Condition":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        chosen: dict[str, Any] = {name: None if value is None else value[part] for name, value in values.items()}
        return Condition(**chosen)


@dataclass(frozen=True)
class Streams:
    """Where a rollout's random numbers come from: each video owns a stream, named by seed, iteration, prompt, member.

    So a video depends neither on its neighbours nor on the batch, the micro-batch or the rank it was drawn on, and
    resuming a run needs no random state but the iteration. Streams live on the CPU: every device sees the same noise.
    """

    seed: int
    iteration: int
    """Update of the run; what moves a progressive window."""
    first_prompt: int = 0
    """Index in the global batch of this rank's prompt 0."""
    first_member: int = 0
    """Index in its group of this rank's member 0."""

    def member(self, b: int, k: int) -> torch.Generator:
        """The stream of one video."""
        return _stream("member", self.seed, self.iteration, self.first_prompt + b, self.first_member + k)

    def noising(self, b: int, k: int) -> torch.Generator:
        """Another stream of that video, for the forward process (DiffusionNFT): times and noise."""
        return _stream("noising", self.seed, self.iteration, self.first_prompt + b, self.first_member + k)

    def control(self, b: int, k: int) -> torch.Generator:
        """A stream of that video that decides nothing about it: for the random reward."""
        return _stream("control", self.seed, self.iteration, self.first_prompt + b, self.first_member + k)

    def group(self, b: int) -> torch.Generator:
        """What the members of a group share: their initial noise, if it is shared."""
        return _stream("group", self.seed, self.iteration, self.first_prompt + b)


def _stream(*name: str | int) -> torch.Generator:
    # A digest, not arithmetic: seed + 1000 * iteration + prompt collides, and neighbouring seeds are no problem to it.
    digest = hashlib.blake2b(repr(name).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big", signed=True))


@dataclass(frozen=True)
class Rollout:
    """K samples for each of B conditions, and how likely each trained decision was when it was taken."""

    cond: Condition
    z0: Num[Tensor, "B K *latent"]
    """The samples: clean latents in the units in which samplers hold them, or tokens."""
    log_prob: Float[Tensor, "B K S"]
    """fp32 and without graph; a flow's is the mean over latent dimensions."""
    trajectory: Any
    """The policy's own notes, which only its `replay` reads."""


class Shift(NamedTuple):
    """How far each Gaussian step has moved since the rollout: what RatioNorm needs beyond the log-probabilities."""

    drift: Float[Tensor, " n"]
    """mean |mean_now - mean_then|^2 / (2 std^2) over latent dimensions."""
    std: Float[Tensor, " n"]
    dt: Float[Tensor, " n"]
    """|dt| of the step, in flow time."""


@dataclass(frozen=True)
class Replay:
    """A micro-batch of decisions, evaluated under the policy as it is now. Carries the graph."""

    at: At
    log_prob: Float[Tensor, " n"]
    kl: Float[Tensor, " n"]
    """KL(policy | reference) of each decision, reduced as `log_prob` is; 0 for a policy without reference."""
    shift: Shift | None = None
    """None where there is no Gaussian (tokens) or nobody asked."""


@runtime_checkable
class Policy(Protocol):
    """Anything that samples, and can say again how likely each of its decisions is."""

    def rollout(self, cond: Condition, group_size: int, generator: Streams) -> Rollout:
        """Draw `group_size` samples for every condition."""
        ...

    def replay(self, rollout: Rollout) -> Iterator[Replay]:
        """Every decision of `rollout` once, a micro-batch at a time; as many chunks on one rank as on another."""
        ...
