"""The geometry model's school: exact lessons, losses that truth satisfies, measures with slow doubles, exact resume."""

from dataclasses import asdict, replace

import pytest
import torch
from scipy.stats import spearmanr

from geometry.backbone import HookedBackbone
from geometry.cameras import inverse, relative, unproject
from geometry.models.tiny import TinyConfig, call, parse, spec
from geometry.types import Geometry
from geometry.world import PERTURBATIONS, make_clips
from vggrpo.bootstrap.geometry_eval import auc, constant, measure, report, spearman
from vggrpo.bootstrap.geometry_loss import disagreement, moved, pose_loss, truth
from vggrpo.bootstrap.geometry_recipe import Batch, GeometryRecipe
from vggrpo.bootstrap.geometry_train import checkpoint_of, draw_batch, lessons_of, mirrored, start_run, train_step
from vggrpo.bootstrap.lesson import lesson
from vggrpo.bootstrap.training import save_training

SMALL = TinyConfig(encoder_layers=1, dim=48, pairs=(1, 1))
RECIPE = GeometryRecipe(model=SMALL, num_steps=4, batches=[Batch(0.5, 2, 3), Batch(1.0, 1, 4)], warmup=1)


@pytest.fixture(scope="module")
def lessons():
    return lessons_of(range(500, 516), 4, (0.0,))


def answer(lessons) -> Geometry:
    """The truth as a model would give it: in other units, and with other units for every clip."""
    unit = torch.linspace(0.5, 3, len(lessons))[:, None, None, None]
    c2w = lessons.c2w.clone()
    c2w[..., :3, 3] *= unit[:, 0]
    depth = lessons.depth.float() * unit
    flow = torch.einsum("btij,bthwj->bthwi", c2w[..., :3, :3], lessons.motion.float()) * unit[..., None]
    points = unproject(depth, lessons.intrinsics, c2w)
    return Geometry(c2w, lessons.intrinsics, depth, points, scene_flow=flow, flow_grid="frame")


def test_optical_flow_is_where_the_world_says_that_points_go():
    clip = make_clips([100, 101], frames=5, dynamic=True, supersample=1)
    pixels = torch.tensor([[10.5, 20.5], [32.5, 32.5], [40.5, 30.5], [20.5, 45.5]]).expand(2, -1, -1)
    ahead = lesson(clip, 1).flow[:, 0, 0].float()
    row, column = pixels[..., 1].long(), pixels[..., 0].long()
    found = ahead[torch.arange(2)[:, None], row, column]
    wanted = clip.track(pixels).pixels
    torch.testing.assert_close(found, wanted[:, 1] - wanted[:, 0], atol=0.01, rtol=0)


def test_the_flow_back_is_the_flow_ahead_of_the_clip_played_backwards():
    """Also on bodies that bounce, whose motion is not that of the frame before."""
    clip = make_clips([100, 104, 107], frames=4, dynamic=True, supersample=1)
    forwards, backwards = lesson(clip, 4), lesson(PERTURBATIONS["time_reversal"].apply(clip, 1.0, 0), 4)
    torch.testing.assert_close(forwards.flow[:, :-1, 1].flip(1), backwards.flow[:, :-1, 0], atol=0.01, rtol=0.002)
    assert not torch.allclose(forwards.flow[:, :-1, 0], -forwards.flow[:, :-1, 1], atol=0.1)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_mirrored_lesson_is_the_truth_of_a_mirrored_world(lessons, axis):
    """What stands still must be seen, in the mirrored cameras, where the mirrored flow says."""
    there = mirrored(lessons, axis)
    points = unproject(there.depth.float(), there.intrinsics, there.c2w)[:, 0] + torch.einsum(
        "bij,bhwj->bhwi", there.c2w[:, 0, :3, :3], there.motion[:, 0].float()
    )
    seen = torch.einsum(
        "bij,bhwj->bhwi", inverse(there.c2w)[:, 1, :3], torch.cat([points, torch.ones_like(points[..., :1])], -1)
    )
    focal = there.intrinsics[:, 0, 0, 0][:, None, None, None]
    u, v = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="xy")
    flow = focal * seen[..., :2] / seen[..., 2:] + 32 - torch.stack([u, v], -1)
    pooled = torch.nn.functional.avg_pool2d(flow.movedim(-1, 1), 4).movedim(1, -1)
    off = (pooled - there.flow[:, 0, 0].float()).norm(dim=-1)
    assert off.median() < 0.02
    assert (pooled - lessons.flow[:, 0, 0].float()).norm(dim=-1).median() > 0.1  # the control: unmirrored


def test_the_truth_costs_nothing_and_measures_perfect(lessons):
    wanted = truth(lessons)
    assert pose_loss(wanted.relative, wanted.relative) < 1e-5
    assert pose_loss(wanted.relative.roll(1, 0), wanted.relative) > 0.1
    numbers = measure(answer(lessons), lessons)
    assert max(numbers["rotation"], numbers["turning"]) < 0.05
    assert numbers["clip_rotation"] < 0.05
    assert numbers["direction"] < 0.1
    assert numbers["speed"] > 0.999
    assert numbers["abs_rel"] < 1e-3
    assert numbers["dynamic"] > 0.999


def test_what_stands_still_is_seen_where_later_cameras_have_it():
    """Against the world's own tracks; of what is no further than a depth that is asked for."""
    clip = make_clips([100, 101], frames=5, supersample=1)
    pixels = torch.tensor([[10.5, 60.5], [32.5, 32.5], [40.5, 50.5], [20.5, 45.5]]).expand(2, -1, -1)
    at, _ = moved(truth(lesson(clip, 4)), 4)
    row, column = pixels[..., 1].long(), pixels[..., 0].long()
    pick = torch.arange(2)[:, None], 0, row, column
    assert clip.geometry.valid[pick].all()
    torch.testing.assert_close(at[pick], clip.track(pixels).pixels[:, 4], atol=0.05, rtol=0)


def test_depth_that_is_wrong_in_the_same_way_throughout_agrees_with_itself(lessons):
    wanted = truth(lessons.map(lambda x: x[:4]))
    assert disagreement(wanted.log_depth, wanted, 2) == 0
    assert disagreement(wanted.log_depth + 0.3, wanted, 2) < 1e-6
    flicker = 0.1 * torch.arange(17).remainder(3).view(17, 1, 1)
    assert 0.09 < disagreement(wanted.log_depth + flicker, wanted, 2) < 0.21
    assert disagreement(wanted.log_depth + flicker, wanted, 3) < 1e-6
    assert disagreement(wanted.log_depth, wanted, 17) == 0


def test_a_constant_answer_measures_badly(lessons):
    numbers = measure(constant(lessons), lessons)
    assert numbers["turning"] > 0.25
    assert numbers["direction"] > 30
    assert abs(numbers["speed"]) < 0.3
    assert numbers["abs_rel"] > 0.25
    assert numbers["dynamic"] == 0.5


def test_ranks_agree_with_scipy_and_with_counting_pairs():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randint(5, (40,), generator=rng).float(), torch.rand(40, generator=rng)
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    label = torch.rand(40, generator=rng) < 0.4
    pairs = a[label][:, None] - a[~label][None]
    assert auc(a, label) == pytest.approx(((pairs > 0).float() + 0.5 * (pairs == 0)).mean().item())


def test_a_resumed_run_is_the_same_run(lessons, tmp_path):
    recipe = replace(RECIPE, out=str(tmp_path))
    straight, stopped = start_run(recipe), start_run(recipe)
    for run in (straight, stopped):
        train_step(run, recipe, lessons)
        train_step(run, recipe, lessons)
    save_training(checkpoint_of(recipe), stopped, asdict(recipe))
    resumed = start_run(recipe)
    assert resumed.step == 2
    for run in (straight, resumed):
        train_step(run, recipe, lessons)
    for a, b in zip(straight.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(a, b)
    assert straight.average.keys() == resumed.average.keys()
    assert all(torch.equal(straight.average[name], resumed.average[name]) for name in straight.average)
    assert resumed.plans == [[0, 4]]
    assert start_run(replace(recipe, num_steps=9)).plans == [[0, 4], [2, 9]]
    with pytest.raises(ValueError, match=r"made with lr 0\.0015 and the recipe says 0\.5"):
        start_run(replace(recipe, lr=0.5))


def test_what_is_frozen_stays_and_all_else_learns(lessons, tmp_path):
    recipe = replace(RECIPE, out=str(tmp_path), frozen=["encoder"], model=replace(SMALL, adjust=True))
    run = start_run(recipe)
    before = {name: weight.clone() for name, weight in run.network.state_dict().items()}
    for _ in range(2):
        train_step(run, recipe, lessons)
    changed = {name for name, weight in run.network.state_dict().items() if not torch.equal(weight, before[name])}
    assert not any(name.startswith("encoder.") for name in changed)
    assert {"trust", "correlation.to_pixels.weight"} <= changed
    with pytest.raises(ValueError, match="nothing to freeze at encodr"):
        start_run(replace(recipe, frozen=["encodr"]))


def test_a_batch_can_be_learnt_by_heart(lessons, tmp_path):
    """Step 0 over and over: the same windows, colours and noise."""
    recipe = replace(RECIPE, lr=5e-4, out=str(tmp_path))
    run, history = start_run(recipe), []
    for _ in range(20):
        run.step = 0
        history.append(train_step(run, recipe, lessons))
    for name in ("pose", "depth", "flow"):
        assert history[-1][name] < 0.9 * history[0][name], name


def test_batches_are_drawn_from_their_generator_alone(lessons):
    first, again, other = (draw_batch(lessons, Batch(1.0, 2, 4), torch.Generator().manual_seed(k)) for k in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(first[1].c2w[:, 0], torch.eye(4).expand(2, 4, 4))
    assert relative(first[1].c2w).shape == (2, 3, 4, 4)


def test_the_report_tells_kinds_apart(lessons, tmp_path):
    run = start_run(replace(RECIPE, out=str(tmp_path)))
    model = HookedBackbone(run.network, spec(SMALL), call, parse)
    found = report(model, lessons.map(lambda x: x[6:9]), ["pan", "orbit", "static"])
    assert {
        "all",
        "bodies stand",
        "bodies move",
        "camera: static",
        "camera: pan",
        "control: frozen",
        "control: shuffled",
    } <= set(found)
    assert found["control: frozen"]["rotation"] > 0.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_steps": 0}, "num_steps must be >= 1"),
        ({"batches": [Batch(0.5, 1, 3)]}, "ends with 1.0"),
        ({"batches": [Batch(1.0, 1, 1)]}, "2 to 17 frames"),
        ({"hold": 1.0}, "hold in"),
    ],
)
def test_a_bad_recipe_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        GeometryRecipe(**change)
