"""Motion masks on both flow grids, and the rendered cloud against the world's own depth."""

from dataclasses import replace

import pytest
import torch

from geometry import Geometry, dynamic_mask
from geometry.cameras import pinhole, pixel_grid, rigid, unproject
from geometry.reproject import render_cloud
from geometry.world import make_clips


@pytest.fixture(scope="module")
def clips():
    return make_clips(range(700, 708), dynamic=True)


def first_grid(clips):
    """The same truth as Any4D would give it: displacement of frame 0's points, on frame 0's pixels."""
    height, width = clips.video.shape[-2:]
    v, u = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = (torch.stack([u, v], -1).flatten(0, 1) + 0.5).expand(len(clips), -1, -1).float()
    points = clips.track(pixels).points.unflatten(2, (height, width))
    flow = points - points[:, :1]
    flow[~clips.geometry.valid[:, :1].expand(-1, flow.shape[1], -1, -1)] = 0
    return replace(clips.geometry, scene_flow=flow, flow_grid="first")


def test_frame_grid_marks_exactly_the_bodies_that_move(clips):
    mask = dynamic_mask(clips.geometry, 1e-4)
    assert torch.equal(mask, clips.geometry.scene_flow.norm(dim=-1) > 1e-4)
    assert not dynamic_mask(clips.geometry, 1e3).any()
    assert not dynamic_mask(replace(clips.geometry, scene_flow=None, flow_grid=None), 0.0).any()


def test_first_grid_marks_the_bodies_where_they_are_in_every_frame(clips):
    """Against the frame grid's mask; naively reading frame 0's pixels in every frame is the bug to catch."""
    true = dynamic_mask(clips.geometry, 1e-4)
    scene = first_grid(clips)
    mask = dynamic_mask(scene, 1e-2)
    naive = scene.scene_flow.norm(dim=-1) > 1e-2

    def overlap(a, t):
        return ((a & true)[:, t].sum() / (a | true)[:, t].sum()).item()

    for t, least in ((0, 0.99), (4, 0.7), (8, 0.5)):  # what turns into view later was never on frame 0's grid
        assert overlap(mask, t) > least, t
    assert overlap(mask, 8) > overlap(naive, 8) + 0.1
    assert overlap(mask, 12) > overlap(naive, 12) + 0.1


def test_thresholds_may_differ_between_clips(clips):
    limit = torch.full((len(clips),), 1e-4)
    limit[3] = 1e3
    mask = dynamic_mask(clips.geometry, limit)
    assert not mask[3].any()
    assert mask[[0, 1, 2, 4]].flatten(1).any(1).all()


@pytest.mark.parametrize("subpixel", [True, False])
def test_a_view_sees_the_other_frames_where_it_sees_itself(subpixel):
    scene = make_clips(range(12), supersample=1).geometry
    view = render_cloud(scene, scene.valid, exclude_self=True, subpixel=subpixel)
    assert 0.3 < view.both.float().mean() < 1
    gap = ((view.rendered - view.observed).abs() / view.observed)[view.both]
    behind = (view.rendered > 1.1 * view.observed)[view.both]
    assert gap[~behind].mean() < (1e-3 if subpixel else 5e-2)
    if not subpixel:  # what interpolation is for: on slanted surfaces the pixel's centre is somewhere else
        assert gap[~behind].mean() > 3e-3


def test_slanted_planes_are_interpolated_exactly():
    """A floor seen from a moving camera; depth is linear in 1/z across the image and not in z."""
    position = torch.arange(5, dtype=torch.float64)[:, None] * torch.tensor([0.07, 0.0, 0.05], dtype=torch.float64)
    c2w = rigid(torch.eye(3, dtype=torch.float64).expand(5, 3, 3), position)
    intrinsics = pinhole(torch.tensor(60.0, dtype=torch.float64), 24, 24).expand(5, 3, 3)
    down = (pixel_grid(24, 24, c2w)[..., 1] - 12) / intrinsics[0, 1, 1]
    depth = (1.0 / (0.6 * down + 0.7)).expand(5, 24, 24).contiguous()  # the plane 0.6 y + 0.7 z = 1, in every camera
    depth = depth * (1 - 0.7 * position[:, 2])[:, None, None]  # ... which it nears
    scene = Geometry(c2w, intrinsics, depth, unproject(depth, intrinsics, c2w))
    view = render_cloud(scene, torch.ones_like(depth, dtype=torch.bool), exclude_self=True, subpixel=True)
    assert view.both.float().mean() > 0.8
    gap = (view.rendered - view.observed)[view.both].abs()
    assert gap.median() < 1e-12
    assert gap.max() < 2e-4  # where a pixel centre with a share below 1e-3 is not asked; linear in z: 4e-3


def test_a_cloud_of_itself_alone_is_its_own_depth():
    scene = make_clips(range(4), frames=1, supersample=1).geometry
    view = render_cloud(scene, scene.valid, exclude_self=False, subpixel=False)
    assert (view.both == scene.valid).float().mean() > 0.999
    torch.testing.assert_close(view.rendered[view.both], scene.depth[view.both], rtol=1e-4, atol=1e-4)
    assert not render_cloud(scene, scene.valid, exclude_self=True, subpixel=False).both.any()
