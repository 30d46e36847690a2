"""The number of ranks changes nothing: gloo processes against one process, and how a batch is shared.

`accelerate launch --cpu --num_processes 2` silently runs one process, so that every worker here asserts its world size.
"""

import os
import socket
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from vggrpo.cli import build
from vggrpo.config import GrpoConfig, OptimizerConfig, Recipe, SamplingConfig
from vggrpo.grpo import group_advantage
from vggrpo.runtime import Run, share_of
from vggrpo.sampler import Window
from vggrpo.trainer import train
from vggrpo.types import Condition, Streams

RECIPE = Recipe(
    sampling=SamplingConfig(
        num_steps=5, window=Window(kind="random", size=2), micro_batch=4, guidance_scale=2.0, storage="bfloat16"
    ),
    grpo=GrpoConfig(num_prompts=2, group_size=4, clip=0.2, beta=0.1, num_updates=2, max_grad_norm=10.0),
    optimizer=OptimizerConfig(lr=3e-3),
)
PROMPTS = ["east", "", "north west", "east"]
# Two processes sum gradients in another order and run the network on other batches: fp32 rounding, which AdamW's first
# steps, g / |g|, do not let shrink. 5e-6 is 0.03 % of what 5 to 10 updates of 3e-3 move.
TOLERANCE = 5e-6


def spawn(worker: Callable[..., None], num_ranks: int, *args: object) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_as_rank, args=(worker, num_ranks, port, *args), nprocs=num_ranks)


def _as_rank(rank: int, worker: Callable[..., None], num_ranks: int, port: int, *args: object) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == num_ranks, f"asked for {num_ranks} ranks, got {accelerator.num_processes}"
    assert accelerator.process_index == rank
    worker(accelerator, *args)
    torch.distributed.destroy_process_group()


def trained(recipe: Recipe, accelerator: Accelerator, num_iterations: int = 5) -> dict[str, torch.Tensor]:
    """Parameters and numbers after training on the prompts in turn."""
    parts = build(recipe, accelerator)
    B = recipe.grpo.num_prompts
    conditions = [Condition((PROMPTS * 5)[i * B : (i + 1) * B]) for i in range(num_iterations)]
    numbers = list(
        train(parts.policy, parts.geometry, parts.rewards, conditions, parts.optimizer, parts.run, recipe.grpo)
    )
    network = accelerator.unwrap_model(parts.network)
    last = {name: torch.tensor(value) for name, value in (numbers or [{}])[-1].items() if "second" not in name}
    return {name: p.detach().clone() for name, p in network.named_parameters()} | last


def train_and_save(accelerator: Accelerator, recipe: Recipe, path: str) -> None:
    result = trained(recipe, accelerator)
    torch.save(result, f"{path}.{accelerator.process_index}")


def streams_by_local_index(run: Run, seed: int, iteration: int, first_prompt: int = 0) -> Streams:
    """The mutant: every rank, and every part of a batch, counts its prompts and members from 0."""
    return Streams(seed, iteration)


def train_with_local_noise_and_save(accelerator: Accelerator, recipe: Recipe, path: str) -> None:
    Run.streams = streams_by_local_index
    train_and_save(accelerator, recipe, path)


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a if name.startswith(("trunk", "head")))


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    return trained(RECIPE, Accelerator(cpu=True))


@pytest.mark.parametrize("num_prompts", [2, 1])
def test_two_processes_train_as_one_does(num_prompts, tmp_path):
    """With two prompts each rank has whole groups; with one the group spans both."""
    recipe = replace(RECIPE, grpo=replace(RECIPE.grpo, num_prompts=num_prompts))
    spawn(train_and_save, 2, recipe, str(tmp_path / "out"))
    ranks = [torch.load(tmp_path / f"out.{rank}") for rank in range(2)]
    assert difference(*ranks) == 0
    one = trained(recipe, Accelerator(cpu=True))
    moved = difference(one, trained(recipe, Accelerator(cpu=True), num_iterations=0))
    print(f"moved {moved:.1e}, one process against two {difference(ranks[0], one):.1e}")
    assert moved > 1000 * TOLERANCE
    assert difference(ranks[0], one) < TOLERANCE
    for name in ("kl", "loss", "grad_norm", "ratio/mean", "reward/nearness/mean"):
        assert float(ranks[0][name]) == pytest.approx(float(one[name]), abs=1e-4), name


def test_noise_counted_on_each_rank_would_be_seen(alone, tmp_path):
    spawn(train_with_local_noise_and_save, 2, RECIPE, str(tmp_path / "out"))
    assert difference(torch.load(tmp_path / "out.0"), alone) > 100 * TOLERANCE


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_change_nothing(alone, micro_batch):
    split = trained(replace(RECIPE, sampling=replace(RECIPE.sampling, micro_batch=micro_batch)), Accelerator(cpu=True))
    assert difference(split, alone) < TOLERANCE


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_rollouts_are_one_large_batch(accumulate, monkeypatch):
    """Four prompts at once, or two by two, or one by one; and each part drawing the first part's noise is seen."""
    recipe = replace(RECIPE, grpo=replace(RECIPE.grpo, num_prompts=4, num_updates=1))
    parts = replace(recipe, grpo=replace(recipe.grpo, num_prompts=4 // accumulate, accumulate=accumulate))
    whole = trained(recipe, Accelerator(cpu=True), num_iterations=3)
    pieces = trained(parts, Accelerator(cpu=True), num_iterations=3 * accumulate)
    assert difference(pieces, whole) < TOLERANCE
    monkeypatch.setattr(Run, "streams", streams_by_local_index)
    mutant = trained(parts, Accelerator(cpu=True), num_iterations=3 * accumulate)
    assert difference(mutant, whole) > 100 * TOLERANCE


def gather_and_check(accelerator: Accelerator, rewards: dict[str, torch.Tensor], path: str) -> None:
    for num_prompts in (1, 2, 4):
        run = Run(accelerator, num_prompts, 8)
        mine = {name: run.local(r[:num_prompts]) for name, r in rewards.items()}
        gathered = run.gather(mine)
        for name, r in rewards.items():
            assert torch.equal(gathered[name].nan_to_num(-9), r[:num_prompts].nan_to_num(-9)), name
        advantage = group_advantage(gathered)
        torch.save(
            (run.share.shape, advantage, run.local(advantage)), f"{path}.{num_prompts}.{run.accelerator.process_index}"
        )


def test_groups_that_span_ranks_have_bit_equal_advantages(tmp_path):
    """Four, two and one prompts on 4 ranks: groups span 1, 2 and 4 of them."""
    num_ranks = 4
    generator = torch.Generator().manual_seed(0)
    rewards = {name: torch.randn(4, 8, generator=generator) for name in ("motion", "geometry")}
    rewards["motion"][0, 3] = float("nan")
    spawn(gather_and_check, num_ranks, rewards, str(tmp_path / "out"))
    for num_prompts in (1, 2, 4):
        expected = group_advantage({name: r[:num_prompts] for name, r in rewards.items()})
        for rank in range(num_ranks):
            (along_b, along_k), advantage, mine = torch.load(tmp_path / f"out.{num_prompts}.{rank}")
            assert along_b == min(num_prompts, num_ranks)
            assert along_k == num_ranks // along_b
            assert torch.equal(advantage, expected)
            i, j = divmod(rank, along_k)
            assert torch.equal(mine, expected.chunk(along_b)[i].chunk(along_k, dim=1)[j])


@pytest.mark.parametrize(
    ("num_ranks", "num_prompts", "group_size"), [(1, 3, 4), (6, 4, 6), (4, 4, 2), (3, 2, 9), (8, 1, 8)]
)
def test_shares_tile_the_batch(num_ranks, num_prompts, group_size):
    cover = torch.zeros(num_prompts, group_size)
    for rank in range(num_ranks):
        share = share_of(rank, num_ranks, num_prompts, group_size)
        cover[share.prompts, share.members] += 1
        assert cover[share.prompts, share.members].numel() * num_ranks == num_prompts * group_size
    assert (cover == 1).all()


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="each group falls on 4 ranks, so group_size must be a multiple of 4"):
        share_of(0, num_ranks=4, num_prompts=3, group_size=6)
    with pytest.raises(ValueError, match="group_size >= 2"):
        share_of(0, num_ranks=1, num_prompts=3, group_size=1)
