"""Distillation lowers every output's distance on clips it did not see, and leaves the teacher as it was, to the bit."""

import dataclasses
import itertools
import math
import random

import pytest
import torch

from geometry.cameras import rigid, so3_exp
from geometry.distance import OUTPUTS, OutputWeights, output_distances
from geometry.distil import DistilConfig, add_lora, distil, distil_step, learning_rate, start, trained
from geometry.latent import Connector
from geometry.stitch import Sample, rank_layers, stitch, student, teach
from geometry.types import Geometry
from geometry.world import make_clip, make_clips
from tests.geometry.standins import LinearVAE, largest_difference, omegalike, vgglike

SHORT = DistilConfig(
    steps=60, lr=1e-3, warmup=5, rank=8, alpha=8, weights=OutputWeights(4.0, 1.0, 1.0, 4.0, 1.0, 4.0, 4.0)
)


def sample(seeds, vae):
    clip = make_clips(seeds, frames=5, size=(32, 32), supersample=1, dynamic=True)
    return Sample(vae.encode(clip.video), clip.video)


@pytest.fixture(scope="module")
def vae():
    return LinearVAE()


@pytest.fixture(scope="module")
def calibration(vae):
    return [sample(range(8 * k, 8 * k + 8), vae) for k in range(30)]


@pytest.fixture(scope="module")
def held_out(vae):
    first = random.SystemRandom().randrange(10**3, 10**6)
    print(f"held-out clips {first} to {first + 47}")
    return [sample(range(first, first + 48), vae)]


def stitched(backbone, vae, samples, **how):
    """Fitted on a few clips only, so that there is something left to learn."""
    return stitch(backbone, Connector(vae.spec, backbone.spec.dim, **how), samples[:3], backbone.spec.stitch_points[:1])


@pytest.mark.parametrize(("make", "how"), [(vgglike, {"mode": "latent"}), (omegalike, {"mode": "latent", "split": 2})])
def test_distillation_lowers_every_output_on_other_clips_and_the_teacher_stays(make, how, vae, calibration, held_out):
    torch.manual_seed(0)
    backbone = make(seed=2)
    models = stitched(backbone, vae, calibration, **how)
    (model,) = models.values()
    weights = {name: p.clone() for name, p in backbone.named_parameters()}
    (before,) = rank_layers(models, held_out)
    truth, said = backbone.forward_rgb(held_out[0].video), teach(model, held_out[0])
    records = list(distil(model, itertools.cycle(calibration), SHORT))
    (after,) = rank_layers(models, held_out)
    assert set(after.distances) == set(OUTPUTS)
    for output, value in after.distances.items():
        assert value < before.distances[output], (output, before.distances, after.distances)
    assert after.total < 0.95 * before.total
    # The teacher: what it says, and every weight it had, under the name it has now.
    assert largest_difference(teach(model, held_out[0]), said) == 0.0
    kept = {name.replace(".base_layer", ""): p for name, p in backbone.named_parameters() if "lora_" not in name}
    assert kept.keys() == weights.keys()
    assert all(torch.equal(kept[name], value) for name, value in weights.items())
    assert largest_difference(backbone.forward_rgb(held_out[0].video), truth) > 1e-3, "adapters are on again"
    assert all(p.requires_grad for p in trained(model).values())
    assert len(records) == 60
    assert set(records[0]) == {*OUTPUTS, "loss", "gradient", "lr"}
    assert all(math.isfinite(x) for record in records for x in record.values())
    record = records[0]
    total = sum(getattr(SHORT.weights, name) * record[name] for name in OUTPUTS)
    assert record["loss"] == pytest.approx(total, rel=1e-5)


def test_distilling_towards_clips_that_do_not_belong_to_the_latents_does_not_help(vae, calibration, held_out):
    """The control: the same steps, each clip's teacher looking at another clip."""
    lost = []
    for shift in (0, 3):
        torch.manual_seed(0)
        models = stitched(omegalike(), vae, calibration, mode="latent", split=2)
        shuffled = [s._replace(video=s.video.roll(shift, 0)) for s in calibration]
        list(distil(next(iter(models.values())), shuffled, dataclasses.replace(SHORT, steps=30)))
        lost.append(rank_layers(models, held_out)[0].total)
    assert lost[1] > 1.2 * lost[0], lost


def test_adapters_start_as_nothing_and_are_where_the_tail_is(vae, calibration, held_out):
    (model,) = stitched(vgglike(), vae, calibration[:1]).values()
    with torch.no_grad():
        before = student(model, held_out[0])
    add_lora(model, rank=4, alpha=8)
    with torch.no_grad():
        assert largest_difference(student(model, held_out[0]), before) == 0.0
    adapted = {name for name, _ in model.backbone.module.named_parameters() if "lora_" in name}
    for block in model.backbone.spec.upto(model.point):
        assert not any(name.startswith(f"{block}.") for name in adapted)
    for block in model.backbone.spec.after(model.point):
        assert any(name.startswith(f"{block}.") for name in adapted)
    assert not any(name.startswith(("heads", "encoder.embeddings")) for name in adapted)
    named = vgglike()
    named.spec = dataclasses.replace(named.spec, heads=("heads",))
    (other,) = stitched(named, vae, calibration[:1]).values()
    add_lora(other, rank=4, alpha=8)
    assert {name for name in trained(other) if ".heads." in name} == {
        f"backbone.module.heads.{head}.lora_{side}.default.weight" for head in ("camera", "dense") for side in "AB"
    }
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(trained(model))
    assert {"connector.conv.weight", "connector.conv.bias", "prefix"} < set(trained(model))
    with pytest.raises(ValueError, match="has LoRA adapters already"):
        add_lora(model, rank=4, alpha=8)


def test_recomputing_the_tail_trains_the_same(vae, calibration):
    runs = []
    for recompute in (False, True):
        (model,) = stitched(vgglike(), vae, calibration[:1]).values()
        model.recompute = recompute
        torch.manual_seed(0)
        runs.append([r["loss"] for r in distil(model, calibration[:3], DistilConfig(steps=3, warmup=0, rank=4))])
    assert runs[0] == runs[1]


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_reported(vae, calibration):
    (model,) = stitched(omegalike(), vae, calibration[:1], mode="latent", split=2).values()
    broken = calibration[0]._replace(z=calibration[0].z.clone())
    broken.z[0, 0, 0, 0, 0] = torch.nan
    training = distil(model, [calibration[0], broken, calibration[1]], DistilConfig(steps=3, warmup=0, rank=4))
    next(training)
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    assert not math.isfinite(next(training)["gradient"])
    assert all(torch.equal(p, before[name]) for name, p in trained(model).items())
    assert math.isfinite(next(training)["gradient"])
    assert not all(torch.equal(p, before[name]) for name, p in trained(model).items())


def test_the_gradient_is_clipped_and_its_norm_before_that_is_recorded(vae, calibration):
    (model,) = stitched(omegalike(), vae, calibration, mode="latent", split=2).values()
    config = DistilConfig(steps=2, warmup=0, rank=4, clip=1e-3)
    record = next(distil(model, calibration, config))
    norm = torch.stack([p.grad.norm() for p in trained(model).values() if p.grad is not None]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)
    assert record["gradient"] > 0.1


def test_the_connector_may_learn_more_slowly_than_the_adapters(vae, calibration):
    """Adam's first step is the learning rate itself, whatever the gradient."""
    (model,) = stitched(omegalike(), vae, calibration[:1], mode="latent", split=2).values()
    torch.manual_seed(0)
    config = DistilConfig(steps=1, warmup=0, rank=4, lr=1e-3, connector=0.1)
    optimizer = start(model, config)
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    distil_step(model, calibration[0], optimizer, 0, config)
    moved = {name: float((p - before[name]).abs().max()) for name, p in trained(model).items()}
    assert moved["connector.conv.weight"] == pytest.approx(1e-4, rel=0.01)
    assert max(x for name, x in moved.items() if "lora_B" in name) == pytest.approx(1e-3, rel=0.01)


def test_what_a_matched_module_puts_out_is_asked_for_as_well(vae, calibration, held_out):
    """Where only a module behind the stitch is asked for, it comes closer to the teacher's on other clips."""
    gaps = []
    for weight in (0.0, 1.0):
        backbone = vgglike(seed=2)
        backbone.spec = dataclasses.replace(backbone.spec, matched=("frame_block",))
        (model,) = stitched(backbone, vae, calibration, mode="latent").values()
        torch.manual_seed(0)
        nothing = OutputWeights(*[0.0] * len(OUTPUTS))
        config = DistilConfig(steps=15, lr=2e-3, warmup=0, rank=4, weights=nothing, matched=weight)
        records = list(distil(model, calibration, config))
        assert records[0]["loss"] == pytest.approx(weight * records[0]["frame_block"], rel=1e-5)
        gaps.append(distil_step(model, held_out[0], start(model, config), 0, config)["frame_block"])
    assert gaps[1] < 0.97 * gaps[0]


def test_the_learning_rate_warms_up_and_ends_near_zero():
    config = DistilConfig(steps=100, warmup=10)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1.0 == max(rates)
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[-1] < 1e-3
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_samples_that_run_out_and_settings_out_of_range_are_refused(vae, calibration):
    (model,) = stitched(omegalike(), vae, calibration[:1], mode="latent", split=2).values()
    with pytest.raises(ValueError, match="ran out after 2 of 3 steps"):
        list(distil(model, calibration[:2], DistilConfig(steps=3, warmup=0, rank=4)))
    for wrong in (
        {"steps": 0},
        {"warmup": 1000},
        {"rank": 0},
        {"lr": 0.0},
        {"connector": 0.0},
        {"matched": -1.0},
        {"clip": -1.0},
    ):
        with pytest.raises(ValueError, match="must be >"):
            DistilConfig(**wrong)
    with pytest.raises(ValueError, match="must be >= 0"):
        OutputWeights(points=-1.0)


# What is minimised: closed forms.


def scene():
    geometry = make_clip(3, frames=4, size=(12, 16), dynamic=True, motion="arc").geometry
    return Geometry(**(vars(geometry) | {"confidence": torch.full_like(geometry.depth, 0.5)}))


def changed(geometry, **fields):
    return Geometry(**(vars(geometry) | fields))


def test_distances_are_what_was_done():
    truth = scene()
    unit = truth.depth[truth.valid].median()
    assert all(float(x) < 1e-6 for x in output_distances(truth, truth).values())
    angle = torch.tensor([0.0, 0.0, 0.03])
    turned = rigid(so3_exp(angle), torch.zeros(3))
    moved = truth.c2w.clone()
    moved[..., 0, 3] += 0.2 * unit
    further = truth.depth * 1.1
    cases = {
        "rotation": (changed(truth, c2w=truth.c2w @ turned), 0.03),
        "translation": (changed(truth, c2w=moved), 0.2),
        "log_depth": (changed(truth, depth=further), math.log(1.1)),
        "focal": (changed(truth, intrinsics=truth.intrinsics * torch.tensor([1.2, 1.2, 1.0])[:, None]), math.log(1.2)),
        "points": (changed(truth, points=truth.points + 0.1 * unit * torch.tensor([1.0, 0, -1])), 0.2),
        "scene_flow": (changed(truth, scene_flow=truth.scene_flow + 0.1 * unit), 0.3),
        "confidence": (changed(truth, confidence=truth.confidence + 0.25), 0.25),
    }
    assert set(cases) == set(OUTPUTS)
    for name, (other, expected) in cases.items():
        found = output_distances(other, truth)
        assert float(found.pop(name)) == pytest.approx(expected, rel=1e-3), name
        assert all(float(x) < 1e-5 for x in found.values()), name


def test_distances_do_not_depend_on_the_unit_but_a_student_of_the_wrong_scale_pays():
    truth = scene()
    other = changed(truth, points=truth.points * 1.1, depth=truth.depth * 1.05, c2w=truth.c2w)

    def scaled(geometry, factor):
        c2w = geometry.c2w.clone()
        c2w[..., :3, 3] *= factor
        lengths = {name: getattr(geometry, name) * factor for name in ("depth", "points", "scene_flow")}
        return changed(geometry, c2w=c2w, **lengths)

    small, large = output_distances(other, truth), output_distances(scaled(other, 7.0), scaled(truth, 7.0))
    for name, value in small.items():
        torch.testing.assert_close(large[name], value, rtol=1e-4, atol=1e-6)
    wrong = output_distances(scaled(truth, 2.0), truth)
    assert wrong["log_depth"] == pytest.approx(math.log(2), rel=1e-4)
    assert all(wrong[name] > 1e-4 for name in ("translation", "points", "scene_flow"))


def test_pixels_that_the_teacher_does_not_know_or_trust_count_nothing():
    truth = scene()
    some = truth.valid & (torch.rand(truth.depth.shape, generator=torch.Generator().manual_seed(0)) < 0.5)
    teacher = changed(truth, valid=some)
    depth = torch.where(some, truth.depth, torch.full_like(truth.depth, torch.nan)).requires_grad_()
    points = torch.where(some[..., None], truth.points, torch.full_like(truth.points, 1e9))
    beyond = torch.where(some[..., None], truth.points, torch.full_like(truth.points, torch.inf))
    found = output_distances(changed(truth, depth=depth, points=beyond), teacher)
    assert found["log_depth"] == 0.0
    assert found["points"] == 0.0
    found["log_depth"].backward()
    assert depth.grad.isfinite().all()
    sure = changed(truth, confidence=some.float(), valid=torch.ones_like(some))
    torch.testing.assert_close(output_distances(changed(sure, points=points), sure)["points"], torch.tensor(0.0))


def test_only_what_both_have_is_compared(as_users_run):
    truth = scene()
    bare = changed(truth, confidence=None, scene_flow=None, flow_grid=None)
    found = output_distances(bare, bare)
    assert set(found) == set(OUTPUTS) - {"confidence", "scene_flow"}
    assert OutputWeights().total(found) == 0.0
    with pytest.raises(ValueError, match="only one of the two geometries has scene_flow"):
        output_distances(bare, truth)
    with pytest.raises(ValueError, match="geometries of"):
        output_distances(truth, truth.map(lambda x: x[1:]))
