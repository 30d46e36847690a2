"""Cameras of a whole clip at once, from depth and displacements between frames near and far; differentiable.

Over all poses T but the first, Gauss-Newton minimises, with outliers re-weighted,

    sum over edges e = (i -> j), tokens n of r' W r / (s^2 SHARED) + sum over axes of |v / sigma_v|^2 + |a / sigma_a|^2

r = seen_n - project(T_j^-1 T_i (ray_n, 1) depth_n); s^2 is the mean of r' W r that the first sum alone, minimised
before, leaves in this clip; v is the motion from each frame to the next, a its change. Depth is given. An edge enters
by the six numbers of its own relative motion, as in `solver.py`; the adjoint of that motion hands them on to the two
cameras. Nothing is chained, so what frames four apart see decides what neighbours leave open.

The second sum is a prior whose widths are the clip's own: one for each of the three turns and three translations, found
by expectation maximisation (Dempster, Laird & Rubin, 1977; for priors that switch off what a model does not need:
MacKay, 1992, and Tipping, 2001). A width is the mean of what v (or a) is and of how far it could be otherwise. What a
clip shows of sway makes the width of the sway's axis large, and it stays; noise about a pan is narrow, and goes; and an
axis along which nothing is seen to move does not share in what others leave open, as a turn does in a sideways move.

All steps but the last are taken without gradient. At the solution x* of g(x*, d) = 0, g the gradient of the cost, a
step of Gauss-Newton from the constant x* has the derivative -H^-1 dg/dd: that of the solution itself, by the implicit
function theorem, but for the curvature of the residuals, which Gauss-Newton leaves out of H. So one step is all that
autograd sees. Where the prior says much, residuals stay, and the gradient to depth was seen to be a tenth and more off.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geometry.cameras import cross_matrix, inverse, rigid, so3_exp, so3_log
from geometry.models.solver import DAMPING, NEAR, STEP

STEPS = 3
"""Gauss-Newton steps without the prior, from a path that chains neighbours, and again as many at its last widths."""
ROUNDS = 4
"""Of estimating widths, from what the first sum alone gives, a step of Gauss-Newton each. Many more, and what is slow
along all axes is taken for still along some (launch/LOG.md)."""
OUTLIER = 3.0
"""Residuals of so many medians (of the clip's, weighed) count half (Cauchy)."""

SHARED = 6.0
"""Displacements whose errors are one and the same: windows overlap, and pictures bend smoothly."""
NARROWEST = 1e-4
"""Width below which an axis is as good as still: radians, and mean depths, per frame (and frame)."""


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
    prior: bool = True,
) -> Float[Tensor, "B T 4 4"]:
    """Poses `c2w`, the first the identity; gradients flow to depth and sightings, not to the start.

    Args:
        depth: z-depth of the tokens, which also sets the unit of translation.
        seen: displacements; without any the path stays where it starts.
        start: poses to start from, the first the identity.
        steps: Gauss-Newton steps of a round, the very last of them differentiable.
        robust: whether outliers lose their say; the weights carry no gradient.
        prior: whether the clip's own widths of velocity and acceleration are; they carry no gradient.
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
    known = None
    with torch.no_grad():
        for _ in range(steps if prior else steps - 1):
            w2c = _moved(w2c, _step(w2c, problem).update)
        if prior:
            step = _step(w2c, problem)
            share = SHARED * step.error
            known = _Prior(share, _widths(w2c, torch.zeros_like(step.table)))
            for _ in range(ROUNDS):
                step = _step(w2c, problem, known)
                w2c = _moved(w2c, step.update)
                known = _Prior(share, _widths(w2c, share[:, None, None] * torch.linalg.inv(step.table)))
            for _ in range(steps - 1):
                w2c = _moved(w2c, _step(w2c, problem, known).update)
    w2c = _moved(w2c, _step(w2c, problem, known).update)
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


class _Prior(NamedTuple):
    share: Float[Tensor, " B"]
    """What it counts: s^2 SHARED, since the equations are not divided by that."""
    width: Float[Tensor, "B 2 6"]
    """Of velocity and acceleration, by axis."""


class _Step(NamedTuple):
    update: Float[Tensor, "B _ 6"]
    """Rotation and translation of every camera but the first, to be applied after its w2c."""
    table: Float[Tensor, "B _ _"]
    """What it solved: the inverse of their covariance, times what the prior counts."""
    error: Float[Tensor, " B"]
    """s^2, before it."""


def _step(w2c: Float[Tensor, "B T 4 4"], given: _Problem, known: _Prior | None = None) -> _Step:
    """One of Gauss-Newton."""
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
        if known is not None:
            prior, push = _prior(w2c, known.width)
            table = table + known.share[:, None, None] * prior
        table = table[:, 6:, 6:]
        table = table + torch.diag_embed(DAMPING * table.diagonal(dim1=-2, dim2=-1) + 1e-9)
        error = (say * square).flatten(1).sum(1) / say.flatten(1).sum(1)
    total = pull.new_zeros(B, T, 6, 1).index_add(1, j, pull).index_add(1, i, back.mT @ pull).flatten(1)
    if known is not None:
        total = total + known.share[:, None] * push
    update = torch.linalg.solve(table, total[:, 6:]).unflatten(1, (T - 1, 6)).clamp(-STEP, STEP)
    return _Step(update, table, error)


def _prior(
    w2c: Float[Tensor, "B T 4 4"], width: Float[Tensor, "B 2 6"]
) -> tuple[Float[Tensor, "B T6 T6"], Float[Tensor, "B T6"]]:
    """Its normal equations."""
    size = 6 * w2c.shape[1]
    normal, push = w2c.new_zeros(len(w2c), size, size), w2c.new_zeros(len(w2c), size)
    for (motion, slope), wide in zip(_motions(w2c), width.unbind(1), strict=True):
        rows = (slope / wide[:, None, :, None]).flatten(1, 2)
        normal = normal + rows.mT @ rows
        push = push - (rows.mT @ (motion / wide[:, None]).flatten(1)[..., None])[..., 0]
    return normal, push


def _widths(w2c: Float[Tensor, "B T 4 4"], covariance: Float[Tensor, "B _ _"]) -> Float[Tensor, "B 2 6"]:
    """Root mean square of velocity and acceleration, by axis, as expected when cameras are as uncertain as that."""
    found = []
    for motion, slope in _motions(w2c):
        free = slope[..., 6:]
        spread = ((free @ covariance[:, None]) * free).sum(-1)
        found.append((motion**2 + spread).sum(1) / max(1, motion.shape[1]))
    return torch.stack(found, dim=1).sqrt().clamp(min=NARROWEST)


def _motions(w2c: Float[Tensor, "B T 4 4"]) -> list[tuple[Float[Tensor, "B _ 6"], Float[Tensor, "B _ 6 T6"]]]:
    """Velocities and accelerations (turns, translations), and how they change with small motions after each w2c."""
    B, T = w2c.shape[:2]
    motion = w2c[:, 1:] @ inverse(w2c[:, :-1])
    turn, move = so3_log(motion[..., :3, :3]), motion[..., :3, 3]
    velocity = torch.cat([turn, move], dim=-1)
    after = torch.eye(6, dtype=w2c.dtype, device=w2c.device).repeat(B, T - 1, 1, 1)
    after[..., :3, :3] -= cross_matrix(turn) / 2  # but for terms of second order
    after[..., 3:, :3] -= cross_matrix(move)
    slope = w2c.new_zeros(B, T - 1, 6, T, 6)
    index = torch.arange(T - 1, device=w2c.device)
    slope[:, index, :, index + 1] = after.transpose(0, 1)
    slope[:, index, :, index] = -(after @ _adjoint(motion)).transpose(0, 1)
    slope = slope.flatten(3)
    return [(velocity, slope), (velocity.diff(dim=1), slope.diff(dim=1))]


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
    rotation = motion[..., :3, :3]
    top = torch.cat([rotation, torch.zeros_like(rotation)], dim=-1)
    return torch.cat([top, torch.cat([cross_matrix(motion[..., :3, 3]) @ rotation, rotation], dim=-1)], dim=-2)


def _scaled(pose: Float[Tensor, "B T 4 4"], factor: Float[Tensor, "B 1 1"]) -> Float[Tensor, "B T 4 4"]:
    return rigid(pose[..., :3, :3], pose[..., :3, 3] * factor)
