"""Camera motion from correspondence and depth: weighted Gauss-Newton on reprojection, differentiable throughout.

A plain transformer learns no pose at the budgets of a CPU; one that has to explain its own correspondence and its own
depth by a rigid motion does, since then only two local quantities remain to be learnt. Image positions are normalised
here (x / z, y / z), so nothing below knows of pixels. Conventions in `geometry/types.py`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from geometry.cameras import inverse, rigid, so3_exp, so3_log

DAMPING = 1e-4
"""Of the diagonal of J'WJ: what no correspondence decides stays as it is."""
OUTLIER = 2.0
"""Residuals of so many medians count half (Cauchy): bodies that move by themselves drop out."""
NEAR = 0.05
"""Smallest depth of a moved point, in multiples of its depth before."""
STEP = 0.3
"""Longest rotation (radians) and translation (mean depths) of one step, per axis."""


def solve_motion(
    depth: Float[Tensor, "*batch N"],
    source: Float[Tensor, "*batch N 2"],
    target: Float[Tensor, "*batch N 2"],
    information: Float[Tensor, "*batch N 2 2"],
    *,
    steps: int = 4,
    robust: bool = True,
    start: Float[Tensor, "*batch 4 4"] | None = None,
) -> Float[Tensor, "*batch 4 4"]:
    """The rigid motion that brings the points of one camera's axes into those of another camera.

    It minimises sum_n r_n' W_n r_n with r_n = target_n - project(M (source_n, 1) depth_n) by Gauss-Newton in the
    tangent space of M; gradients flow to all four. With `robust` each step re-weights by the residuals before it
    (without gradient).

    Args:
        depth: z-depth of N points in the first camera.
        source: their normalised image positions there.
        target: and in the second camera.
        information: W, symmetric and >= 0, up to one factor. A matrix, not a weight: on an edge the displacement is
            known across it and unknown along it, and with weights alone such points mislead as much as they help.
        steps: Gauss-Newton steps.
        robust: whether outliers lose their say.
        start: where to start; the identity by default.
    """
    unit = depth.detach().mean(-1)[..., None]
    points = torch.cat([source, torch.ones_like(source[..., :1])], dim=-1) * (depth / unit)[..., None]
    total = information.diagonal(dim1=-2, dim2=-1).sum((-2, -1)).clamp(min=1e-12)
    share = information / total[..., None, None, None]
    eye = torch.eye(4, dtype=depth.dtype, device=depth.device).expand(*depth.shape[:-1], 4, 4)
    motion = eye if start is None else rigid(start[..., :3, :3], start[..., :3, 3] / unit)
    for _ in range(steps):
        moved = points @ motion[..., :3, :3].mT + motion[..., None, :3, 3]
        z = torch.maximum(moved[..., 2], NEAR * points[..., 2])
        at = moved[..., :2] / z[..., None]
        residual = (target - at)[..., None]
        say = share * _cauchy(share, residual) if robust else share
        jacobian = _jacobian(at, z)
        weighted = say @ jacobian
        normal = jacobian.flatten(-3, -2).mT @ weighted.flatten(-3, -2)
        pull = (weighted.mT @ residual).sum(-3)[..., 0]
        damping = DAMPING * normal.diagonal(dim1=-2, dim2=-1).detach() + 1e-9
        update = torch.linalg.solve(normal + torch.diag_embed(damping), pull).clamp(-STEP, STEP)
        motion = rigid(so3_exp(update[..., :3]), update[..., 3:]) @ motion
    return rigid(motion[..., :3, :3], motion[..., :3, 3] * unit)


def solve_relative(
    depth: Float[Tensor, "*batch 2 N"],
    rays: Float[Tensor, "*batch N 2"],
    there: Float[Tensor, "*batch 2 N 2"],
    information: Float[Tensor, "*batch 2 N 2 2"],
    *,
    steps: int = 4,
) -> tuple[Float[Tensor, "*batch 4 4"], Float[Tensor, "*batch 2 4 4"]]:
    """Camera i+1 in camera i, from both directions, and what each direction alone found.

    Index 0 of the axis of two: points of frame i seen in i+1; index 1: points of i+1 seen in i. The relative pose is
    half way between the inverse of the first motion and the second.
    """
    source = rays[..., None, :, :].expand_as(there)
    both = solve_motion(depth, source, there, information, steps=steps)
    ahead, back = inverse(both[..., 0, :, :]), both[..., 1, :, :]
    between = so3_log(ahead[..., :3, :3].mT @ back[..., :3, :3])
    rotation = ahead[..., :3, :3] @ so3_exp(0.5 * between)
    return rigid(rotation, 0.5 * (ahead[..., :3, 3] + back[..., :3, 3])), both


def chain(relative: Float[Tensor, "*batch pairs 4 4"]) -> Tensor:
    """Poses `[*batch pairs+1 4 4]` of a path from camera i+1 in camera i; the first is the identity."""
    poses = [torch.eye(4, dtype=relative.dtype, device=relative.device).expand(*relative.shape[:-3], 4, 4)]
    for i in range(relative.shape[-3]):
        poses.append(poses[-1] @ relative[..., i, :, :])
    return torch.stack(poses, dim=-3)


def triangulate(
    motion: Float[Tensor, "*batch 4 4"], source: Float[Tensor, "*batch N 2"], target: Float[Tensor, "*batch N 2"]
) -> tuple[Float[Tensor, "*batch N"], Float[Tensor, "*batch N"], Float[Tensor, "*batch N"]]:
    """Inverse depth in the first camera by least squares, the parallax it rests on, and what it leaves unexplained.

    target x (R s + t / z) = 0 is linear in 1 / z: with a = t_xy - target t_z and b = target (R s)_z - (R s)_xy it is
    a / z = b. Parallax is |a|, the residual |b - a / z|; both are in normalised image units where z = 1.
    """
    ray = torch.cat([source, torch.ones_like(source[..., :1])], dim=-1) @ motion[..., :3, :3].mT
    t = motion[..., None, :3, 3]
    a, b = t[..., :2] - target * t[..., 2:], target * ray[..., 2:] - ray[..., :2]
    squared = a.square().sum(-1)
    inverse_depth = (a * b).sum(-1) / squared.clamp(min=1e-12)
    return inverse_depth, squared.sqrt(), (b - inverse_depth[..., None] * a).norm(dim=-1)


@torch.no_grad()
def _cauchy(share: Float[Tensor, "*batch N 2 2"], residual: Float[Tensor, "*batch N 2 1"]) -> Tensor:
    size = (residual.mT @ share @ residual)[..., 0].clamp(min=0).sqrt()
    scale = OUTLIER * size.median(dim=-2, keepdim=True).values.clamp(min=1e-12)
    return 1 / (1 + (size / scale).square())[..., None]


def _jacobian(at: Float[Tensor, "*batch N 2"], z: Float[Tensor, "*batch N"]) -> Float[Tensor, "*batch N 2 6"]:
    """Of the image position under a small rotation and translation applied after the motion."""
    u, v, near, zero = at[..., 0], at[..., 1], 1 / z, torch.zeros_like(z)
    across = torch.stack([-u * v, 1 + u * u, -v, near, zero, -u * near], dim=-1)
    down = torch.stack([-1 - v * v, u * v, u, zero, near, -v * near], dim=-1)
    return torch.stack([across, down], dim=-2)
