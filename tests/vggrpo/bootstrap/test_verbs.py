"""Reading the camera's verb and side from a path: right on the world's truth, whatever the unit, and only there."""

import pytest
import torch

from geometry.cameras import rigid, so3_exp
from geometry.types import Geometry
from geometry.world import MOTIONS, make_clips
from geometry.world.stage import draw_take
from vggrpo.bootstrap import verbs
from vggrpo.bootstrap.verbs import read_motion
from vggrpo.bootstrap.verbs_eval import confusion, report_verbs, score

SEEDS = range(60_002_000, 60_002_100)


@pytest.fixture(scope="module")
def truth():
    """Cameras, depth and commands of steady clips; half of them have moving bodies."""
    parts, wanted = [], []
    for dynamic, seeds in ((False, SEEDS[:50]), (True, SEEDS[50:])):
        scene = make_clips(seeds, dynamic=dynamic, size=(16, 16), supersample=1).geometry
        parts.append((scene.c2w, scene.depth))
        moves = [draw_take(seed, 17, (16, 16), dynamic, None, 0.0, 1.0).move for seed in seeds]
        wanted += [(move.motion, move.side) for move in moves]
    return torch.cat([c2w for c2w, _ in parts]), torch.cat([depth for _, depth in parts]), wanted


def test_verbs_and_sides_of_the_truth_are_read(truth):
    c2w, depth, wanted = truth
    found = list(zip(*read_motion(c2w, depth), strict=True))
    assert score(found, wanted)["verb and side"] >= 0.97
    assert {verb for verb, _ in wanted} == set(MOTIONS)


def test_another_unit_of_length_changes_nothing(truth):
    c2w, depth, _ = truth
    unit = torch.linspace(0.2, 5, len(c2w))[:, None, None, None]
    scaled = c2w.clone()
    scaled[..., :3, 3] *= unit[:, 0]
    assert read_motion(scaled, depth * unit) == read_motion(c2w, depth)


def test_a_path_played_backwards_has_the_other_side(truth):
    """In and out swap; an orbit seen from its end goes the other way."""
    c2w, depth, wanted = truth
    motions, sides = read_motion(c2w.flip(1), depth.flip(1))
    swap = {"dolly_in": "dolly_out", "dolly_out": "dolly_in"}
    turned = [(swap.get(motion, motion), -side) for motion, side in wanted]
    assert score(list(zip(motions, sides, strict=True)), turned)["verb and side"] >= 0.95


def test_some_shake_is_survived_and_noise_alone_is_no_verb(truth):
    c2w, depth, wanted = truth
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(*c2w.shape[:2], 6, generator=rng)
    small = rigid(so3_exp(0.01 * noise[..., :3]), 0.01 * noise[..., 3:])
    shaken = list(zip(*read_motion(c2w @ small, depth), strict=True))
    assert score(shaken, wanted)["verb and side"] >= 0.85
    lost = rigid(so3_exp(0.2 * noise[..., :3]), noise[..., 3:])
    assert set(read_motion(lost, depth)[0]) == {"random"}


def test_a_hand_that_sways_changes_few_verbs(monkeypatch):
    """Three degrees of it, half as much again as in the generator's footage. Of a camera at rest it is all there is."""
    takes = [draw_take(seed, 17, (16, 16), False, None, 0.0, 1.0, swaying=3.0) for seed in SEEDS]
    takes = [take for take in takes if take.move.motion != "static"]
    c2w = torch.cat([take.shot.c2w for take in takes])
    depth = torch.tensor([take.scene.focus for take in takes])[:, None, None, None].repeat(1, 17, 2, 2)
    wanted = [(take.move.motion, take.move.side) for take in takes]
    assert score(list(zip(*read_motion(c2w, depth), strict=True)), wanted)["verb and side"] >= 0.9
    monkeypatch.setattr("vggrpo.bootstrap.verbs.SLOW", 16)
    verbs._bank.cache_clear()
    assert score(list(zip(*read_motion(c2w, depth), strict=True)), wanted)["verb and side"] < 0.75, "the control"
    verbs._bank.cache_clear()


def test_controls_are_at_chance(truth):
    """One answer for all, and the answers of other clips."""
    c2w, depth, wanted = truth
    scene = Geometry(c2w, torch.eye(3).expand(*c2w.shape[:2], 3, 3), depth, depth[..., None].expand(*depth.shape, 3))
    found = report_verbs({"the truth": scene}, wanted, ["the truth"])
    assert found["scores"]["the truth"]["verb"] >= 0.97
    assert found["scores"]["control: one answer for all"]["verb"] < 0.3
    assert found["scores"]["control: answers of other clips"]["verb"] < 0.3
    assert sum(sum(row.values()) for row in found["confusion"]["the truth"].values()) == len(wanted)


def test_a_wrong_side_is_counted():
    table = confusion([("pan", 1), ("pan", -1), ("tilt", 1)], [("pan", 1), ("pan", 1), ("pan", 1)])
    assert table["pan"]["pan"] == 2
    assert table["pan"]["tilt"] == table["pan"]["wrong side"] == 1


def test_one_clip_and_several_batch_axes():
    c2w, depth = torch.eye(4).repeat(2, 3, 5, 1, 1), torch.ones(2, 3, 5, 4, 4)
    c2w[..., 0, 3] = 0.1 * torch.arange(5)
    assert read_motion(c2w, depth) == (["truck"] * 6, [1] * 6)
    assert read_motion(c2w[0, 0], depth[0, 0]) == (["truck"], [1])
    with pytest.raises(ValueError, match="two frames or more, got 1"):
        read_motion(c2w[..., :1, :, :], depth[..., :1, :, :])
