"""The referee's three parts: displacements from pixels, bundle adjustment, and the network between them."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from geometry.cameras import pixel_grid, project, relative, so3_log, unproject
from geometry.models.bundle import Witnesses, bundle, unexplained
from geometry.models.referee import SLOTS, Referee
from geometry.models.referee_cameras import adjust, normalised
from geometry.models.referee_flow import CELL, edges, follow
from geometry.types import check_geometry
from geometry.world import make_clips


def degrees(a, b):
    return torch.rad2deg(so3_log(a[..., :3, :3].mT @ b[..., :3, :3]).norm(dim=-1))


@pytest.fixture(scope="module")
def clip():
    return make_clips([60, 61, 62], frames=6, supersample=2)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Referee().eval()


def observed(seeds, *, dynamic=False, frames=6):
    """What a perfect correspondence says of a clip, in float64: witnesses, log-depth, poses and motion masks."""
    scene = make_clips(seeds, frames=frames, dynamic=dynamic, supersample=1).geometry
    pick = slice(CELL // 2, None, CELL)
    source, target, _ = edges(frames)
    depth = scene.depth.double()[..., pick, pick].flatten(2)
    points = (scene.points + scene.scene_flow).double()[..., pick, pick, :].flatten(2, 3)
    still = scene.points.double()[..., pick, pick, :].flatten(2, 3)
    c2w, intrinsics = scene.c2w.double(), scene.intrinsics.double()
    # A body goes on as it does between neighbours: enough for a body that must be ignored.
    steps = (target - source)[:, None, None]
    there, _ = project(still[:, source] + steps * (points - still)[:, source], intrinsics[:, target], c2w[:, target])
    focal, middle = intrinsics[:, :1, 0, 0, None, None], intrinsics[:, :1, None, :2, 2]
    pixels = pixel_grid(64, 64, depth)[pick, pick].flatten(0, 1).expand(*depth.shape, 2)
    moving = scene.scene_flow.norm(dim=-1)[..., pick, pick].flatten(2) > 0
    equal = torch.eye(2, dtype=depth.dtype).expand(*there.shape, 2)
    seen = Witnesses(source, target, (pixels - middle) / focal, (there - middle) / focal, equal)
    return seen, depth.log(), c2w, moving


def test_edges_join_frames_one_two_and_four_apart_both_ways():
    source, target, slot = edges(6)
    pairs = set(zip(source.tolist(), target.tolist(), strict=True))
    assert pairs == {(i, j) for i in range(6) for j in range(6) if abs(i - j) in (1, 2, 4)}
    assert len(set((source * SLOTS + slot).tolist())) == len(source), "a frame has each slot once"
    assert [len(x) for x in edges(1)] == [0, 0, 0]


@pytest.mark.parametrize("shift", [(0.0, 0.0), (1.3, -0.6), (-0.7, 0.9)])
def test_a_shifted_picture_is_followed_to_a_tenth_of_a_pixel(shift):
    """Also over four frames, where the picture has gone four times as far."""
    u, v = pixel_grid(64, 64, torch.zeros(1)).unbind(-1)
    frames = []
    for k in range(5):
        x, y = u - k * shift[0], v - k * shift[1]
        rgb = [torch.sin(0.31 * x + 0.2 * y), torch.sin(0.12 * x - 0.35 * y + 1), torch.cos(0.22 * (x + y))]
        frames.append(0.5 + 0.4 * torch.stack(rgb))
    tracks = follow(torch.stack(frames)[None])
    wanted = (tracks.target - tracks.source)[:, None, None, None] * torch.tensor(shift)
    off = (tracks.flow[0] - wanted).norm(dim=-1)[:, 3:-3, 3:-3]
    assert off.median() < 0.1
    if any(shift):
        assert wanted.norm(dim=-1).median() > 0.9  # the control: not to follow is worse
        assert tracks.loop[0, :, 3:-3, 3:-3].median() < 0.1


def test_perfect_correspondence_gives_the_cameras_exactly():
    seen, log_depth, c2w, _ = observed([700, 701, 702])
    found, depth = bundle(log_depth, torch.full_like(log_depth, 1e-3), seen)
    assert degrees(found, c2w).max() < 1e-3
    torch.testing.assert_close(found[..., :3, 3], c2w[..., :3, 3], atol=1e-4, rtol=0)
    torch.testing.assert_close(depth, log_depth, atol=1e-3, rtol=0)
    assert unexplained(found, depth, seen).abs().max() < 1e-4
    mixed, _ = bundle(log_depth, torch.full_like(log_depth, 1e-3), seen._replace(there=seen.there.flip(1)))
    assert degrees(mixed, c2w).median() > 0.1  # the control: of other frames


def test_scale_is_that_of_the_given_depth():
    seen, log_depth, _, _ = observed([700])
    one, _ = bundle(log_depth, torch.ones_like(log_depth), seen)
    large, deep = bundle(log_depth + 1.2, torch.ones_like(log_depth), seen)
    torch.testing.assert_close(large[..., :3, 3], one[..., :3, 3] * torch.tensor(1.2).exp(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(deep, log_depth + 1.2, atol=1e-3, rtol=0)


def test_wrong_depth_is_mended_where_there_is_parallax():
    """A smooth error of 20 %, a truck; with a prior that nothing can move it stays, and misleads the cameras."""
    seed = next(s for s in range(700, 760) if make_clips([s], frames=2, size=(8, 8)).command.motion[0] == "truck")
    seen, log_depth, c2w, _ = observed([seed])
    wrong = log_depth + 0.2 * torch.sin(6 * seen.rays[..., 0] + 1)
    wrong = wrong - (wrong - log_depth).median()
    free, mended = bundle(wrong, torch.full_like(wrong, 1e-6), seen)
    stiff, kept = bundle(wrong, torch.full_like(wrong, 1e3), seen)
    near = log_depth < log_depth.median()
    error, before = (((x - log_depth) - (x - log_depth).median())[near].abs().mean() for x in (mended, wrong))
    assert error < 0.3 * before
    torch.testing.assert_close(kept, wrong, atol=0.02, rtol=0)
    assert degrees(free, c2w).mean() < 0.5 * degrees(stiff, c2w).mean()


def test_bodies_that_move_mislead_unless_they_are_no_witnesses():
    seen, log_depth, c2w, moving = observed([720, 722, 724], dynamic=True)
    assert moving.double().mean() > 0.05
    heed = seen.information * (~moving)[:, seen.source][..., None, None]
    masked, _ = bundle(log_depth, torch.ones_like(log_depth), seen._replace(information=heed))
    naive, _ = bundle(log_depth, torch.ones_like(log_depth), seen)
    assert degrees(masked, c2w).max() < 0.01
    assert degrees(naive, c2w).max() > 0.1


def test_an_edge_of_the_picture_counts_across_and_not_along():
    seen, log_depth, c2w, _ = observed([700])
    angle = torch.pi * torch.rand(seen.there.shape[:-1], generator=torch.Generator().manual_seed(2)).double()
    along, across = (torch.stack(x, dim=-1) for x in ((angle.cos(), angle.sin()), (-angle.sin(), angle.cos())))
    slid = seen._replace(there=seen.there + 0.02 * torch.sin(97 * angle)[..., None] * along)
    prior = torch.full_like(log_depth, 1e3)
    matrix, _ = bundle(log_depth, prior, slid._replace(information=1e6 * across[..., None] * across[..., None, :]))
    weight, _ = bundle(log_depth, prior, slid)
    assert degrees(matrix, c2w).max() < 0.2 * degrees(weight, c2w).max()


def test_far_frames_keep_the_path_from_drifting():
    """The same noise in every displacement: with neighbours alone the end of the clip is further off."""
    seen, log_depth, c2w, _ = observed(range(700, 706), frames=9)
    noise = 0.01 * torch.randn(seen.there.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    noisy, prior = seen._replace(there=seen.there + noise), torch.full_like(log_depth, 1e6)
    near = (seen.target - seen.source).abs() == 1
    alone = Witnesses(seen.source[near], seen.target[near], seen.rays, noisy.there[:, near], seen.information[:, near])
    ends = [degrees(bundle(log_depth, prior, x)[0], c2w)[:, -1].mean() for x in (noisy, alone)]
    assert ends[0] < 0.7 * ends[1]


def test_pixels_and_true_depth_give_the_cameras(clip):
    """No network: displacements of the picture, the world's depth, the adjustment. A shuffled clip is the control."""
    scene = clip.geometry
    log_depth = F.avg_pool2d(scene.depth.clamp(max=40).log(), CELL).flatten(2)
    errors = []
    for video in (clip.video, clip.video[:, [3, 0, 5, 1, 4, 2]]):
        seen, _ = normalised(follow(video), scene.intrinsics)
        found, _ = bundle(log_depth, torch.full_like(log_depth, 100.0), seen)
        errors.append(degrees(relative(found), relative(scene.c2w)).median())
    assert errors[0] < 0.35
    assert errors[1] > 3 * errors[0]


@pytest.mark.parametrize(("frames", "size"), [(6, (64, 64)), (1, (64, 64)), (2, (37, 50)), (3, (48, 16))])
def test_its_answers_keep_the_conventions(network, frames, size):
    """Also of one frame, and of sides that nothing divides."""
    video = torch.rand(2, frames, 3, *size, generator=torch.Generator().manual_seed(1))
    scene = network(video)
    check_geometry(scene)
    assert scene.depth.shape == (2, frames, *size)
    assert torch.equal(scene.c2w[:, 0], torch.eye(4).expand(2, 4, 4))
    torch.testing.assert_close(scene.points, unproject(scene.depth, scene.intrinsics, scene.c2w))
    assert network(video[0]).depth.shape == (frames, *size)


def test_a_clip_does_not_depend_on_its_batch(network, clip):
    whole, alone = network(clip.video, clip.geometry.intrinsics), network(clip.video[1], clip.geometry.intrinsics[1])
    torch.testing.assert_close(whole.c2w[1], alone.c2w, atol=1e-3, rtol=0)
    torch.testing.assert_close(whole.depth[1], alone.depth, atol=1e-3, rtol=1e-3)


def test_given_intrinsics_are_used_and_given_back(network, clip):
    known = network(clip.video, clip.geometry.intrinsics)
    unknown = network(clip.video)
    assert torch.equal(known.intrinsics, clip.geometry.intrinsics)
    assert not torch.allclose(known.c2w, unknown.c2w, atol=1e-4)
    with pytest.raises(ValueError, match="at least 16 pixels, got 8 x 64"):
        network(torch.rand(2, 3, 8, 64))


def test_what_the_network_distrusts_does_not_move_the_cameras(network, clip):
    """A displacement that is said to be a bad witness may be anything."""
    scene, tracks = clip.geometry, follow(clip.video)
    seen = network.look(clip.video, tracks, scene.intrinsics, None)
    broken = tracks.flow.clone()
    broken[:, :, :6] += 5.0
    doubted = seen.witness.clone()
    doubted[:, :, :6] = 12.0
    good = adjust(seen._replace(witness=doubted), tracks, scene.intrinsics, None)
    same = adjust(seen._replace(witness=doubted), tracks._replace(flow=broken), scene.intrinsics, None)
    misled = adjust(seen, tracks._replace(flow=broken), scene.intrinsics, None)
    assert degrees(same.c2w, good.c2w).max() < 0.02
    assert degrees(misled.c2w, good.c2w).max() > 0.2


def test_importing_it_loads_nothing_heavy():
    code = "import sys, geometry.models.referee; print({'transformers', 'diffusers', 'peft'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
