"""What the report's numbers say of answers whose quality is known: the truth, noise, and nothing at all."""

import math

import pytest
import torch

from geometry.latent import Connector, LatentSpec
from geometry.types import check_geometry
from geometry.world import PERTURBATIONS, make_clip
from rewards import reprojection_consistency
from vggrpo.bootstrap.geometry_publish import BARS
from vggrpo.stitch.fidelity import OFF, REWARDS, UNSEEN, blind, depth_off, fidelity, versions
from vggrpo.stitch.judge import random_connector, ratios


def spoilt(seed=0, count=3):
    """Rewards of made-up versions: every fault lowers them with its magnitude, from another height for each clip."""
    rng = torch.Generator().manual_seed(seed)
    listed = [("none", 0.0)]
    for name, fault in PERTURBATIONS.items():
        if name not in UNSEEN:
            listed += [(name, fault.magnitudes[k]) for k in (0, 2, 4)]
    fall = torch.tensor(
        [[0.0 if name == "none" else PERTURBATIONS[name].magnitudes.index(m) + 1] for name, m in listed]
    )
    truth = torch.rand(count, generator=rng) - fall - 0.01 * torch.rand(len(listed), count, generator=rng)
    return listed, {reward: truth.clone() for reward in REWARDS}, rng


def test_the_truth_is_faithful_and_noise_is_not():
    listed, truth, rng = spoilt()
    order = {reward: 3 * x.exp() + 1 for reward, x in truth.items()}  # any rising function will do
    noise = {reward: torch.randn(x.shape, generator=rng) for reward, x in truth.items()}
    found = fidelity(listed, {"truth": truth, "good": order, "bad": noise})
    assert set(found) == {"good", "bad"}
    for reward in REWARDS:
        assert all(x == pytest.approx(1) for x in found["good"][reward].values())
        assert abs(found["bad"][reward]["all"]) < 0.4
        assert abs(found["bad"][reward]["within a clip"]) < 0.4


def test_a_fault_that_a_model_does_not_see_is_named_and_one_that_truth_does_not_see_is_nobodys():
    listed, truth, _ = spoilt()
    rows = {name: [i for i, (other, _) in enumerate(listed) if other == name] for name in ("blur", "pose_jitter")}
    kept, model = ({reward: x.clone() for reward, x in truth.items()} for _ in range(2))
    for reward in REWARDS:
        kept[reward][rows["blur"]] = kept[reward][0].clone()  # truth: no change
        model[reward][rows["pose_jitter"]] = model[reward][0].clone()  # model: no change
    found = fidelity(listed, {"truth": kept, "model": model})["model"]
    assert all(math.isnan(found[reward]["fault: blur"]) for reward in REWARDS)
    assert all(found[reward]["fault: pose_jitter"] == 0 for reward in REWARDS)
    assert blind(found) == {reward: ["pose_jitter"] for reward in REWARDS}


def test_what_cannot_be_scored_does_not_count():
    listed, truth, _ = spoilt()
    holes = {reward: x.clone() for reward, x in truth.items()}
    for x in holes.values():
        x[2, 0] = torch.nan
    found = fidelity(listed, {"truth": truth, "model": holes})["model"]
    assert found["motion_smoothness"]["all"] == pytest.approx(1)


def test_depth_that_is_off_costs_what_it_is_off_by():
    """And nothing else: cameras and motion stay, and another seed is another error of the same size."""
    scene = make_clip(3, motion="orbit").geometry
    off = {seed: depth_off(scene, 0.03, seed) for seed in (1, 2)}
    check_geometry(off[1])
    for one in off.values():
        assert (one.depth / scene.depth).log().std() == pytest.approx(0.03, rel=1e-3)
        assert torch.equal(one.c2w, scene.c2w)
    assert not torch.equal(off[1].depth, off[2].depth)
    costs = [float(reprojection_consistency(depth_off(scene, share, 1))) for share in (0.0, *OFF.values())]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == pytest.approx(float(reprojection_consistency(scene)), abs=1e-6)


def test_versions_are_the_catalogue_without_what_no_pixel_shows():
    listed, make = versions(2)
    assert listed[0] == ("none", 0.0)
    assert {name for name, _ in listed[1:]} == set(PERTURBATIONS) - set(UNSEEN)
    jitter = [amount for name, amount in listed if name == "pose_jitter"]
    assert jitter == [0.05, 0.1, 0.15, 0.4, 1.6]
    clean, spoilt = make("none", 0.0), make("blur", 2.0)
    assert len(clean) == 2
    assert [clip.geometry.scene_flow.any().item() for clip in clean] == [False, True]
    assert not torch.equal(clean[0].video, spoilt[0].video)
    assert torch.equal(clean[0].geometry.depth, spoilt[0].geometry.depth)


def test_a_ratio_is_of_errors_whether_more_is_better_or_less():
    teacher = dict.fromkeys(BARS, 0.5)
    assert ratios(teacher, teacher) == dict.fromkeys(BARS, 1.0)
    worse = {name: 0.75 if sign < 0 else 0.25 for name, (_, _, sign) in BARS.items()}
    assert ratios(worse, teacher) == dict.fromkeys(BARS, 1.5)


def test_a_random_connector_has_the_same_numbers_in_another_order():
    connector = Connector(LatentSpec(2, 4, 8, (0.0, 0.0), (1.0, 1.0)), 3, mode="latent")
    before = connector.conv.weight.detach().clone()
    random_connector(connector)
    after = connector.conv.weight.detach()
    assert not torch.equal(after, before)
    assert torch.equal(after.flatten(1).sort(dim=1).values, before.flatten(1).sort(dim=1).values)
