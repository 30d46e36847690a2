"""The rewards once more, slowly: loops over frames and points, scipy's rotations, no tricks. One clip, float64."""

import math

import numpy as np
from scipy.spatial.transform import Rotation

from geometry.types import Geometry


def motion_smoothness(scene: Geometry, floor: float) -> float:
    c2w = scene.c2w.double().numpy()
    T = len(c2w)
    unit = median_depth(scene)
    v = [c2w[i + 1, :3, 3] - c2w[i, :3, 3] for i in range(T - 1)]
    omega = [Rotation.from_matrix(c2w[i, :3, :3].T @ c2w[i + 1, :3, :3]).as_rotvec() for i in range(T - 1)]
    halves = []
    for step, least in ((v, floor * unit), (omega, floor)):
        errors = []
        for i in range(1, T - 1):
            acceleration = np.linalg.norm(step[i] - step[i - 1])
            speed = max(np.linalg.norm(step[i]) + np.linalg.norm(step[i - 1]), least)
            errors.append(0.0 if speed == 0 else acceleration / speed)
        halves.append(1 / (1 + sum(errors) / (T - 2)))
    return sum(halves) / 2


def reprojection_consistency(scene: Geometry, relative: bool, exclude_self: bool, threshold: float = 0.004) -> float:
    depth, points = scene.depth.double().numpy(), scene.points.double().numpy()
    c2w, intrinsics = scene.c2w.double().numpy(), scene.intrinsics.double().numpy()
    T, H, W = depth.shape
    unit = median_depth(scene) if relative else 1.0
    usable = np.ones((T, H, W), bool) if scene.valid is None else scene.valid.numpy().copy()
    if scene.scene_flow is not None:
        usable &= np.linalg.norm(scene.scene_flow.double().numpy(), axis=-1) <= threshold * unit
    errors = []
    for i in range(T):
        nearest: dict[tuple[int, int], tuple[float, float, float]] = {}
        w2c = np.linalg.inv(c2w[i])
        for j in range(T):
            if exclude_self and j == i:
                continue
            for y in range(H):
                for x in range(W):
                    if not usable[j, y, x]:
                        continue
                    camera = w2c[:3, :3] @ points[j, y, x] + w2c[:3, 3]
                    if camera[2] <= 1e-6:
                        continue
                    u, v, _ = intrinsics[i] @ (camera / camera[2])
                    pixel = (math.floor(v), math.floor(u))
                    if 0 <= pixel[0] < H and 0 <= pixel[1] < W and camera[2] < nearest.get(pixel, (math.inf,))[0]:
                        nearest[pixel] = (camera[2], u, v)
        gaps = []
        for (row, column), (z, u, v) in nearest.items():
            if not exclude_self:
                if usable[i, row, column]:
                    gaps.append(abs(z - depth[i, row, column]))
                continue
            seen = between(depth[i], usable[i], u, v)
            if seen is not None and z < 1.1 * seen:
                gaps.append(abs(z - seen))
        if len(gaps) >= 0.02 * H * W:
            errors.append(sum(gaps) / len(gaps) / unit)
    worst = sorted(errors)[-3:]
    return -sum(worst) / len(worst) if worst else math.nan


def between(depth: np.ndarray, usable: np.ndarray, u: float, v: float) -> float | None:
    """Depth between four pixel centres, bilinear in 1/depth; None beyond the image or across an edge."""
    x, y = math.floor(u - 0.5), math.floor(v - 0.5)
    a, b = u - 0.5 - x, v - 0.5 - y
    total, inverse, seen = 0.0, 0.0, []
    corners = {(y, x): (1 - a) * (1 - b), (y, x + 1): a * (1 - b), (y + 1, x): (1 - a) * b, (y + 1, x + 1): a * b}
    for (row, column), share in corners.items():
        if share <= 1e-3:
            continue
        if not (0 <= row < depth.shape[0] and 0 <= column < depth.shape[1]) or not usable[row, column]:
            return None
        seen.append(depth[row, column])
        total, inverse = total + share, inverse + share / depth[row, column]
    return total / inverse if max(seen) < 1.1 * min(seen) else None


def median_depth(scene: Geometry) -> float:
    depth = scene.depth if scene.valid is None else scene.depth[scene.valid]
    return float(depth.flatten().median())  # the lower median, as torch has it
