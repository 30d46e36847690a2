"""Every prompt is held to the base model's own motion under it."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from geometry.world import Motion, make_clips
from rewards import camera_motion
from tests.rewards.helpers import line, walk
from vggrpo.base_motion import STILL, STRIDE, floor_of, measure_base_motion
from vggrpo.runtime import Run
from vggrpo.trainer import score
from vggrpo.types import Condition, Rollout

SPEED = {"a slow pan": 0.01, "a fast truck": 0.04, "it stands still": 0.0}


class Base:
    """A policy whose z0 is the speed of the camera; member k moves 1 + k / 10 times as fast as member 0."""

    def rollout(self, cond, group_size, generator):
        speeds = torch.tensor([SPEED[prompt] for prompt in cond.prompt])
        return rollout_of(speeds[:, None] * (1 + 0.1 * torch.arange(group_size)), cond)

    def replay(self, rollout):
        raise NotImplementedError


def rollout_of(z0, cond):
    return Rollout(cond, z0, torch.zeros(*z0.shape, 1), None)


def scene_of(z0):
    """Cameras of constant speed, [B K T]."""
    scenes = [walk(line(17, (float(speed), 0, 0)), depth=1.0) for speed in z0.flatten()]
    names = ("c2w", "intrinsics", "depth", "points")
    stacked = {name: torch.stack([getattr(scene, name) for scene in scenes]) for name in names}
    return type(scenes[0])(**{name: x.unflatten(0, z0.shape) for name, x in stacked.items()})


@pytest.fixture
def run():
    return Run(Accelerator(cpu=True), 2, 3)


def test_it_is_the_mean_over_the_samples_of_each_prompt(run):
    motion = measure_base_motion(Base(), scene_of, [*SPEED, "a slow pan"], 3, 0, run)
    assert list(motion) == list(SPEED)
    for prompt, speed in SPEED.items():
        assert motion[prompt] == pytest.approx(1.1 * STRIDE * speed, abs=1e-6)


def test_each_prompt_has_its_own_floor(run):
    motion = measure_base_motion(Base(), scene_of, list(SPEED), 3, 0, run)
    cond = Condition(["a fast truck", "a slow pan"])
    half = rollout_of(torch.tensor([[0.02, 0.05], [0.02, 0.0055]]), cond)
    reward = score({"floor": floor_of(motion, 1.0)}, scene_of(half.z0), half)["floor"]
    torch.testing.assert_close(reward, torch.tensor([[0.02 / 0.044 - 1, 0.0], [0.0, -0.5]]), atol=1e-4, rtol=0)
    kept = score({"floor": floor_of(motion, 0.5)}, scene_of(half.z0), half)["floor"]
    torch.testing.assert_close(kept, torch.tensor([[0.02 / 0.022 - 1, 0.0], [0.0, 0.0]]), atol=1e-4, rtol=0)


def test_nothing_is_asked_of_a_camera_that_is_told_to_stand_still(run):
    motion = measure_base_motion(Base(), scene_of, ["it stands still"], 2, 0, run)
    trembling = rollout_of(torch.tensor([[0.0, 2e-4]]), Condition(["it stands still"]))
    assert score({"floor": floor_of(motion, 1.0)}, scene_of(trembling.z0), trembling)["floor"].tolist() == [[0, 0]]


def test_sway_alone_is_no_motion_to_keep_and_the_slowest_command_is():
    """Else a floor at the base's own motion would ask a camera at rest to go on bobbing."""

    def motion(command: Motion, sway: float) -> torch.Tensor:
        clips = make_clips(range(16), motion=command, sway=sway, size=(16, 16), supersample=1, scenes=[0, 1] * 8)
        return camera_motion(clips.geometry, stride=STRIDE)

    assert 0.001 < motion("static", 2.0).mean() < motion("static", 2.0).max() < STILL
    assert motion("pedestal", 0.0).min() > STILL


def test_a_prompt_without_any_motion_to_measure_is_named(run):
    def blind(z0):
        scene = scene_of(z0)
        return replace(scene, depth=scene.depth * float("nan"))

    assert camera_motion(blind(torch.ones(1, 1))).isnan().all()
    with pytest.raises(ValueError, match="no video of 'a slow pan' has a camera motion"):
        measure_base_motion(Base(), blind, ["a slow pan"], 2, 0, run)
