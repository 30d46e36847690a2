"""Bundle adjustment of a whole clip: all cameras and the depth of every cell at once, from displacements.

Sum over edges e = (i -> j) and cells n of r' W r, with r = seen_n - project(T_j^-1 T_i (ray_n, 1) depth_n), plus a
prior on log-depth; minimised over camera poses and log-depths by Gauss-Newton, with outliers re-weighted. Each depth
belongs to one cell of one frame, so depths are eliminated exactly (Schur complement) and a step solves 6 (T - 1)
equations. Nothing is chained from neighbour to neighbour: frames four apart fix what neighbours leave open.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geometry.cameras import cross_matrix, inverse, rigid, so3_exp

STEPS = 6
OUTLIER = 4.0
"""Residuals of so many medians (of the clip's, weighed) count half."""
NEAR = 0.05
"""Smallest depth of a moved point, in multiples of its depth before."""
STEP = 0.3
"""Longest rotation (radians), translation (median depths) and change of log-depth of one step."""
DAMPING = 1e-4
"""Of the diagonal of the reduced equations: what no displacement decides stays as it is."""


class Witnesses(NamedTuple):
    """Displacements along E edges, in normalised image positions (x / z, y / z)."""

    source: Int[Tensor, " E"]
    target: Int[Tensor, " E"]
    rays: Float[Tensor, "B T N 2"]
    """Position of each cell in its own frame."""
    there: Float[Tensor, "B E N 2"]
    """And where it is seen in the target."""
    information: Float[Tensor, "B E N 2 2"]
    """W: symmetric, >= 0; a matrix, because along an edge of the picture a displacement is unknown."""


@torch.no_grad()
def bundle(
    log_depth: Float[Tensor, "B T N"],
    prior: Float[Tensor, "B T N"],
    seen: Witnesses,
    start: Float[Tensor, "B T 4 4"] | None = None,
) -> tuple[Float[Tensor, "B T 4 4"], Float[Tensor, "B T N"]]:
    """Poses `c2w`, the first of them the identity, and log-depths.

    Args:
        log_depth: where depth starts, and what the prior holds it to. It also sets the scale.
        prior: 1 / variance of log-depth.
        seen: displacements; without any the cameras stay where they start.
        start: poses to start from; all the identity by default.
    """
    B, T, _ = log_depth.shape
    unit = log_depth.flatten(1).median(dim=1).values[:, None, None]
    wanted = unit - log_depth
    nearness = wanted.clone()
    eye = torch.eye(4, dtype=log_depth.dtype, device=log_depth.device)
    w2c = eye.repeat(B, T, 1, 1) if start is None else inverse(_scaled(start, torch.exp(-unit)))
    for _ in range(STEPS if T > 1 else 0):
        turn, change = _step(w2c, nearness, wanted, prior, seen)
        nearness = nearness + change.clamp(-STEP, STEP)
        turn = turn.clamp(-STEP, STEP)
        w2c = rigid(so3_exp(turn[..., :3]), turn[..., 3:]) @ w2c
    return _scaled(inverse(w2c), unit.exp()), unit - nearness


def unexplained(
    c2w: Float[Tensor, "B T 4 4"], log_depth: Float[Tensor, "B T N"], seen: Witnesses
) -> Float[Tensor, "B E N 2"]:
    """r of every displacement."""
    moved, _, _ = _moved(inverse(c2w), -log_depth, seen)
    return seen.there - moved[..., :2] / moved[..., 2:]


def _moved(w2c: Tensor, nearness: Tensor, seen: Witnesses) -> tuple[Tensor, Tensor, Tensor]:
    """Points of the source in the target's axes over their first depth `[B E N 3]`, the motion, and 1 / depth."""
    motion = w2c[:, seen.target] @ inverse(w2c[:, seen.source])
    near = nearness.exp()[:, seen.source]
    rays = _homogeneous(seen.rays)[:, seen.source]
    moved = rays @ motion[..., :3, :3].mT + near[..., None] * motion[..., None, :3, 3]
    return torch.cat([moved[..., :2], moved[..., 2:].clamp(min=NEAR)], dim=-1), motion, near


def _step(w2c: Tensor, nearness: Tensor, wanted: Tensor, prior: Tensor, seen: Witnesses) -> tuple[Tensor, Tensor]:
    """One Gauss-Newton step: rotation and translation of every camera `[B T 6]`, change of log 1/depth `[B T N]`."""
    B, T, N = nearness.shape
    moved, motion, near = _moved(w2c, nearness, seen)
    rotation, shift = motion[..., None, :3, :3], motion[..., None, :3, 3:]
    residual = seen.there - moved[..., :2] / moved[..., 2:]
    size = (residual[..., None, :] @ seen.information @ residual[..., None])[..., 0, 0].clamp(min=0).sqrt()
    scale = OUTLIER * size.flatten(1).median(dim=1).values.clamp(min=1e-6)[:, None, None]
    weight = seen.information / (1 + (size / scale).square())[..., None, None]
    lens = _lens(moved)
    turned = lens @ rotation
    close = near[..., None, None]
    to_target = torch.cat([-lens @ cross_matrix(moved), close * lens], dim=-1)
    to_source = torch.cat([turned @ cross_matrix(_homogeneous(seen.rays)[:, seen.source]), -close * turned], dim=-1)
    poses = torch.cat([to_target, to_source], dim=-1)
    depth = (lens @ shift)[..., 0] * near[..., None]
    weighted = weight @ poses
    own = (weight @ depth[..., None])[..., 0]
    normal = weighted.flatten(2, 3).mT @ poses.flatten(2, 3)
    pull = (weighted.mT @ residual[..., None]).sum(2)[..., 0]
    mixed = (poses.mT @ own[..., None])[..., 0]

    # Sums over edges: poses with poses [6T 6T], poses with depths [6T TN], depths with themselves [TN].
    i, j = seen.source, seen.target
    table, cross = nearness.new_zeros(B, T * T, 6, 6), nearness.new_zeros(B, T * T, N, 6)
    gradient, curvature, push = nearness.new_zeros(B, T, 6), prior + 1e-9, prior * (wanted - nearness)
    for side, frame in ((0, j), (6, i)):
        gradient.index_add_(1, frame, pull[..., side : side + 6])
        cross.index_add_(1, frame * T + i, mixed[..., side : side + 6])
        for other, partner in ((0, j), (6, i)):
            table.index_add_(1, frame * T + partner, normal[..., side : side + 6, other : other + 6])
    curvature = curvature.index_add(1, i, (depth * own).sum(-1)).flatten(1)
    push = push.index_add(1, i, (own * residual).sum(-1)).flatten(1)
    table = table.unflatten(1, (T, T)).transpose(2, 3).reshape(B, 6 * T, 6 * T)
    cross = cross.unflatten(1, (T, T)).permute(0, 1, 4, 2, 3).reshape(B, 6 * T, T * N)

    share = cross / curvature[:, None]
    reduced = (table - share @ cross.mT)[:, 6:, 6:]
    right = (gradient.flatten(1) - (share @ push[..., None])[..., 0])[:, 6:]
    reduced = reduced + torch.diag_embed(DAMPING * reduced.diagonal(dim1=-2, dim2=-1).clamp(min=0) + 1e-9)
    turn = torch.cat([right.new_zeros(B, 6), torch.linalg.solve(reduced, right)], dim=1)  # frame 0 is the world
    change = (push - (cross.mT @ turn[..., None])[..., 0]) / curvature
    return turn.unflatten(1, (T, 6)), change.unflatten(1, (T, N))


def _lens(point: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 2 3"]:
    """Derivative of (x / z, y / z)."""
    x, y, z = point.unbind(-1)
    zero = torch.zeros_like(z)
    rows = [torch.stack([1 / z, zero, -x / z**2], dim=-1), torch.stack([zero, 1 / z, -y / z**2], dim=-1)]
    return torch.stack(rows, dim=-2)


def _homogeneous(x: Float[Tensor, "*batch 2"]) -> Float[Tensor, "*batch 3"]:
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)


def _scaled(pose: Float[Tensor, "B T 4 4"], factor: Float[Tensor, "B 1 1"]) -> Float[Tensor, "B T 4 4"]:
    return rigid(pose[..., :3, :3], pose[..., :3, 3] * factor)
