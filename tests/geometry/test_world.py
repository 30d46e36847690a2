"""The world is what it says: pixels, depth, points, flow and tracks agree with each other and with nothing else."""

from dataclasses import replace

import pytest
import torch

from geometry.cameras import inverse, project, so3_exp, so3_log, unproject
from geometry.types import Geometry, check_geometry
from geometry.world import MOTIONS, make_clip, make_clips
from geometry.world.cast import cast, rays, rays_through
from geometry.world.trajectory import SHAKE_UNITS

SEEDS = range(900, 912)


@pytest.fixture(scope="module", params=[False, True], ids=["static", "dynamic"])
def clips(request):
    return make_clips(SEEDS, dynamic=request.param)


def sample(image, pixels):
    """`image [B H W C]` at `pixels [B P 2]`, bilinear; beyond the border the nearest value."""
    height, width = image.shape[1:3]
    at = pixels / pixels.new_tensor([width, height]) * 2 - 1
    grid = torch.nn.functional.grid_sample(
        image.movedim(-1, 1), at[:, None], align_corners=False, padding_mode="border"
    )
    return grid[:, :, 0].movedim(1, -1)


def landing_errors(scene: Geometry, video, i: int, j: int, move_with_flow: bool = False):
    """Of the points of frame i that are visible in frame j: relative depth error and colour error `[n]`.

    Visible: they land where frame j has a depth (all four neighbours are one surface) and not behind it.
    """
    points = scene.points[:, i] + (scene.scene_flow[:, i] if move_with_flow else 0)
    at, depth = project(points.flatten(1, 2), scene.intrinsics[:, j], scene.c2w[:, j])
    height, width = scene.depth.shape[-2:]
    inside = (at > 0.5).all(-1) & (at < at.new_tensor([width - 0.5, height - 0.5])).all(-1) & (depth > 0)
    inside &= scene.valid[:, i].flatten(1)
    if not move_with_flow:
        inside &= scene.scene_flow[:, i].flatten(1, 2).norm(dim=-1) == 0
    inverse_depth = 1 / scene.depth[:, j, :, :, None]
    corners = torch.stack(
        [
            sample(inverse_depth, (at + d).floor() + 0.5)
            for d in at.new_tensor([[-0.5, -0.5], [0.5, -0.5], [-0.5, 0.5], [0.5, 0.5]])
        ]
    )
    one_surface = ((corners.amax(0) - corners.amin(0)) < 0.1 * corners.amax(0))[..., 0]
    found = 1 / sample(inverse_depth, at)[..., 0]
    keep = inside & one_surface & (depth < 1.02 * found)
    color = (sample(video[:, j].movedim(1, -1), at) - video[:, i].movedim(1, -1).flatten(1, 2)).abs().amax(-1)
    return ((depth - found).abs() / found)[keep], color[keep]


def test_points_are_unprojected_depth(clips):
    scene = clips.geometry
    points = unproject(scene.depth, scene.intrinsics, scene.c2w)
    torch.testing.assert_close(scene.points, points, rtol=1e-5, atol=1e-5)
    assert torch.equal(scene.c2w[:, 0], torch.eye(4).expand_as(scene.c2w[:, 0]))
    check_geometry(scene)


@pytest.mark.parametrize("j", [1, 8, 16])
def test_static_points_land_at_the_depth_and_colour_that_another_frame_sees(clips, j):
    depth, color = landing_errors(clips.geometry, clips.video, 0, j)
    assert len(depth) > 10_000
    assert depth.median() < 1e-4  # bodies are curved and edges are pixels wide: the rest is interpolation
    assert depth.quantile(0.9) < 2e-3
    assert color.median() < 0.02


def test_exact_rays_find_static_points_at_their_depth(clips):
    """No interpolation: cast a ray through the very pixel where the point must be."""
    pixels = torch.rand(len(clips), 500, 2, generator=torch.Generator().manual_seed(0)) * 64
    tracks = clips.track(pixels)
    at, depth = project(tracks.points, clips.geometry.intrinsics, clips.geometry.c2w)
    ahead = tracks.depth > 0.2  # pixels of what is beside or behind the camera are as large as you like
    torch.testing.assert_close(at[ahead], tracks.pixels[ahead], rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(depth, tracks.depth, rtol=1e-4, atol=1e-4)
    seen = cast(clips.shot, *rays_through(clips.shot, at[:, :, None])).depth[:, :, 0]
    error = ((seen - depth).abs() / depth)[tracks.visible]
    assert error.quantile(0.99) < 1e-4  # the last percent graze the rim of a body
    assert tracks.visible[:, 0].float().mean() > 0.8  # all but the sky
    assert 0.3 < tracks.visible[:, 1:].float().mean() < 0.98


def test_looking_for_a_body_only_where_it_can_be_seen_misses_nothing():
    """A regular grid is searched in a window around each body; the same rays as a list are searched everywhere."""
    for kind in ({"dynamic": True}, {"jitter": 8.0}):
        shot = make_clips(range(900, 924), size=(24, 32), supersample=1, **kind).shot
        x, y = rays(shot, (24, 32))
        grid, everywhere = cast(shot, x, y), cast(shot, *(z.expand(24, 17, 24, 32) for z in (x, y)))
        assert torch.equal(grid.depth, everywhere.depth)
        assert torch.equal(grid.instance, everywhere.instance)
        assert (grid.instance > 0).any()


def wrong_convention(scene: Geometry, bug: str) -> Geometry:
    shifted = scene.intrinsics.clone()
    shifted[..., :2, 2] += 0.5
    wrong = {"w2c for c2w": {"c2w": inverse(scene.c2w)}, "half a pixel": {"intrinsics": shifted}}
    return replace(scene, **wrong[bug])


@pytest.mark.parametrize("bug", ["w2c for c2w", "half a pixel"])
def test_a_wrong_convention_is_caught(bug):
    clips = make_clips(SEEDS, motion="orbit")
    wrong = wrong_convention(clips.geometry, bug)
    right, _ = landing_errors(clips.geometry, clips.video, 0, 16)
    depth, _ = landing_errors(wrong, clips.video, 0, 16)
    assert right.median() < 1e-4 < 1e-3 < depth.median()
    assert not torch.allclose(wrong.points, unproject(wrong.depth, wrong.intrinsics, wrong.c2w), rtol=1e-3, atol=1e-3)


def test_flow_carries_a_point_of_a_body_onto_that_body():
    clips = make_clips(SEEDS, dynamic=True)
    scene = clips.geometry
    for i in (0, 7, 15):
        moving = scene.scene_flow[:, i].norm(dim=-1) > 0
        assert moving.any()
        depth, _ = landing_errors(scene, clips.video, i, i + 1, move_with_flow=True)
        bodies = replace(scene, valid=moving[:, None].expand_as(scene.valid), scene_flow=torch.zeros_like(scene.points))
        still, _ = landing_errors(bodies, clips.video, i, i + 1)
        assert depth.median() < 1e-4
        assert still.median() > 5e-4  # the control: without its flow the body has moved away


def test_tracks_agree_with_flow():
    clips = make_clips(SEEDS, dynamic=True)
    v, u = torch.meshgrid(torch.arange(4, 64, 8), torch.arange(4, 64, 8), indexing="ij")
    pixels = (torch.stack([u, v], -1).flatten(0, 1) + 0.5).expand(len(clips), -1, -1)
    tracks = clips.track(pixels)
    flow = clips.geometry.scene_flow[:, 0, 4::8, 4::8].flatten(1, 2)
    points = clips.geometry.points[:, 0, 4::8, 4::8].flatten(1, 2)
    seen = clips.geometry.valid[:, 0, 4::8, 4::8].flatten(1, 2)
    torch.testing.assert_close(tracks.points[:, 0][seen], points[seen], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tracks.points[:, 1][seen], (points + flow)[seen], rtol=1e-4, atol=1e-4)
    assert flow[seen].norm(dim=-1).max() > 0.01
    assert not tracks.visible[~seen[:, None].expand_as(tracks.visible)].any()  # the sky is nowhere


def test_a_seed_is_the_same_bits_alone_and_in_any_batch():
    batch = make_clips([3, 1, 4, 1, 5], dynamic=True, jitter=0.5)
    for index, seed in ((0, 3), (2, 4), (4, 5)):
        alone, inside = make_clip(seed, dynamic=True, jitter=0.5), batch[index]
        assert torch.equal(alone.video, inside.video)
        for name, value in vars(alone.geometry).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(inside.geometry, name)), name
        assert alone.caption == inside.caption
    assert torch.equal(batch.video[1], batch.video[3])
    assert not torch.equal(batch.video[0], batch.video[1])


def test_sway_has_one_velocity_from_frame_to_frame_and_shake_has_none():
    calm, swaying = (make_clip(7, motion="truck", sway=amount) for amount in (0.0, 2.0))
    assert torch.equal(calm.video[0], swaying.video[0])
    assert torch.equal(calm.command.relative_pose, swaying.command.relative_pose)
    assert calm.caption == swaying.caption
    assert torch.equal(calm.video, make_clip(7, motion="truck").video), "none by default"

    c2w = make_clips(range(64), size=(8, 8), supersample=1, motion="static", sway=2.0).geometry.c2w
    pitch, height = so3_log(c2w[..., :3, :3])[..., 0].rad2deg(), c2w[..., 1, 3] / SHAKE_UNITS
    assert (pitch - pitch.mean(1, keepdim=True)).square().mean().sqrt() == pytest.approx(2.0, rel=0.1)
    assert torch.allclose(pitch, -height, atol=0.1), "down and downwards"

    def repeats(**how: float) -> float:
        c2w = make_clips(range(64), size=(8, 8), supersample=1, motion="static", **how).geometry.c2w
        v = so3_log(c2w[..., :3, :3]).diff(dim=1)
        return float((v[:, 1:] * v[:, :-1]).mean() / v.square().mean())

    assert repeats(sway=2.0) > 0.3
    assert repeats(jitter=2.0) < -0.3


def test_jitter_shakes_the_camera_and_nothing_else():
    calm, shaky = make_clip(7, motion="truck"), make_clip(7, motion="truck", jitter=2.0)
    assert torch.equal(calm.video[0], shaky.video[0])
    assert torch.equal(calm.command.relative_pose, shaky.command.relative_pose)
    assert torch.equal(calm.shot.pose, shaky.shot.pose)
    many = make_clips(range(64), size=(8, 8), supersample=1, motion="static", jitter=2.0).geometry.c2w[:, 1:]
    angle = torch.rad2deg(torch.acos(((many[..., :3, :3].diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2).clamp(-1, 1)))
    assert (angle**2).mean().sqrt() == pytest.approx(2.0 * 3**0.5, rel=0.05)
    assert many[..., :3, 3].std() == pytest.approx(0.04, rel=0.05)


def test_commands_are_what_the_camera_does():
    for motion in MOTIONS:
        clip = make_clip(11, motion=motion)
        step = clip.command.relative_pose
        pose = torch.eye(4)
        for t in range(16):
            move = torch.eye(4)
            move[:3, :3], move[:3, 3] = so3_exp(step[t, 3:]), step[t, :3]
            pose = pose @ move
        torch.testing.assert_close(pose, clip.geometry.c2w[-1], rtol=1e-4, atol=1e-4)
        if motion == "pan":
            assert step[:, :3].abs().max() < 1e-6
            assert step[:, 4].abs().min() > 0.01
        if motion == "dolly_in":
            assert step[:, 2].min() > 0.01
            assert step[:, 3:].abs().max() < 1e-6
    assert (make_clip(11, motion="static").command.relative_pose == 0).all()


def test_dynamic_pixels_are_a_substantial_share():
    clips = make_clips(range(1000, 1064), size=(32, 32), supersample=1, dynamic=True)
    share = (clips.geometry.scene_flow.norm(dim=-1) > 0).float().mean((1, 2, 3))
    assert share.mean() > 0.15
    assert (share > 0.02).all()
    assert (make_clips(range(8)).geometry.scene_flow == 0).all()


def test_captions_name_camera_place_bodies_and_motion():
    clip = make_clip(5, dynamic=True, motion="dolly_in")
    assert clip.caption.startswith("The camera dollies in ")
    bodies = [name for name in ("box", "sphere", "cylinder") if name in clip.caption]
    assert bodies
    assert any(verb in clip.caption for verb in ("slides", "spins", "bounces"))
    assert len(set(make_clips(range(32), size=(8, 8), supersample=1).caption)) == 32


def test_boxes_bound_what_is_seen_of_each_body():
    clip = make_clip(2, dynamic=True)
    boxes = clip.boxes()
    for t in (0, 9):
        for n in range(boxes.shape[1]):
            rows, columns = (clip.instances[t] == n + 1).nonzero(as_tuple=True)
            if len(rows) == 0:
                assert boxes[t, n].isnan().all()
            else:
                expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert boxes[t, n].tolist() == [int(e) for e in expected]


def test_other_sizes_lengths_and_texture_scales():
    clip = make_clip(1, frames=5, size=(48, 80), texture_scale=0.5, supersample=1)
    assert clip.video.shape == (5, 3, 48, 80)
    assert clip.video.min() >= 0
    assert clip.video.max() <= 1
    assert make_clip(1, frames=1).geometry.c2w.shape == (1, 4, 4)
    coarse, fine = make_clip(1, texture_scale=1.0), make_clip(1, texture_scale=0.2)
    assert torch.equal(coarse.geometry.depth, fine.geometry.depth)
    change = [(c.video[:, :, :, 1:] - c.video[:, :, :, :-1]).abs().mean() for c in (coarse, fine)]
    assert change[1] > 1.3 * change[0]


def test_supersampling_only_softens_edges():
    sharp, soft = make_clip(6, supersample=1), make_clip(6, supersample=4)
    assert torch.equal(sharp.geometry.depth, soft.geometry.depth)
    changed = ((sharp.video - soft.video).abs().amax(1) > 1e-6).float().mean()
    assert 0.02 < changed < 0.5


def test_where_bodies_meet_a_pixel_is_the_mean_of_its_rays():
    """Against an image of twice the size, averaged; inside a surface one ray is enough."""
    soft = make_clips(range(8), supersample=2)
    large = make_clips(range(8), size=(128, 128), supersample=1).video
    mean = torch.nn.functional.avg_pool2d(large.flatten(0, 1), 2).unflatten(0, (8, 17))
    across = soft.instances[..., 1:] != soft.instances[..., :-1]
    gap = (soft.video - mean).abs().amax(2)
    assert gap[..., 1:][across].max() < 1e-4
    assert gap[..., :-1][across].max() < 1e-4
    assert gap.mean() < 0.01


def test_clips_of_one_scene_differ_in_their_camera_alone():
    clips = make_clips([5, 6, 7], motion="pan", scenes=[3, 3, 4])
    assert torch.equal(clips.shot.room[0], clips.shot.room[1])
    assert torch.equal(clips.shot.material[0], clips.shot.material[1])
    assert not torch.equal(clips.shot.camera[0], clips.shot.camera[1])
    assert not torch.equal(clips.shot.material[0], clips.shot.material[2])
    assert clips.caption[0].partition("There are")[2] == clips.caption[1].partition("There are")[2]
    alone = make_clip(6, motion="pan", scene=3)
    assert torch.equal(alone.video, clips.video[1])
    assert not torch.equal(alone.video, make_clip(6, motion="pan").video), "without a scene the seed draws its own"


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_known_scene_is_free_for_every_motion(motion):
    clips = make_clips(range(8), motion=motion, scenes=range(8), dynamic=True, size=(16, 16))
    assert torch.equal(clips.geometry.scene_flow.flatten(1).any(1), torch.ones(8, dtype=torch.bool))
    assert clips.geometry.depth.min() > 0.1


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"scene": -1}, "scenes must be 1 numbers >= 0"),
        ({"motion": "zoom"}, "motion must be None or one of static, pan"),
        ({"frames": 0}, "frames"),
        ({"size": (0, 64)}, "size"),
        ({"jitter": -1.0}, "jitter"),
        ({"sway": -1.0}, "sway"),
        ({"texture_scale": 0.0}, "texture_scale"),
        ({"seed": -1}, "seeds must be"),
    ],
)
def test_bad_arguments_are_named(bad, named, as_users_run):
    with pytest.raises(ValueError, match=named):
        make_clip(**{"seed": 0, **bad})
