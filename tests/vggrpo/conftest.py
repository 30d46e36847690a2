"""Small policies on the mixture, in one process."""

from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator

from vggrpo.config import SamplingConfig
from vggrpo.policy.flow_policy import FlowPolicy, Network
from vggrpo.policy.mixture import MixtureFlow, encode_modes
from vggrpo.runtime import Run
from vggrpo.sampler import Window

torch.set_num_threads(1)


@pytest.fixture
def network() -> MixtureFlow:
    """The exact velocity with a correction that is random, not 0."""
    torch.manual_seed(0)
    net = MixtureFlow(width=16)
    torch.nn.init.normal_(net.head.weight, std=0.3)
    return net


@pytest.fixture
def make_policy(network: MixtureFlow) -> Callable[..., FlowPolicy]:
    def make(reference: Network | None = None, keep_means: bool = False, **sampling: object) -> FlowPolicy:
        settings = {"num_steps": 6, "window": Window(size=3, start=1), "micro_batch": 5} | sampling
        return FlowPolicy(network, encode_modes, (2,), SamplingConfig(**settings), reference, keep_means)

    return make


@pytest.fixture
def make_run() -> Callable[[int, int], Run]:
    return lambda num_prompts, group_size: Run(Accelerator(cpu=True), num_prompts, group_size)
