"""Cameras of a whole clip at once, from depth and displacements between frames near and far; differentiable.

Over all poses T but the first, Gauss-Newton minimises, with outliers re-weighted,

    sum over edges e = (i -> j) and tokens n of r' W r / (s^2 SHARED)  +  sum over inner frames of |a / STEADY|^2

r = seen_n - project(T_j^-1 T_i (ray_n, 1) depth_n); s^2 is the mean of r' W r that the first sum alone, minimised
before, leaves in this clip; a is the change of the motion from frame to frame. Depth is given. An edge enters by the
six numbers of its own relative motion, as in `solver.py`; the adjoint of that motion hands them on to the two cameras.
Nothing is chained, so what frames four apart see decides what neighbours leave open.

The second sum is the usual prior of continuous-time estimation, white noise on acceleration (Barfoot, State Estimation
for Robotics, 2017, ch. 11). Where one rigid motion explains what is seen, s is small and the prior has no say: shake is
found. Where none does, because pictures bend or latents are coarse, a camera that shakes is the least likely reason.

All steps but the last are taken without gradient. At the solution x* of g(x*, d) = 0, g the gradient of the cost, a
step of Gauss-Newton from the constant x* has the derivative -H^-1 dg/dd: that of the solution itself, by the implicit
function theorem, but for the curvature of the residuals, which Gauss-Newton leaves out of H. So one step is all that
autograd sees.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geometry.cameras import inverse, rigid, so3_exp, so3_log
from geometry.models.solver import DAMPING, NEAR, STEP

STEPS = 3
"""Gauss-Newton steps without the prior, from a path that chains neighbours, and again as many with it."""
OUTLIER = 3.0
"""Residuals of so many medians (of the clip's, weighed) count half (Cauchy)."""

SHARED = 30.0
"""Displacements whose errors are one and the same: windows overlap, and pictures bend smoothly."""
STEADY = (0.0024, 0.0073)
"""Standard deviation of a camera's acceleration: radians, and mean depths, per frame and frame."""


class Sightings(NamedTuple):
    """Displacements along E edges, in normalised image positions (x / z, y / z)."""

    source: Int[Tensor, " E"]
    target: Int[Tensor, " E"]
    rays: Float[Tensor, "B T N 2"]
    """Position of each token in its own frame."""
    there: Float[Tensor, "B E N 2"]
    """And where it is seen in the target."""
    information: Float[Tensor, "B E N 2 2"]
    """W, up to one factor for each clip: symmetric, >= 0."""


def solve_path(
    depth: Float[Tensor, "B T N"],
    seen: Sightings,
    start: Float[Tensor, "B T 4 4"],
    *,
    steps: int = STEPS,
    robust: bool = True,
    steady: bool = True,
    shared: float = SHARED,
) -> Float[Tensor, "B T 4 4"]:
    """Poses `c2w`, the first the identity; gradients flow to depth and sightings, not to the start.

    Args:
        depth: z-depth of the tokens, which also sets the unit of translation.
        seen: displacements; without any the path stays where it starts.
        start: poses to start from, the first the identity.
        steps: Gauss-Newton steps of a round, the very last of them differentiable.
        robust: whether outliers lose their say; the weights carry no gradient.
        steady: whether a second round knows that acceleration is unlikely; how unlikely carries no gradient.
        shared: what that knowledge counts: how many sightings have one and the same error.
    """
    if not len(seen.source) or steps < 1:
        return start
    unit = depth.detach().flatten(1).mean(1)[:, None, None]
    total = seen.information.detach().diagonal(dim1=-2, dim2=-1).sum(-1).flatten(1).mean(1).clamp(min=1e-12)
    xx, xy, _, yy = (seen.information / total[:, None, None, None, None]).flatten(-2).mT.contiguous().unbind(-2)
    points = torch.cat([seen.rays, torch.ones_like(seen.rays[..., :1])], dim=-1) * (depth / unit)[..., None]
    points = points[:, seen.source].mT.contiguous()
    w2c = inverse(_scaled(start.detach(), 1 / unit))
    problem = _Problem(seen.source, seen.target, points, seen.there.mT.contiguous(), xx, xy, yy, robust)
    share = points.new_zeros(len(points))
    with torch.no_grad():
        for _ in range(steps if steady else steps - 1):
            w2c = _moved(w2c, _step(w2c, problem, share)[0])
        if steady:
            share = shared * _step(w2c, problem, share)[1]
            for _ in range(steps - 1):
                w2c = _moved(w2c, _step(w2c, problem, share)[0])
    w2c = _moved(w2c, _step(w2c, problem, share)[0])
    return _scaled(inverse(w2c), unit)


class _Problem(NamedTuple):
    """Sightings with tokens on the last axis, which makes their sums products of large matrices."""

    source: Int[Tensor, " E"]
    target: Int[Tensor, " E"]
    points: Float[Tensor, "B E 3 N"]
    there: Float[Tensor, "B E 2 N"]
    xx: Float[Tensor, "B E N"]
    xy: Float[Tensor, "B E N"]
    yy: Float[Tensor, "B E N"]
    robust: bool


def _step(
    w2c: Float[Tensor, "B T 4 4"], given: _Problem, share: Float[Tensor, " B"]
) -> tuple[Float[Tensor, "B _ 6"], Float[Tensor, " B"]]:
    """Rotation and translation `[B T-1 6]` of every camera but the first, to be applied after its w2c; and s^2 before.

    `share`: what the prior counts.
    """
    B, T = w2c.shape[:2]
    i, j = given.source, given.target
    motion = w2c[:, j] @ inverse(w2c[:, i])
    moved = motion[..., :3, :3] @ given.points + motion[..., :3, 3:]
    z = torch.maximum(moved[..., 2, :], NEAR * given.points[..., 2, :])
    at = moved[..., :2, :] / z[..., None, :]
    right, down = (given.there - at).unbind(-2)
    pulled = given.xx * right + given.xy * down, given.xy * right + given.yy * down
    square = (right * pulled[0] + down * pulled[1]).detach().clamp(min=0)
    say = _say(square) if given.robust else torch.ones_like(square)
    across, along = _jacobian(at.detach(), z.detach())
    pull = across @ (say * pulled[0])[..., None] + along @ (say * pulled[1])[..., None]
    with torch.no_grad():  # the curvature of a step that leads nowhere: its gradient meets a zero
        xx, xy, yy = ((say * w)[..., None, :] for w in (given.xx, given.xy, given.yy))
        normal = (xx * across + xy * along) @ across.mT + (xy * across + yy * along) @ along.mT
        back = -_adjoint(motion)
        mixed = back.mT @ normal
        table = w2c.new_zeros(B, T * T, 6, 6)
        for row, column, block in ((j, j, normal), (i, j, mixed), (j, i, mixed.mT), (i, i, mixed @ back)):
            table.index_add_(1, row * T + column, block)
        table = table.unflatten(1, (T, T)).transpose(2, 3).reshape(B, 6 * T, 6 * T)
        prior, push = _steadiness(w2c)
        table = (table + share[:, None, None] * prior)[:, 6:, 6:]
        table = table + torch.diag_embed(DAMPING * table.diagonal(dim1=-2, dim2=-1) + 1e-9)
        error = (say * square).flatten(1).sum(1) / say.flatten(1).sum(1)
    total = pull.new_zeros(B, T, 6, 1).index_add(1, j, pull).index_add(1, i, back.mT @ pull).flatten(1)
    total = total + share[:, None] * push
    return torch.linalg.solve(table, total[:, 6:]).unflatten(1, (T - 1, 6)).clamp(-STEP, STEP), error


def _steadiness(w2c: Float[Tensor, "B T 4 4"]) -> tuple[Float[Tensor, "B T6 T6"], Float[Tensor, "B T6"]]:
    """Normal equations of the prior."""
    B, T = w2c.shape[:2]
    motion = w2c[:, 1:] @ inverse(w2c[:, :-1])
    velocity = torch.cat([so3_log(motion[..., :3, :3]), motion[..., :3, 3]], dim=-1)
    slope = w2c.new_zeros(B, T - 1, 6, T, 6)  # of velocities by the small motions after each w2c
    index = torch.arange(T - 1, device=w2c.device)
    slope[:, index, :, index + 1] = torch.eye(6, dtype=w2c.dtype, device=w2c.device)
    slope[:, index, :, index] = -_adjoint(motion).transpose(0, 1)
    scale = torch.cat([w2c.new_full((3,), 1 / STEADY[0]), w2c.new_full((3,), 1 / STEADY[1])])
    change = (slope.diff(dim=1) * scale[:, None, None]).flatten(3).flatten(1, 2)
    acceleration = (velocity.diff(dim=1) * scale).flatten(1)
    return change.mT @ change, -(change.mT @ acceleration[..., None])[..., 0]


def _say(square: Float[Tensor, "B E N"]) -> Float[Tensor, "B E N"]:
    """Cauchy's weight of each displacement, by r' W r."""
    scale = OUTLIER**2 * square.flatten(1).median(dim=1).values.clamp(min=1e-18)
    return 1 / (1 + square / scale[:, None, None])


def _jacobian(
    at: Float[Tensor, "B E 2 N"], z: Float[Tensor, "B E N"]
) -> tuple[Float[Tensor, "B E 6 N"], Float[Tensor, "B E 6 N"]]:
    """Of the image position (u, and v) under a small rotation and translation applied after the motion."""
    (u, v), near, zero = at.unbind(-2), 1 / z, torch.zeros_like(z)
    across = torch.stack([-u * v, 1 + u * u, -v, near, zero, -u * near], dim=-2)
    return across, torch.stack([-1 - v * v, u * v, u, zero, near, -v * near], dim=-2)


def _moved(w2c: Float[Tensor, "B T 4 4"], update: Float[Tensor, "B _ 6"]) -> Float[Tensor, "B T 4 4"]:
    step = rigid(so3_exp(update[..., :3]), update[..., 3:])
    return torch.cat([w2c[:, :1], step @ w2c[:, 1:]], dim=1)


def _adjoint(motion: Float[Tensor, "*batch 4 4"]) -> Float[Tensor, "*batch 6 6"]:
    """A small motion (rotation, translation) before `motion`, as one after it."""
    rotation, (x, y, z) = motion[..., :3, :3], motion[..., :3, 3].unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))
    top = torch.cat([rotation, torch.zeros_like(rotation)], dim=-1)
    return torch.cat([top, torch.cat([cross @ rotation, rotation], dim=-1)], dim=-2)


def _scaled(pose: Float[Tensor, "B T 4 4"], factor: Float[Tensor, "B 1 1"]) -> Float[Tensor, "B T 4 4"]:
    return rigid(pose[..., :3, :3], pose[..., :3, 3] * factor)
