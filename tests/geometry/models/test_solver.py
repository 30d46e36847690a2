"""Cameras from correspondence and depth: the world's truth goes in, the world's cameras come out."""

import pytest
import torch
import torch.nn.functional as F

from geometry.cameras import inverse, pixel_grid, relative, rigid, so3_exp, so3_log
from geometry.models.solver import chain, solve_motion, solve_relative, triangulate
from geometry.world import make_clips
from vggrpo.bootstrap.lesson import lesson

PATCH = 4


def rotation_error(found, wanted):
    return torch.rad2deg(so3_log(wanted[..., :3, :3].mT @ found[..., :3, :3]).norm(dim=-1))


def equally(depth):
    """Every point the same say, in both directions."""
    return torch.eye(2, dtype=depth.dtype).expand(*depth.shape, 2, 2)


def observed(seeds, *, dynamic):
    """Depth, rays, their correspondences, focal length, poses and motion masks of a batch, one ray per token."""
    clip = make_clips(seeds, frames=9, dynamic=dynamic, supersample=1)
    truth = lesson(clip, 1)
    flow = truth.flow[:, :-1, :, PATCH // 2 :: PATCH, PATCH // 2 :: PATCH].double()
    scene = clip.geometry
    depth = scene.depth[..., PATCH // 2 :: PATCH, PATCH // 2 :: PATCH].double()
    moving = truth.dynamic[..., PATCH // 2 :: PATCH, PATCH // 2 :: PATCH]
    focal = scene.intrinsics[:, :-1, 0, 0].double()
    pixels = pixel_grid(64, 64, depth)[PATCH // 2 :: PATCH, PATCH // 2 :: PATCH] - 32
    rays = (pixels / focal[..., None, None, None]).flatten(2, 3)
    there = rays[:, :, None] + (flow / focal[..., None, None, None, None]).flatten(3, 4)
    both = torch.stack([depth[:, :-1], depth[:, 1:]], dim=2).flatten(3)
    masks = torch.stack([moving[:, :-1], moving[:, 1:]], dim=2).flatten(3)
    return both, rays, there, scene.c2w.double(), masks


def test_true_flow_and_depth_give_the_true_cameras():
    depth, rays, there, c2w, _ = observed(range(700, 708), dynamic=False)
    found, _ = solve_relative(depth, rays, there, equally(depth), steps=6)
    # The flow of a lesson is kept in half precision: 2^-11 of its size in pixels.
    assert rotation_error(found, relative(c2w)).max() < 5e-3
    path = chain(found)
    torch.testing.assert_close(path[:, -1, :3, 3], c2w[:, -1, :3, 3], atol=5e-3, rtol=0)
    assert rotation_error(path[:, -1], c2w[:, -1]).max() < 0.02


def test_exact_correspondence_is_solved_to_machine_precision():
    rng = torch.Generator().manual_seed(0)
    source = torch.rand(64, 2, generator=rng, dtype=torch.float64) - 0.5
    depth = 1 + 3 * torch.rand(64, generator=rng, dtype=torch.float64)
    wanted = rigid(so3_exp(torch.tensor([0.02, -0.05, 0.01]).double()), torch.tensor([0.1, -0.05, 0.2]).double())
    moved = torch.cat([source, torch.ones(64, 1)], 1) * depth[:, None] @ wanted[:3, :3].T + wanted[:3, 3]
    target = moved[:, :2] / moved[:, 2:]
    found = solve_motion(depth, source, target, equally(depth), steps=10)
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=0)
    scaled = solve_motion(7 * depth, source, target, equally(depth), steps=10)
    torch.testing.assert_close(scaled[:3, 3], 7 * wanted[:3, 3], atol=1e-8, rtol=0)
    nearness, parallax, off = triangulate(wanted, source, target)
    seen = parallax > 1e-3
    torch.testing.assert_close(1 / nearness[seen], depth[seen], atol=1e-9, rtol=1e-6)
    assert off.max() < 1e-12


def test_moving_bodies_mislead_it_unless_they_are_masked():
    depth, rays, there, c2w, moving = observed(range(720, 728), dynamic=True)
    assert 0.1 < moving.double().mean() < 0.6
    wanted = relative(c2w)
    masked, _ = solve_relative(depth, rays, there, equally(depth) * (~moving)[..., None, None], steps=6)
    assert rotation_error(masked, wanted).max() < 5e-3
    source = rays[:, :, None].expand_as(there)
    naive = solve_motion(depth, source, there, equally(depth), steps=6, robust=False)
    assert rotation_error(naive[:, :, 1], wanted).median() > 0.1


@pytest.mark.parametrize("broken", ["flow", "depth"])
def test_cameras_come_from_both_flow_and_depth(broken):
    """The control of the two tests above: wrong input must not give the right camera."""
    depth, rays, there, c2w, _ = observed(range(700, 704), dynamic=False)
    if broken == "flow":
        there = there.flip(1)
        wrong, _ = solve_relative(depth, rays, there, equally(depth))
    else:
        wrong, _ = solve_relative(depth.flip(-1), rays, there, equally(depth))
    wanted = relative(c2w)
    moving = wanted[..., :3, 3].norm(dim=-1) > 0.02
    apart = 1 - F.cosine_similarity(wrong[..., :3, 3], wanted[..., :3, 3], dim=-1)[moving]
    assert apart.median() > 1e-3 or rotation_error(wrong, wanted).median() > 0.1


def test_outliers_lose_their_say():
    depth, rays, there, c2w, _ = observed([700], dynamic=False)
    there = there.clone()
    there[..., :25, :] += 0.2
    wanted = relative(c2w)
    source = rays[:, :, None].expand_as(there)
    robust = solve_motion(depth, source, there, equally(depth), steps=8)
    plain = solve_motion(depth, source, there, equally(depth), steps=8, robust=False)
    good = rotation_error(inverse(robust[:, :, 0]), wanted).max()
    assert good < 0.01
    assert rotation_error(inverse(plain[:, :, 0]), wanted).max() > 100 * good


def test_an_edge_counts_across_and_not_along():
    """A displacement that is wrong along its edge does no harm with a matrix, and does with a weight."""
    depth, rays, there, c2w, _ = observed([700], dynamic=False)
    angle = torch.pi * torch.rand(there.shape[:-1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    along = torch.stack([angle.cos(), angle.sin()], dim=-1)
    across = torch.stack([-angle.sin(), angle.cos()], dim=-1)
    slid = there + 0.02 * torch.sin(97 * angle)[..., None] * along
    wanted = relative(c2w)
    matrix, _ = solve_relative(depth, rays, slid, across[..., None] * across[..., None, :], steps=8)
    weight, _ = solve_relative(depth, rays, slid, equally(depth), steps=8)
    assert rotation_error(matrix, wanted).max() < 0.01
    assert rotation_error(weight, wanted).median() > 0.05


def test_gradients_are_exact():
    rng = torch.Generator().manual_seed(1)
    source = (torch.rand(2, 12, 2, generator=rng, dtype=torch.float64) - 0.5).requires_grad_()
    target = (source.detach() + 0.03 * torch.randn(2, 12, 2, generator=rng).double()).requires_grad_()
    depth = (1 + torch.rand(2, 12, generator=rng, dtype=torch.float64)).requires_grad_()
    root = torch.rand(2, 12, 2, 2, generator=rng, dtype=torch.float64).requires_grad_()

    def solve(depth, source, target, root):
        return solve_motion(depth, source, target, root @ root.mT, steps=12, robust=False)[..., :3, :]

    assert torch.autograd.gradcheck(solve, (depth, source, target, root), eps=1e-6, atol=1e-4, rtol=1e-3)


def test_a_clip_of_one_frame_has_no_pairs():
    none = torch.zeros(1, 0, 2, 9)
    found, _ = solve_relative(none, torch.zeros(1, 0, 9, 2), torch.zeros(1, 0, 2, 9, 2), equally(none))
    assert torch.equal(chain(found), torch.eye(4).expand(1, 1, 4, 4))
