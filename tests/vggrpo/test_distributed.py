"""The number of ranks changes nothing: gloo processes against one process, and how a batch is shared.

`accelerate launch --cpu --num_processes 2` silently runs one process, so that every worker here asserts its world size.
"""

import os
import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate import Accelerator

from vggrpo.build import build
from vggrpo.config import GrpoConfig, OptimizerConfig, Recipe, SamplingConfig
from vggrpo.grpo import group_advantage
from vggrpo.policy.flow_policy import FlowPolicy, lora_off
from vggrpo.policy.mixture import MixtureFlow, encode_modes, nearness
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
# steps, g / |g|, do not let shrink. 5e-6 is 0.02 % of what 5 to 10 updates of 3e-3 move.
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
    torch.distributed.barrier()  # a rank that leaves while another still talks to it can take it along (SIGABRT)
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


def streams_by_local_index(run: Run, seed: int, iteration: int, first_prompt: int = 0) -> Streams:
    """The mutant: every rank, and every part of a batch, counts its prompts and members from 0."""
    return Streams(seed, iteration)


def trained_lora(accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """The adapters after three updates, KL measured against the same network with its adapters off."""
    import peft  # here: it is slow to import, and every rank imports this file

    torch.manual_seed(0)
    adapters = peft.LoraConfig(r=2, target_modules=["trunk.0", "trunk.2", "head"], init_lora_weights=False)
    network = peft.get_peft_model(MixtureFlow(width=16), adapters)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=3e-3)
    cfg = replace(RECIPE.grpo, beta=0.5)
    run = Run(accelerator, cfg.num_prompts, cfg.group_size)
    network, optimizer = run.prepare(network, optimizer)
    policy = FlowPolicy(network, encode_modes, (2,), RECIPE.sampling, lora_off(network))
    rewards = {"nearness": partial(nearness, "east")}
    numbers = list(train(policy, lambda z0: z0, rewards, [Condition(["east", ""])] * 3, optimizer, run, cfg))
    parameters = accelerator.unwrap_model(network).named_parameters()
    last = {"kl": torch.tensor(numbers[-1]["kl"])}
    return {name: p.detach().clone() for name, p in parameters if p.requires_grad} | last


def train_and_save(accelerator: Accelerator, path: str) -> None:
    """Every comparison's run in one launch; the mutant comes last, for it stays."""
    results = {num_prompts: trained(with_prompts(num_prompts), accelerator) for num_prompts in (2, 1)}
    results |= {"lora": trained_lora(accelerator)}
    Run.streams = streams_by_local_index
    results |= {"mutant": trained(RECIPE, accelerator)}
    torch.save(results, f"{path}.{accelerator.process_index}")


def with_prompts(num_prompts: int) -> Recipe:
    return replace(RECIPE, grpo=replace(RECIPE.grpo, num_prompts=num_prompts))


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest of all parameters; reported numbers are 0-d and do not count."""
    return max(float((a[name] - b[name]).abs().max()) for name in a if a[name].ndim)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    path = tmp_path_factory.mktemp("ranks") / "out"
    spawn(train_and_save, 2, str(path))
    return [torch.load(f"{path}.{rank}") for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    return trained(RECIPE, Accelerator(cpu=True))


@pytest.mark.parametrize("num_prompts", [2, 1])
def test_two_processes_train_as_one_does(two_ranks, num_prompts):
    """With two prompts each rank has whole groups; with one the group spans both."""
    first, second = (rank[num_prompts] for rank in two_ranks)
    assert difference(first, second) == 0
    one = trained(with_prompts(num_prompts), Accelerator(cpu=True))
    moved = difference(one, trained(with_prompts(num_prompts), Accelerator(cpu=True), num_iterations=0))
    print(f"moved {moved:.1e}, one process against two {difference(first, one):.1e}")
    assert moved > 1000 * TOLERANCE
    assert difference(first, one) < TOLERANCE
    for name in ("kl", "loss", "grad_norm", "ratio/mean", "reward/nearness/mean"):
        assert float(first[name]) == pytest.approx(float(one[name]), abs=1e-4), name


def test_two_processes_train_adapters_as_one_does(two_ranks):
    """The way large models are trained: LoRA under DDP, the reference is the same module with its adapters off."""
    one = trained_lora(Accelerator(cpu=True))
    assert difference(two_ranks[0]["lora"], two_ranks[1]["lora"]) == 0
    assert difference(two_ranks[0]["lora"], one) < TOLERANCE
    assert float(one["kl"]) > 1e-3
    assert float(two_ranks[0]["lora"]["kl"]) == pytest.approx(float(one["kl"]), rel=1e-4)


def test_noise_counted_on_each_rank_would_be_seen(two_ranks, alone):
    assert difference(two_ranks[0]["mutant"], alone) > 100 * TOLERANCE


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
    for num_prompts in (1, 2, 4, 6):
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
    """Four, two and one prompts on 4 ranks: groups span 1, 2 and 4 of them. Six: two ranks, each with half of three."""
    num_ranks = 4
    generator = torch.Generator().manual_seed(0)
    rewards = {name: torch.randn(6, 8, generator=generator) for name in ("motion", "geometry")}
    rewards["motion"][0, 3] = float("nan")
    spawn(gather_and_check, num_ranks, rewards, str(tmp_path / "out"))
    for num_prompts in (1, 2, 4, 6):
        expected = group_advantage({name: r[:num_prompts] for name, r in rewards.items()})
        for rank in range(num_ranks):
            (along_b, along_k), advantage, mine = torch.load(tmp_path / f"out.{num_prompts}.{rank}")
            assert along_b == {1: 1, 2: 2, 4: 4, 6: 2}[num_prompts]
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
