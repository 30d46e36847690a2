"""Rotations against scipy, projection against its inverse and against kornia, motions against matrices."""

import kornia
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from geometry.cameras import (
    anchored,
    cross_matrix,
    inverse,
    pinhole,
    pixel_grid,
    project,
    relative,
    rigid,
    so3_exp,
    so3_log,
    transform,
    unproject,
)


def random_pose(*batch, dtype=torch.float64):
    generator = torch.Generator().manual_seed(len(batch))
    omega = torch.randn(*batch, 3, dtype=dtype, generator=generator)
    return rigid(so3_exp(omega), torch.randn(*batch, 3, dtype=dtype, generator=generator))


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-8, 1e-4, 0.1, 1.0, 3.0, np.pi - 1e-3, np.pi - 1e-6, np.pi - 1e-9])
def test_so3_log_agrees_with_scipy_near_zero_and_near_pi(angle):
    axis = np.random.default_rng(0).normal(size=(200, 3))
    omega = angle * axis / np.linalg.norm(axis, axis=1, keepdims=True)
    rotation = Rotation.from_rotvec(omega).as_matrix()
    log = so3_log(torch.from_numpy(rotation)).numpy()
    np.testing.assert_allclose(log, Rotation.from_matrix(rotation).as_rotvec(), atol=1e-9)
    np.testing.assert_allclose(so3_exp(torch.from_numpy(omega)).numpy(), rotation, atol=1e-9)
    naive = np.arccos(np.clip((np.trace(rotation, axis1=1, axis2=2) - 1) / 2, -1, 1))
    if angle in (1e-8, np.pi - 1e-9):  # the control: the angle by arccos, in the same precision, is not good enough
        assert np.abs(naive - angle).max() > 1e-10


def test_so3_log_is_differentiable_at_the_identity():
    omega = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: so3_log(so3_exp(w)), (omega,))
    assert so3_log(so3_exp(omega)).sum().backward() is None
    torch.testing.assert_close(omega.grad, torch.ones_like(omega))


def test_the_cross_matrix_is_the_cross_product():
    v, x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close((cross_matrix(v) @ x[..., None])[..., 0], torch.linalg.cross(v, x))


def test_rigid_motions_invert_and_compose_like_matrices():
    pose = random_pose(2, 5)
    torch.testing.assert_close(inverse(pose), torch.linalg.inv(pose))
    torch.testing.assert_close(relative(pose), torch.linalg.inv(pose[:, :-1]) @ pose[:, 1:])
    torch.testing.assert_close(anchored(pose)[:, 0], torch.eye(4, dtype=torch.float64).expand(2, 4, 4))
    torch.testing.assert_close(relative(anchored(pose)), relative(pose))
    points = torch.randn(2, 5, 7, 3, dtype=torch.float64)
    homogeneous = torch.cat([points, torch.ones_like(points[..., :1])], -1) @ pose.mT
    torch.testing.assert_close(transform(pose, points), homogeneous[..., :3])


def test_projection_undoes_unprojection_at_pixel_centres():
    depth = 1 + torch.rand(2, 3, 6, 9, dtype=torch.float64)
    intrinsics = pinhole(torch.tensor([50.0, 70.0], dtype=torch.float64), 6, 9)[:, None].repeat(1, 3, 1, 1)
    intrinsics[..., 0, 1] = 0.3  # skew
    c2w = random_pose(2, 3)
    pixels, back = project(unproject(depth, intrinsics, c2w), intrinsics, c2w)
    torch.testing.assert_close(pixels, pixel_grid(6, 9, depth).expand_as(pixels))
    torch.testing.assert_close(back, depth)
    assert pixels[0, 0, 0, 0].tolist() == pytest.approx([0.5, 0.5])


def test_kornia_projects_to_the_same_pixels():
    intrinsics = pinhole(torch.tensor(60.0, dtype=torch.float64), 8, 8)[None]
    points = torch.randn(1, 20, 3, dtype=torch.float64) + torch.tensor([0, 0, 4.0])
    ours, _ = project(points, intrinsics, torch.eye(4, dtype=torch.float64)[None])
    theirs = kornia.geometry.camera.project_points(points[0], intrinsics.expand(20, 3, 3))
    torch.testing.assert_close(ours[0], theirs)


def test_the_field_of_view_is_what_the_edges_of_the_image_see():
    intrinsics = pinhole(torch.tensor(90.0), 4, 8)
    left, right = (0 - intrinsics[0, 2]) / intrinsics[0, 0], (8 - intrinsics[0, 2]) / intrinsics[0, 0]
    assert (left.item(), right.item()) == pytest.approx((-1.0, 1.0))
    assert intrinsics[0, 0] == intrinsics[1, 1]


def test_points_behind_the_camera_have_depth_below_zero():
    _, depth = project(torch.tensor([[[0.0, 0, -2], [0, 0, 0]]]), torch.eye(3)[None], torch.eye(4)[None])
    assert depth.tolist() == [[-2.0, 0.0]]
