"""Fixtures that every package's tests share."""

import jaxtyping
import pytest
import torch

torch.set_num_threads(1)  # with two threads and a busy neighbour the spin barriers make a second take a minute


@pytest.fixture
def as_users_run():
    """Without the shape checks of the test run: bad input meets our own error messages, as it does for users."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
