"""Cameras of a whole clip: exact on exact sightings, steadier for what is far apart, with the solution's gradient."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from geometry.cameras import inverse, pixel_grid, project, relative, rigid, so3_exp, so3_log
from geometry.models import path
from geometry.models.correlation import SPANS, Correspondence, Spans
from geometry.models.path import Sightings, solve_path
from geometry.models.sightings import clip_cameras, edges
from geometry.world import make_clips
from vggrpo.bootstrap.lesson import lesson

NEIGHBOURS = [(i, i + 1) for i in range(4)] + [(i + 1, i) for i in range(4)]
FURTHER = [(0, 2), (1, 3), (2, 4), (0, 4)]


def scene(seed, edges, tokens=40, c2w=None):
    """Cameras (if not given five random ones, twice), depths and what is seen along the edges, in double precision."""
    rng = torch.Generator().manual_seed(seed)
    B, T = (2, 5) if c2w is None else c2w.shape[:2]
    rays = torch.rand(B, T, tokens, 2, generator=rng, dtype=torch.float64) - 0.5
    depth = 1 + 3 * torch.rand(B, T, tokens, generator=rng, dtype=torch.float64)
    if c2w is None:
        twist = 0.06 * torch.randn(B, T, 6, generator=rng, dtype=torch.float64)
        twist[:, 0] = 0
        c2w = rigid(so3_exp(twist[..., :3]), twist[..., 3:])
    source, target = torch.tensor(edges).unbind(1)
    points = (torch.cat([rays, torch.ones_like(rays[..., :1])], -1) * depth[..., None])[:, source]
    motion = inverse(c2w)[:, target] @ c2w[:, source]
    moved = points @ motion[..., :3, :3].mT + motion[..., None, :3, 3]
    root = torch.randn(B, len(edges), tokens, 2, 2, generator=rng, dtype=torch.float64)
    return c2w, depth, Sightings(source, target, rays, moved[..., :2] / moved[..., 2:], root @ root.mT)


def still(c2w):
    return torch.eye(4, dtype=c2w.dtype).expand_as(c2w)


def degrees(found, wanted):
    return torch.rad2deg(so3_log(wanted[..., :3, :3].mT @ found[..., :3, :3]).norm(dim=-1))


def jolt(c2w):
    """Mean change of the motion from frame to frame, radians."""
    return so3_log(relative(c2w)[..., :3, :3]).diff(dim=1).norm(dim=-1).mean()


@pytest.mark.parametrize("robust", [True, False])
def test_exact_sightings_give_the_exact_cameras_in_any_unit(robust):
    c2w, depth, seen = scene(0, NEIGHBOURS + FURTHER)
    found = solve_path(depth, seen, still(c2w), steps=9, robust=robust)
    torch.testing.assert_close(found, c2w, atol=1e-6, rtol=0)
    assert torch.equal(found[:, 0], torch.eye(4, dtype=torch.float64).expand(2, 4, 4))
    larger = solve_path(7 * depth, seen, still(c2w), steps=9, robust=robust)
    torch.testing.assert_close(larger[..., :3, 3], 7 * c2w[..., :3, 3], atol=1e-5, rtol=0)
    weighed = solve_path(depth, seen._replace(information=1e3 * seen.information), still(c2w), steps=9, robust=robust)
    torch.testing.assert_close(weighed, c2w, atol=1e-6, rtol=0)


@pytest.mark.parametrize("what", ["depth", "there", "rays", "information"])
def test_its_gradient_is_that_of_the_solution(what):
    """One differentiable step, against finite differences of the whole solution, which starts elsewhere."""
    c2w, depth, seen = scene(1, NEIGHBOURS + FURTHER)
    rng = torch.Generator().manual_seed(2)
    # With noise-free sightings the information has no say at all; what Gauss-Newton leaves out grows with the noise.
    there = seen.there + 2e-5 * torch.randn(seen.there.shape, generator=rng, dtype=torch.float64)
    given = {"depth": depth, "there": there, "rays": seen.rays, "information": seen.information}
    probe = torch.randn(2, 5, 4, 4, generator=rng, dtype=torch.float64)
    direction = torch.randn(given[what].shape, generator=rng, dtype=torch.float64)
    if what == "information":
        direction = direction + direction.mT

    def value(x):
        now = given | {what: x}
        parts = {name: now[name] for name in ("rays", "there", "information")}
        found = solve_path(now["depth"], seen._replace(**parts), still(c2w), steps=12, robust=False, prior=False)
        return (found * probe).sum()

    x = given[what].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(x), x)
    step = 1e-3 if what == "information" else 1e-5
    ahead, back = value(x.detach() + step * direction), value(x.detach() - step * direction)
    wanted = (ahead - back) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(wanted.item(), rel=0.02)
    assert (gradient * direction.flip(2)).sum().item() != pytest.approx(wanted.item(), rel=0.1)  # the control


def test_its_gradient_knows_of_the_prior(monkeypatch):
    """As above, with widths and s^2 held, which carry no gradient; the control is the gradient without the prior."""
    c2w, depth, seen = scene(1, NEIGHBOURS + FURTHER)
    take, rng = path._step, torch.Generator().manual_seed(2)
    monkeypatch.setattr(path, "_widths", lambda w2c, _: torch.full((2, 2, 6), 0.05, dtype=w2c.dtype))
    monkeypatch.setattr(path, "_step", lambda *x: take(*x)._replace(error=torch.full((2,), 0.01, dtype=x[0].dtype)))
    probe = torch.randn(2, 5, 4, 4, generator=rng, dtype=torch.float64)
    direction = torch.randn(seen.there.shape, generator=rng, dtype=torch.float64)

    def value(there, prior=True):
        found = solve_path(depth, seen._replace(there=there), still(c2w), steps=12, robust=False, prior=prior)
        return (found * probe).sum()

    there = seen.there.clone().requires_grad_()
    known, without = (
        (torch.autograd.grad(value(there, prior), there)[0] * direction).sum().item() for prior in (True, False)
    )
    ahead, back = (value(seen.there + step * direction).item() for step in (1e-5, -1e-5))
    wanted = (ahead - back) / 2e-5
    assert known == pytest.approx(wanted, rel=0.02)
    assert without != pytest.approx(wanted, rel=0.5)


def test_frames_further_apart_hold_the_path_together():
    """Sightings with noise: the far end is worse without them, and worst where neighbours are chained one by one."""
    c2w, depth, seen = scene(3, NEIGHBOURS + FURTHER)
    noise = 4e-3 * torch.randn(seen.there.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    noisy = seen._replace(there=seen.there + noise, information=torch.eye(2).double().expand_as(seen.information))
    n = len(NEIGHBOURS)
    near = Sightings(noisy.source[:n], noisy.target[:n], noisy.rays, noisy.there[:, :n], noisy.information[:, :n])
    with_far, without = (solve_path(depth, x, still(c2w), steps=8, prior=False) for x in (noisy, near))
    assert degrees(with_far, c2w)[:, 1:].mean() < 0.85 * degrees(without, c2w)[:, 1:].mean()


def test_shake_is_found_and_bent_pictures_are_not_taken_for_it(monkeypatch):
    """A camera that shakes, seen as it is, keeps its shake; a steady one, in frames that are bent, stays steady."""
    shaken, depth, seen = scene(7, NEIGHBOURS + FURTHER)
    noise = 1e-4 * torch.randn(seen.there.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    clear = seen._replace(there=seen.there + noise)
    kept = solve_path(depth, clear, still(shaken), steps=9)
    assert degrees(kept, shaken).max() < 0.05 * degrees(still(shaken), shaken).max()

    calm = still(shaken)
    points = torch.cat([seen.rays, torch.ones_like(seen.rays[..., :1])], -1)[:, seen.source]
    rng = torch.Generator().manual_seed(9)
    slope = 0.05 * torch.randn(2, len(seen.source), 2, 2, generator=rng, dtype=torch.float64)
    bend = 0.01 * torch.randn(2, len(seen.source), 1, 2, generator=rng, dtype=torch.float64)
    bent = seen._replace(there=points[..., :2] + bend + points[..., :2] @ slope)
    found = {"naive": jolt(solve_path(depth, bent, calm, steps=9, prior=False))}
    for shared in (0.5, path.SHARED, 5 * path.SHARED):
        monkeypatch.setattr(path, "SHARED", shared)
        found[shared] = jolt(solve_path(depth, bent, calm, steps=9))
    steadier = list(found.values())
    assert all(more > 1.1 * less for more, less in pairwise(steadier)), found
    assert steadier[2] < 0.5 * steadier[0]


LONG = [(i, i + span) for span in (1, 2, 4) for i in range(12 - span)]
"""Edges of twelve frames."""


def test_each_axis_keeps_the_sway_that_the_clip_shows(monkeypatch):
    """Nodding stays, noise about the pan goes; the control has the pan's width for all axes, and loses the nodding."""
    t, rng = torch.arange(12).double(), torch.Generator().manual_seed(11)
    turn = torch.stack([0.02 * torch.sin(2 * t), 0.03 * t, 0 * t], dim=-1)
    c2w = rigid(so3_exp(turn), torch.zeros(12, 3).double())[None]
    _, depth, seen = scene(3, LONG, c2w=c2w)
    error = 3e-3 * torch.randn(1, len(LONG), 1, 2, generator=rng, dtype=torch.float64)  # of all tokens: as a turn
    error = error + 0.01 * torch.randn(seen.there.shape, generator=rng, dtype=torch.float64)
    seen = seen._replace(there=seen.there + error, information=torch.eye(2).double().expand_as(seen.information))
    naive, found = (solve_path(depth, seen, still(c2w), prior=x) for x in (False, True))
    monkeypatch.setattr(path, "_widths", lambda w2c, _: torch.full((1, 2, 6), 1e-3, dtype=w2c.dtype))
    fixed = solve_path(depth, seen, still(c2w))

    def change(poses):
        return so3_log(relative(poses)[..., :3, :3]).diff(dim=1)[0]

    wanted = change(c2w)
    shares = {name: (change(x)[:, 0] @ wanted[:, 0]) / (wanted[:, 0] @ wanted[:, 0])
              for name, x in (("found", found), ("fixed", fixed))}  # fmt: skip
    assert shares["found"] > 0.9 > 0.7 > shares["fixed"], shares
    off = [(change(x) - wanted)[:, 1:].norm() for x in (naive, found)]
    assert off[1] < 0.7 * off[0], off


def test_a_still_axis_has_no_share_in_what_is_seen():
    """A sideways move over little relief looks like a turn, nearly: the turn is left out where it is not needed."""
    c2w, rng = still(torch.empty(1, 12, 4, 4).double()).clone(), torch.Generator().manual_seed(12)
    c2w[:, :, 0, 3] = 0.05 * torch.arange(12)
    _, depth, seen = scene(3, LONG, c2w=c2w)
    seen = seen._replace(information=torch.eye(2).double().expand_as(seen.information))
    wrong = depth * (0.05 * torch.randn(depth.shape, generator=rng, dtype=torch.float64)).exp()
    naive, found = (degrees(solve_path(wrong, seen, still(c2w), prior=x), c2w)[0, -1] for x in (False, True))
    assert found < 0.4 * naive, (found, naive)


def test_the_priors_equations_are_those_of_its_sum():
    """Gradient by autograd of |v / sigma|^2 + |a / sigma|^2 over small motions."""
    w2c, rng = inverse(scene(2, NEIGHBOURS)[0]), torch.Generator().manual_seed(1)
    width = 0.01 + torch.rand(2, 2, 6, dtype=torch.float64, generator=rng)
    small = torch.zeros(2, 4, 6, dtype=torch.float64, requires_grad=True)
    (velocity, _), (acceleration, _) = path._motions(path._moved(w2c, small))
    total = (velocity / width[:, :1]).square().sum() + (acceleration / width[:, 1:]).square().sum()
    (wanted,) = torch.autograd.grad(total, small)
    normal, push = path._prior(w2c, width)
    off = (-2 * push[:, 6:].unflatten(1, (4, 6)) - wanted).norm() / wanted.norm()
    assert off < 5e-3  # second order in turns of a tenth
    probe = torch.randn(2, 24, generator=rng, dtype=torch.float64)
    slopes = [slope[..., 6:] for _, slope in path._motions(w2c)]
    ahead = [(slope @ probe[:, None, :, None])[..., 0] / width[:, k, None] for k, slope in enumerate(slopes)]
    bent = (probe[:, None] @ normal[:, 6:, 6:] @ probe[..., None]).flatten()
    torch.testing.assert_close(bent, sum(x.square().flatten(1).sum(1) for x in ahead))


def test_widths_are_what_samples_of_the_cameras_have():
    """The expectation step, against cameras drawn from the covariance."""
    c2w, _, _ = scene(2, NEIGHBOURS)
    w2c = inverse(c2w)
    rng = torch.Generator().manual_seed(3)
    root = 0.02 * torch.randn(2, 24, 24, generator=rng, dtype=torch.float64) / 24**0.5
    draws = root @ torch.randn(2, 24, 4000, generator=rng, dtype=torch.float64)
    square = torch.zeros(2, 2, 6, dtype=torch.float64)
    for draw in draws.unbind(-1):
        moved = path._motions(path._moved(w2c, draw.unflatten(1, (4, 6))))
        square += torch.stack([motion.square().mean(1) for motion, _ in moved], dim=1) / 4000
    found = path._widths(w2c, root @ root.mT)
    torch.testing.assert_close(found, square.sqrt(), rtol=0.02, atol=0)
    at_rest = path._widths(w2c, torch.zeros_like(root))
    assert (at_rest < 0.99 * found).all()
    assert (path._widths(inverse(still(c2w)), torch.zeros_like(root)) == path.NARROWEST).all()


def test_what_moves_by_itself_loses_its_say():
    c2w, depth, seen = scene(5, NEIGHBOURS + FURTHER)
    there = seen.there.clone()
    there[:, :, :8, 0] += 0.1
    astray = seen._replace(there=there)
    robust, naive = (solve_path(depth, astray, still(c2w), steps=8, robust=x) for x in (True, False))
    assert degrees(robust, c2w).max() < 0.25 * degrees(naive, c2w).max()


def test_without_sightings_the_path_stays_where_it_starts():
    c2w, depth, seen = scene(6, NEIGHBOURS)
    none = torch.zeros(0, dtype=torch.long)
    nothing = Sightings(none, none, seen.rays, seen.there[:, :0], seen.information[:, :0])
    assert torch.equal(solve_path(depth, nothing, c2w), c2w)


@pytest.mark.parametrize("frames", [2, 5])
def test_true_displacements_and_depth_give_the_worlds_cameras(frames):
    clip = make_clips(range(700, 703), frames=frames, supersample=1, size=(48, 64))
    world, truth = clip.geometry, lesson(clip, 4)
    flow = truth.flow[:, :-1].float()
    sources, targets, flows = [torch.zeros(0, dtype=torch.long)], [torch.zeros(0, dtype=torch.long)], []
    for span in (span for span in SPANS if span < frames):
        i = torch.arange(frames - span)
        at, _ = project(world.points[:, i], world.intrinsics[:, i], world.c2w[:, i + span])
        moved = (at - pixel_grid(48, 64, at)).flatten(0, 1).movedim(-1, 1)
        flows.append(F.avg_pool2d(moved, 4).movedim(1, -1).unflatten(0, (3, len(i))))
        sources.append(i)
        targets.append(i + span)
    far = torch.cat([flow.new_zeros(3, 0, 12, 16, 2), *flows], dim=1)

    def alike(flow):
        return torch.eye(2).expand(*flow.shape, 2)

    spans = Spans(torch.cat(sources), torch.cat(targets), far, far[..., 0] * 0, alike(far))
    pair = Correspondence(flow, flow, flow[..., 0] * 0, alike(flow), torch.zeros(3, frames, 1, 48, 64), spans)
    log_depth = F.avg_pool2d(world.depth, 4).log()
    weight = torch.zeros(3, frames - 1, 2, 12, 16)
    start = torch.eye(4).expand(3, frames, 4, 4)
    apart = torch.zeros(len(SPANS))
    found = clip_cameras(edges(pair, weight, apart), log_depth, world.intrinsics, 4, start)
    assert degrees(found, world.c2w).max() < 0.1
    torch.testing.assert_close(found[..., :3, 3], world.c2w[..., :3, 3], atol=0.02, rtol=0)
    if frames == 5:  # the control: the same displacements along other edges
        wrong = pair._replace(spans=spans._replace(flow=spans.flow.flip(1)))
        astray = clip_cameras(edges(wrong, weight, apart), log_depth, world.intrinsics, 4, start)
        assert degrees(astray, world.c2w).max() > 0.1
