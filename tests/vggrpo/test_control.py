"""The random reward is random, nobody earns it, and ranks change nothing; the paper's recipe is the paper's."""

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from geometry.world import make_clips
from rewards import ESTIMATED_FLOW, PAPER, motion_smoothness, reprojection_consistency
from tests.vggrpo.test_session import lines, same_end, train
from vggrpo import cli
from vggrpo.build import chosen_rewards
from vggrpo.control import is_control, random_reward
from vggrpo.recipe import load_recipe
from vggrpo.runtime import Run, share_of

ROOT = Path(__file__).parents[2]
ALONE = "grpo.weights={random: 1}"


def run_of(rank: int, num_ranks: int, B: int, K: int) -> Run:
    """A rank's run, without the rank."""
    run = Run.__new__(Run)
    run.share = share_of(rank, num_ranks, B, K)
    run.num_local_prompts = run.share.prompts.stop - run.share.prompts.start
    run.num_members = run.share.members.stop - run.share.members.start
    run.accelerator = SimpleNamespace(device="cpu")
    return run


def drawn(num_ranks: int, iteration: int, seed: int = 0, B: int = 2, K: int = 64) -> torch.Tensor:
    whole = torch.full((B, K), float("nan"))
    for rank in range(num_ranks):
        run = run_of(rank, num_ranks, B, K)
        run.streams(seed, iteration)
        whole[run.share.prompts, run.share.members] = random_reward(run)(None)
    return whole


def test_the_control_is_noise_that_goes_by_a_samples_name_alone():
    r = drawn(1, 3)
    assert torch.equal(r, drawn(1, 3))
    assert torch.equal(r, drawn(4, 3))  # groups whole on two ranks, or halved on four
    assert r.unique().numel() == r.numel()
    assert ((r >= 0) & (r < 1)).all()
    every = torch.stack([drawn(1, i).flatten() for i in range(40)])
    assert abs(float(every.mean()) - 0.5) < 0.02
    assert abs(float(torch.corrcoef(torch.stack([every[:-1].flatten(), every[1:].flatten()]))[0, 1])) < 0.06
    assert not torch.equal(r, drawn(1, 4))
    assert not torch.equal(r, drawn(1, 3, seed=1))


def test_a_control_run_is_the_same_command_is_marked_and_can_be_resumed(tmp_path, capsys):
    assert train(tmp_path / "whole", ALONE) == 0
    assert "CONTROL: the reward is random" in capsys.readouterr().err
    assert {name for name in lines(tmp_path / "whole")[0] if name.startswith("reward/")} == {
        f"reward/random/{number}" for number in ("mean", "std", "nan", "zero_std")
    }
    assert train(tmp_path / "cut", ALONE, "grpo.num_iterations=3") == 0
    assert train(tmp_path / "cut", ALONE, "--resume") == 0
    assert same_end(tmp_path / "whole", tmp_path / "cut")


def test_the_control_is_never_part_of_a_reward(tmp_path, capsys):
    assert not is_control(None)
    assert not is_control({"motion_smoothness": 1.0})
    assert train(tmp_path, "grpo.weights={random: 1, nearness: 1}") == 2
    assert "'random' is the negative control and stands alone, got ['nearness', 'random']" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no reward 'random'"):  # nor does it hide among the shipped ones
        chosen_rewards({"random": 1.0})


def test_a_video_recipe_knows_the_control(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(["plan", "launch/recipes/tiny.yaml", "--no-step", ALONE]) == 0


def test_the_papers_recipe_is_the_papers(monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = load_recipe("launch/recipes/tiny_paper.yaml")
    grpo, video = recipe.grpo, recipe.video
    assert grpo.weights == PAPER
    assert (grpo.clip, grpo.beta, grpo.max_grad_norm, grpo.num_updates) == (1e-3, 0.004, 1.0, 1)
    assert (grpo.aggregate, grpo.baseline, grpo.silent, grpo.clamp) == ("normalize_then_sum", "z_score", "count", None)
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay, recipe.optimizer.ema) == (1e-4, 1e-4, None)
    assert asdict(video.lora) == {"rank": 32, "alpha": 64}
    assert (recipe.sampling.sde, recipe.sampling.num_steps) == ("flow_sde", 10)
    clips = make_clips(range(3), frames=5, size=(16, 16), supersample=1).geometry
    rewards = chosen_rewards(grpo.weights, video.reward_form)
    assert torch.equal(rewards["motion_smoothness"](clips), motion_smoothness(clips, floor=0.0))
    paper = {"scale": "absolute", "exclude_self": False, "dynamic_threshold": ESTIMATED_FLOW}
    found = rewards["reprojection_consistency"](clips)
    assert torch.equal(found, reprojection_consistency(clips, **paper))
    assert not torch.equal(found, chosen_rewards(grpo.weights)["reprojection_consistency"](clips))
