"""What viewers read back is what the world knows: points, colours, cameras, and a fused surface at its true place."""

import json
import struct
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from geometry import export
from geometry.cameras import unproject
from geometry.types import Geometry
from geometry.world import make_clip

o3d = pytest.importorskip("trimesh") and pytest.importorskip("rerun") and export._require("open3d")
import rerun  # noqa: E402
import trimesh  # noqa: E402


@pytest.fixture(scope="module")
def outdoors():
    """A clip with a sky (not valid) and several bodies."""
    clip = make_clip(900, frames=5, size=(24, 32))
    assert 0.3 < clip.geometry.valid.float().mean() < 0.95
    return clip


@pytest.fixture(scope="module")
def moving():
    return make_clip(903, frames=5, size=(24, 32), dynamic=True)


@pytest.fixture(scope="module")
def room():
    return still_room(904)


def still_room(seed):
    """Every pixel is valid, nothing moves but the camera."""
    clip = make_clip(seed, frames=9, size=(48, 48))
    assert clip.geometry.valid.all()
    assert clip.command.motion != "static"
    return clip


def colors_of(clip):
    return (clip.video * 255).round().byte().movedim(1, -1)


# PLY


def test_ply_holds_the_valid_points_and_their_colours(outdoors, tmp_path):
    scene = outdoors.geometry
    export.save_ply(tmp_path / "a.ply", scene, outdoors.video)
    back = trimesh.load(tmp_path / "a.ply")
    assert np.array_equal(back.vertices, scene.points[scene.valid].numpy())
    assert np.array_equal(back.colors[:, :3], colors_of(outdoors)[scene.valid].numpy())
    assert len(back.vertices) < scene.valid.numel()


def test_stride_and_max_points_thin_the_cloud(outdoors):
    scene, colors = outdoors.geometry, colors_of(outdoors)[:, ::3, ::3]
    points, shades = export.cloud(scene, outdoors.video, stride=3)
    on = scene.valid[:, ::3, ::3]
    assert torch.equal(points, scene.points[:, ::3, ::3][on])
    assert torch.equal(shades, colors[on])
    few, _ = export.cloud(scene, stride=3, max_points=50)
    assert len(few) == 50
    assert torch.equal(few, export.cloud(scene, stride=3, max_points=50)[0])
    distinct = {tuple(x) for x in few.tolist()}
    assert len(distinct) == 50
    assert distinct <= {tuple(x) for x in points.tolist()}


def test_select_drops_what_moves_and_what_is_unsure(moving):
    scene = moving.geometry
    speed = scene.scene_flow.norm(dim=-1)
    still = export.select(scene, max_motion=1e-3)
    assert torch.equal(still.valid, scene.valid & (speed <= 1e-3))
    assert 0 < int(still.valid.sum()) < int(scene.valid.sum())
    unsure = replace(scene, confidence=torch.linspace(0, 1, scene.depth.numel()).view_as(scene.depth), valid=None)
    assert export.select(unsure, min_confidence=0.75).valid.float().mean() == pytest.approx(0.25, abs=1e-3)


def test_a_larger_video_is_resized_pixel_centres_on_pixel_centres(outdoors):
    scene = outdoors.geometry
    large = outdoors.video.repeat_interleave(4, -1).repeat_interleave(4, -2)
    shades = export.cloud(scene, large)[1].float()
    truth = colors_of(outdoors)[scene.valid].float()
    wrong = colors_of(outdoors).roll(1, 2)[scene.valid].float()
    assert (shades - truth).abs().mean() < 0.5 * (shades - wrong).abs().mean()
    ramp = torch.linspace(0, 1, 128).expand(5, 3, 96, 128)
    ramp_shades = export.cloud(replace(scene, valid=None), ramp)[1].view(5, 24, 32, 3)
    centres = 255 * (4 * torch.arange(1, 31) + 1.5) / 127
    assert (ramp_shades[0, 0, 1:-1, 0] - centres).abs().max() < 0.6


def test_without_a_video_the_frames_go_from_blue_to_red(outdoors):
    colors = export.cloud(replace(outdoors.geometry, valid=None))[1].view(5, -1, 3)
    assert colors[0, 0].tolist() == [0, 76, 255]
    assert colors[-1, 0].tolist() == [255, 76, 0]


def test_points_that_are_not_finite_stay_out(outdoors):
    points = outdoors.geometry.points.clone()
    points[0, 0, 0] = torch.nan
    assert len(export.cloud(replace(outdoors.geometry, points=points, valid=None))[0]) == points[..., 0].numel() - 1


# glTF


def glb_tree(path):
    data = path.read_bytes()
    assert data[:4] == b"glTF"
    (length,) = struct.unpack("<I", data[12:16])
    return json.loads(data[20 : 20 + length])


def test_gltf_camera_nodes_are_the_cameras_in_gltf_axes(outdoors, tmp_path):
    scene = outdoors.geometry
    export.save_gltf(tmp_path / "a.glb", scene, outdoors.video)
    tree = glb_tree(tmp_path / "a.glb")
    nodes = {node["name"]: node for node in tree["nodes"]}
    for i in range(5):
        node = nodes[f"camera_{i:04d}"]
        matrix = torch.tensor(node.get("matrix", torch.eye(4).flatten().tolist())).view(4, 4).mT
        c2w = scene.c2w[i]
        torch.testing.assert_close(matrix[:3, 3], c2w[:3, 3] * torch.tensor([1.0, -1, -1]))
        # In glTF a camera looks along its -z with +y up: in the world, OpenCV's +z and -y.
        torch.testing.assert_close(-matrix[:3, 2], c2w[:3, 2] * torch.tensor([1.0, -1, -1]))
        torch.testing.assert_close(matrix[:3, 1], -c2w[:3, 1] * torch.tensor([1.0, -1, -1]))
        lens = tree["cameras"][node["camera"]]["perspective"]
        fx, fy = float(scene.intrinsics[i, 0, 0]), float(scene.intrinsics[i, 1, 1])
        assert np.tan(lens["yfov"] / 2) == pytest.approx(12 / fy)
        assert np.tan(lens["yfov"] / 2) * lens["aspectRatio"] == pytest.approx(16 / fx)
    assert (scene.c2w[1:] - torch.eye(4)).abs().amax((1, 2)).min() > 1e-3


def test_gltf_cloud_is_seen_by_its_cameras_at_the_pixels_it_came_from(outdoors, tmp_path):
    scene = outdoors.geometry
    export.save_gltf(tmp_path / "a.glb", scene, outdoors.video)
    back = trimesh.load(tmp_path / "a.glb")
    matrix = back.graph.get("camera_0003")[0]
    frame = torch.where(scene.valid)[0] == 3
    points = back.geometry["cloud"].vertices[frame]
    seen = (points - matrix[:3, 3]) @ matrix[:3, :3]
    assert (seen[:, 2] < 0).all(), "glTF cameras look along -z"
    u = -seen[:, 0] / seen[:, 2] * float(scene.intrinsics[3, 0, 0]) + 16
    v = seen[:, 1] / seen[:, 2] * float(scene.intrinsics[3, 1, 1]) + 12
    row, column = torch.where(scene.valid[3])
    np.testing.assert_allclose(u, column + 0.5, atol=1e-3)
    np.testing.assert_allclose(v, row + 0.5, atol=1e-3)
    linear = np.asarray(back.geometry["cloud"].colors)[frame, :3] / 255
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clip(1e-9) ** (1 / 2.4) - 0.055) * 255
    truth = colors_of(outdoors)[3][scene.valid[3]].numpy()
    assert np.abs(srgb - truth)[truth > 60].max() < 3


def test_gltf_draws_the_frusta_through_the_image_corners(outdoors, tmp_path):
    scene = outdoors.geometry
    off_centre = scene.intrinsics.clone()
    off_centre[:, 0, 2] += 5
    export.save_gltf(tmp_path / "a.glb", replace(scene, intrinsics=off_centre))
    lines = trimesh.load(tmp_path / "a.glb").geometry["frusta"]
    drawn = np.unique(np.asarray(lines.vertices).round(4), axis=0)
    depth = 0.05 * scene.depth[scene.valid].median()
    # One "pixel" that is the whole image, twice as large: its centre is the image's lower right corner.
    grid = replace(scene, intrinsics=off_centre).intrinsics / torch.tensor([64.0, 48.0, 1.0])[:, None]
    corner = unproject(depth.expand(5, 1, 1), grid, scene.c2w)[:, 0, 0] * torch.tensor([1.0, -1, -1])
    centre = scene.c2w[:, :3, 3] * torch.tensor([1.0, -1, -1])
    for point in torch.cat([corner, centre]).numpy():
        assert np.abs(drawn - point).max(1).min() < 2e-4


def test_one_frame_is_enough_for_every_file(outdoors, tmp_path):
    one, video = outdoors.geometry.map(lambda x: x[:1]), outdoors.video[:1]
    export.save_ply(tmp_path / "a.ply", one, video)
    export.save_gltf(tmp_path / "a.glb", one, video)
    export.save_rerun(tmp_path / "a.rrd", one, video)
    export.save_fused(tmp_path / "b.ply", export.fuse(one, video))
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("a.ply", "a.glb", "a.rrd", "b.ply"))


# rerun


def read_recording(path):
    """Per entity and component, the values by frame (static ones at None)."""
    found = {}
    for chunk in rerun.chunk.RrdReader(path).stream().to_chunks():
        batch = chunk.to_record_batch()
        frames = batch.column("frame").to_pylist() if "frame" in batch.schema.names else [None] * batch.num_rows
        for name in batch.schema.names:
            if ":" in name:
                values = found.setdefault(f"{chunk.entity_path} {name}", {})
                values.update(zip(frames, batch.column(name).to_pylist(), strict=True))
    return found


def test_rerun_recording_has_cameras_pictures_and_points_on_a_time_axis(outdoors, tmp_path):
    scene = outdoors.geometry
    export.save_rerun(tmp_path / "a.rrd", scene, outdoors.video, stride=2)
    found = read_recording(tmp_path / "a.rrd")
    for i in range(5):
        on = scene.valid[i, ::2, ::2]
        points = np.array(found["/world/points Points3D:positions"][i])
        np.testing.assert_array_equal(points, scene.points[i, ::2, ::2][on].numpy())
        shades = np.array(found["/world/points Points3D:colors"][i], dtype=np.uint32)
        red_green_blue = np.stack([shades >> 24, shades >> 16 & 255, shades >> 8 & 255], -1)
        np.testing.assert_array_equal(red_green_blue, colors_of(outdoors)[i, ::2, ::2][on].numpy())
        # rerun stores matrices column by column.
        rotation = np.array(found["/world/camera Transform3D:mat3x3"][i]).reshape(3, 3).T
        np.testing.assert_array_equal(rotation, scene.c2w[i, :3, :3].numpy())
        np.testing.assert_array_equal(found["/world/camera Transform3D:translation"][i][0], scene.c2w[i, :3, 3])
        matrix = np.array(found["/world/camera Pinhole:image_from_camera"][i]).reshape(3, 3).T
        np.testing.assert_array_equal(matrix, scene.intrinsics[i].numpy())
        assert found["/world/camera Pinhole:resolution"][i] == [[32, 24]]
        image = np.array(found["/world/camera/image Image:buffer"][i][0], np.uint8).reshape(24, 32, 3)
        np.testing.assert_array_equal(image, colors_of(outdoors)[i].numpy())
        depth = np.array(found["/world/camera/depth DepthImage:buffer"][i][0], np.uint8).view(np.float32)
        np.testing.assert_array_equal(depth.reshape(24, 32), (scene.depth[i] * scene.valid[i]).numpy())
    path = found["/world/path LineStrips3D:strips"][None]
    np.testing.assert_array_equal(path[0], scene.c2w[:, :3, 3].numpy())


# open3d


def misses(mesh, points):
    """Distance of points from the surface."""
    surface = o3d.t.geometry.RaycastingScene()
    surface.add_triangles(o3d.t.geometry.TriangleMesh.from_legacy(mesh))
    return surface.compute_distance(o3d.core.Tensor(points.numpy())).numpy()


@pytest.mark.parametrize("seed", [902, 904])
def test_the_fused_room_is_where_the_room_is_and_half_a_pixel_or_a_wrong_pose_shows(seed, monkeypatch):
    room = still_room(seed)
    scene = room.geometry
    voxel = float(scene.depth.median() / scene.intrinsics[0, 0, 0])
    points = scene.points[:, ::3, ::3].reshape(-1, 3)

    def typical_miss(scene):
        return np.median(misses(export.fuse(scene, room.video, voxel), points)) / voxel

    assert typical_miss(scene) < 0.1
    for half in (-0.5, 0.5):
        shifted = scene.intrinsics.clone()
        shifted[:, :2, 2] += half
        assert typical_miss(replace(scene, intrinsics=shifted)) > 0.2
    monkeypatch.setattr(export, "inverse", lambda c2w: c2w)
    assert typical_miss(scene) > 1.5


def test_a_fused_slanted_wall_has_no_bias_and_half_a_pixel_has_one():
    # z = 2 + 0.8 x, seen by one camera at the origin: depth 2 / (1 - 0.8 x').
    focal, n = 32.0, 32
    intrinsics = torch.tensor([[[focal, 0, n / 2], [0, focal, n / 2], [0, 0, 1]]])
    slope = (torch.arange(n) + 0.5 - n / 2) / focal
    depth = (2 / (1 - 0.8 * slope)).expand(1, n, n).contiguous()
    scene = Geometry(torch.eye(4)[None], intrinsics, depth, unproject(depth, intrinsics, torch.eye(4)[None]))

    def bias(shift):
        moved = intrinsics + torch.tensor([[0.0, 0, shift], [0, 0, 0], [0, 0, 0]])
        x, _, z = np.asarray(export.fuse(replace(scene, intrinsics=moved), voxel=0.02).vertices).T
        return np.median(z - 2 - 0.8 * x) / np.hypot(1, 0.8) / 0.02

    assert abs(bias(0.0)) < 0.2
    assert bias(0.5) > 0.8
    assert bias(-0.5) < -0.8


def test_fusion_reaches_the_last_row_and_column():
    # open3d drops a one-pixel rim there; the wall at z = 2 spans exactly [-1, 1] x [-1, 1].
    intrinsics = torch.tensor([[[8.0, 0, 4], [0, 8, 4], [0, 0, 1]]])
    depth = torch.full((1, 8, 8), 2.0)
    scene = Geometry(torch.eye(4)[None], intrinsics, depth, unproject(depth, intrinsics, torch.eye(4)[None]))
    vertices = np.asarray(export.fuse(scene, voxel=0.05).vertices)
    assert vertices[:, :2].min() < -0.9
    assert (vertices[:, :2].max(0) > 0.9).all()
    assert np.abs(vertices[:, 2] - 2).max() < 1e-3


def test_fused_colours_are_the_videos(room):
    voxel = 0.5 * float(room.geometry.depth.median() / room.geometry.intrinsics[0, 0, 0])
    flat = torch.tensor([0.8, 0.4, 0.1])[:, None, None].expand_as(room.video)
    np.testing.assert_allclose(np.asarray(export.fuse(room.geometry, flat, voxel).vertex_colors).T[0], 0.8, atol=0.01)
    np.testing.assert_allclose(np.asarray(export.fuse_cloud(room.geometry, flat).colors).T[2], 0.1, atol=0.01)


def test_what_moves_can_be_left_out_of_the_fusion(moving):
    scene = moving.geometry
    still = export.select(scene, max_motion=1e-4)
    moved = scene.points[~still.valid & scene.valid]
    voxel = float(scene.depth[scene.valid].median() / scene.intrinsics[0, 0, 0])
    with_bodies = np.median(misses(export.fuse(scene, voxel=voxel), moved)) / voxel
    without = np.median(misses(export.fuse(still, voxel=voxel), moved)) / voxel
    assert with_bodies < 2
    assert without > 5


def test_the_invalid_sky_is_not_fused(outdoors):
    scene = outdoors.geometry
    far = scene.depth[scene.valid].max()
    assert np.asarray(export.fuse(scene, voxel=0.3).vertices).max() < 2 * far
    assert len(export.fuse_cloud(scene, voxel=1e-6).points) == int(scene.valid.sum())


def test_depth_that_is_not_valid_leaves_no_trace_in_the_fusion():
    intrinsics = torch.tensor([[[8.0, 0, 4], [0, 8, 4], [0, 0, 1]]])
    depth = torch.full((1, 8, 8), 2.0)
    points = unproject(depth, intrinsics, torch.eye(4)[None])
    valid = (torch.arange(8) % 4 < 2).expand(1, 8, 8)
    placeholder = depth.where(valid, 1.9)
    vertices = np.asarray(
        export.fuse(Geometry(torch.eye(4)[None], intrinsics, placeholder, points, valid=valid), voxel=0.05).vertices
    )
    assert np.abs(vertices[:, 2] - 2).max() < 1e-3


def test_a_fused_cloud_has_one_point_a_voxel(room):
    points = np.asarray(export.fuse_cloud(room.geometry, room.video, voxel=0.3).points)
    assert 100 < len(points) < room.geometry.valid.sum() / 4
    # Each is a mean of points of the room, so it cannot be farther from one than a voxel's diagonal.
    distance = torch.cdist(torch.from_numpy(points).float(), room.geometry.points.reshape(-1, 3)).amin(1)
    assert distance.max() < 0.3 * 3**0.5


def test_min_views_asks_for_agreement(room):
    one = len(export.fuse(room.geometry, voxel=0.2).triangles)
    assert len(export.fuse(room.geometry, voxel=0.2, min_views=8).triangles) < one
    with pytest.raises(ValueError, match="no surface"):
        export.fuse(room.geometry, voxel=0.2, min_views=10)


def test_fused_things_are_saved_as_ply(room, tmp_path):
    mesh, points = export.fuse(room.geometry, room.video, 0.2), export.fuse_cloud(room.geometry, room.video, 0.2)
    export.save_fused(tmp_path / "mesh.ply", mesh)
    export.save_fused(tmp_path / "cloud.ply", points)
    back = trimesh.load(tmp_path / "mesh.ply", process=False)
    assert back.faces.shape == np.asarray(mesh.triangles).shape
    np.testing.assert_allclose(trimesh.load(tmp_path / "cloud.ply").vertices, points.points, atol=1e-5)


# What goes wrong


SAVERS = {"a.ply": export.save_ply, "a.glb": export.save_gltf, "a.rrd": export.save_rerun}


@pytest.mark.parametrize("name", SAVERS)
def test_bad_paths_are_refused_before_any_work(outdoors, tmp_path, name):
    for bad in (tmp_path / "missing" / name, tmp_path / "a.txt"):
        with pytest.raises(ValueError, match=r"cannot write .* must end in \.\w+, in a folder that exists"):
            SAVERS[name](bad, outdoors.geometry)


@pytest.mark.parametrize("fn", [export.cloud, export.fuse, export.fuse_cloud])
def test_bad_inputs_get_one_line(outdoors, fn):
    scene, video = outdoors.geometry, outdoors.video
    nan_pose = scene.c2w.clone()
    nan_pose[2] = torch.nan
    bad = {
        r"one clip at a time, this is a batch \[1\]": (scene.map(lambda x: x[None]), None),
        "T = 5, got": (scene, video[:3]),
        r"RGB in \[0, 1\], got values from -0": (scene, 2 * video - 1),
        "got values from nan": (scene, video * torch.nan),
        "c2w and intrinsics must be finite": (replace(scene, c2w=nan_pose), video),
        "no pixel on stride 1 is valid": (replace(scene, valid=torch.zeros_like(scene.valid)), video),
        "depth must be > 0": (replace(scene, depth=-scene.depth), video),
    }
    for message, arguments in bad.items():
        with pytest.raises(ValueError, match=message) as caught:
            fn(*arguments)
        assert "\n" not in str(caught.value)


def test_bad_options_are_refused_by_name(outdoors):
    scene = outdoors.geometry
    for options in ({"stride": 0}, {"max_points": 0}):
        with pytest.raises(ValueError):
            export.cloud(scene, **options)
    with pytest.raises(ValueError, match="voxel must be > 0"):
        export.fuse(scene, voxel=0.0)
    with pytest.raises(ValueError, match="min_confidence needs"):
        export.select(scene, min_confidence=0.5)
    with pytest.raises(ValueError, match="max_motion needs a geometry with scene_flow"):
        export.select(replace(scene, scene_flow=None, flow_grid=None), max_motion=0.5)
    skewed = scene.intrinsics + torch.tensor([[0.0, 1, 0], [0, 0, 0], [0, 0, 0]])
    with pytest.raises(ValueError, match="no skew"):
        export.fuse(replace(scene, intrinsics=skewed))


@pytest.mark.parametrize(
    ("module", "package", "call"),
    [
        ("trimesh", "trimesh", lambda scene, path: export.save_ply(path / "a.ply", scene)),
        ("trimesh", "trimesh", lambda scene, path: export.save_gltf(path / "a.glb", scene)),
        ("rerun", "rerun-sdk", lambda scene, path: export.save_rerun(path / "a.rrd", scene)),
        ("open3d", "open3d", lambda scene, path: export.fuse(scene)),
        ("open3d", "open3d", lambda scene, path: export.fuse_cloud(scene)),
    ],
)
def test_a_missing_extra_names_the_package_and_the_install(outdoors, tmp_path, monkeypatch, module, package, call):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"^{package} cannot.*pip install vggrpo\[viz\]$") as caught:
        call(outdoors.geometry, tmp_path)
    assert "\n" not in str(caught.value)
    assert caught.value.__suppress_context__
    assert not list(tmp_path.iterdir())


def test_importing_export_loads_no_viewer():
    loaded = "print(*{'trimesh', 'rerun', 'open3d', 'libusb_package'} & set(sys.modules), sep='')"
    code = f"import sys, geometry.export; {loaded}; import trimesh; {loaded}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\ntrimesh\n", "nothing after the import, and the check sees what is loaded"


def test_any_precision_and_gradients_are_fine(outdoors):
    scene = outdoors.geometry.map(lambda x: x if x.dtype == torch.bool else x.double().requires_grad_())
    points, _ = export.cloud(scene, outdoors.video.bfloat16())
    assert torch.equal(points, export.cloud(outdoors.geometry)[0])
    assert points.dtype == torch.float32
    assert not points.requires_grad
