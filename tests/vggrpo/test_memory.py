"""Out of memory, micro-batches are halved, on all ranks alike, and nothing else changes."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from geometry.world import make_clips
from tests.vggrpo.test_distributed import RECIPE, difference, spawn, trained
from vggrpo import cli
from vggrpo.checkpoint import load_checkpoint
from vggrpo.policy.mixture import MixtureFlow
from vggrpo.runtime import Run
from vggrpo.scenes import Scenes
from vggrpo.types import Condition, Streams

ROOT = Path(__file__).parents[2]
MIXTURE = str(ROOT / "launch/recipes/mixture.yaml")
SHORT = ["grpo.num_iterations=3", "grpo.group_size=8", "sampling.window.size=3", "sampling.share_noise=true"]


def full_above(size: int, module: torch.nn.Module, args: tuple) -> None:
    """A forward pre-hook: more than `size` rows do not fit. With guidance a video has two."""
    if len(args[0]) > size:
        raise torch.OutOfMemoryError(f"{len(args[0])} rows\nTried to allocate 2 GiB")


def drawn(policy):
    return policy.rollout(Condition(["east", "north", ""]), 4, Streams(0, 3))


@pytest.mark.parametrize("more", [{}, {"share_noise": True}, {"guidance_scale": 3.0}])
def test_a_rollout_without_memory_is_that_of_the_smaller_micro_batch_to_the_bit(make_policy, network, capsys, more):
    expected = drawn(make_policy(micro_batch=2, **more))
    policy = make_policy(micro_batch=8, **more)
    rows = 4 if "guidance_scale" in more else 2
    policy.network.register_forward_pre_hook(lambda module, args: full_above(rows, module, args))
    found = drawn(policy)
    assert policy.micro_batch == 2
    assert torch.equal(found.z0, expected.z0)
    assert torch.equal(found.log_prob, expected.log_prob)
    assert torch.equal(found.trajectory.states, expected.trajectory.states)
    assert [len(chunk.log_prob) for chunk in policy.replay(found)] == [2] * 18  # the ratio is 1 in the same parts
    assert "out of memory in a rollout: micro-batches of 2 now" in capsys.readouterr().err


def test_a_scene_without_memory_is_the_same_to_the_bit(capsys):
    clips = make_clips(range(6), frames=3, size=(16, 16), supersample=1).geometry

    def lgm(z: torch.Tensor, limit: int = 100):
        if len(z) > limit:
            raise torch.OutOfMemoryError("Tried to allocate 2 GiB")
        return clips.map(lambda x: x[z[:, 0].long()])

    z0 = torch.arange(6.0).view(2, 3, 1)
    expected = Scenes(lgm, 1)(z0)
    scenes = Scenes(lambda z: lgm(z, limit=1), 4)
    found = scenes(z0)
    assert scenes.at_once == 1
    assert found.depth.shape == (2, 3, 3, 16, 16)
    assert torch.equal(found.depth, expected.depth)
    assert torch.equal(found.c2w, expected.c2w)
    assert "geometry model: 1 video(s) at once now" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"one video at a time \(video.judged_at_once = 1\)"):
        Scenes(lambda z: lgm(z, limit=0), 4)(z0)


def test_a_run_without_memory_ends_as_one_with_a_small_micro_batch_to_the_bit(tmp_path, monkeypatch):
    assert cli.main(["train", MIXTURE, *SHORT, "sampling.micro_batch=2", f"out={tmp_path / 'small'}"]) == 0
    forward = MixtureFlow.forward

    def limited(self, z_t, t, weights):
        full_above(2, self, (z_t,))
        return forward(self, z_t, t, weights)

    monkeypatch.setattr(MixtureFlow, "forward", limited)
    assert cli.main(["train", MIXTURE, *SHORT, "sampling.micro_batch=8", f"out={tmp_path / 'large'}"]) == 0
    one, other = (load_checkpoint(tmp_path / name / "checkpoints").tensors for name in ("small", "large"))
    for file, tensors in one.items():
        assert all(torch.equal(x, other[file][name]) for name, x in tensors.items())


@pytest.mark.parametrize(
    ("limit", "message"), [(0, "out of memory with one video at a time"), (None, "lower sampling")]
)
def test_no_memory_at_all_is_one_line(tmp_path, monkeypatch, capsys, limit, message):
    """In a rollout; and in an update, where half of the gradient may be there already."""
    forward = MixtureFlow.forward

    def limited(self, z_t, t, weights):
        if limit is not None or torch.is_grad_enabled():
            full_above(0, self, (z_t,))
        return forward(self, z_t, t, weights)

    monkeypatch.setattr(MixtureFlow, "forward", limited)
    assert cli.main(["train", MIXTURE, *SHORT, f"out={tmp_path}"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("vggrpo: out of memory")
    assert message in last


def one_rank_in_trouble(accelerator: Accelerator, path: str) -> None:
    """Memory is short on rank 1 alone; then SIGTERM comes to rank 1 alone, in a rollout, a reward or an update."""
    second = accelerator.process_index == 1
    forward = MixtureFlow.forward

    def limited(self, z_t, t, weights):
        if second:
            full_above(2, self, (z_t,))
        return forward(self, z_t, t, weights)

    MixtureFlow.forward = limited
    torch.save(trained(replace(RECIPE, grpo=replace(RECIPE.grpo, num_updates=1)), accelerator), f"{path}.{int(second)}")
    MixtureFlow.forward = forward
    agree = Run.agree
    for when in (2, 9, 12):
        asked: list[int] = []

        def counted(self, failed=False, when=when, asked=asked):
            asked.append(1)
            if second and len(asked) == when:
                signal.raise_signal(signal.SIGTERM)
            return agree(self, failed)

        Run.agree = counted
        words = ["train", MIXTURE, *SHORT, "grpo.num_prompts=2", "sampling.micro_batch=4", f"out={path}-{when}"]
        assert cli.main(words) == 143, when
        assert len(asked) == when  # both have left at the very place
        Run.agree = agree
        accelerator.wait_for_everyone()
        assert cli.main([*words, "--resume"]) == 0, when
        accelerator.wait_for_everyone()
    assert cli.main([*words[:-1], f"out={path}-whole"]) == 0


def test_ranks_halve_together_and_stop_together(tmp_path):
    spawn(one_rank_in_trouble, 2, str(tmp_path / "out"))
    found = [torch.load(tmp_path / f"out.{rank}") for rank in range(2)]
    assert difference(*found) == 0
    small = replace(RECIPE, grpo=replace(RECIPE.grpo, num_updates=1))
    small = replace(small, sampling=replace(small.sampling, micro_batch=1))
    assert difference(found[0], trained(small, Accelerator(cpu=True))) < 5e-6
    whole = load_checkpoint(tmp_path / "out-whole/checkpoints").tensors
    for when in (2, 9, 12):
        resumed = load_checkpoint(tmp_path / f"out-{when}/checkpoints").tensors
        for file, tensors in whole.items():
            assert all(torch.equal(x, resumed[file][name]) for name, x in tensors.items()), when
