"""What a video's pixels say of its geometry, its motion and its sharpness, by methods that no reward uses.

    sampson   held-out truncated Sampson distance (pixels) at several strides, the longest from first frame to last:
              a fundamental matrix is fitted to half of the matches by LO-RANSAC (pycolmap) and judged on the other half
    inliers, matches, coverage    shares of held-out matches that fit, of points that were found, of the picture
    parallax, displacement   whether that means anything: a still, turning or zooming camera has no wrong epipolar lines
    travel    how far the pictures get in half of the video: motion without the part of it that is shake
    jitter    how much the pictures' own motion changes from frame to frame, in shares of the motion
    survival  share of the first frame's corners that can be followed to the last
    sharpness, flicker

A judge that cannot tell says NaN and why, never a number. Sources and measured behaviour: Sampson distances without
held-out matches reward blur, with adjacent frames alone they miss drift, without parallax they reward stillness.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import pycolmap
from jaxtyping import Float
from torch import Tensor

from vggrpo.evaluate.correspond import TOLERANCE, Frame, Matches, match, prepare, too_few
from vggrpo.evaluate.motion import displacement, jitter, travel
from vggrpo.evaluate.survival import survival
from vggrpo.evaluate.value import NA, Value


@dataclass(frozen=True)
class Video:
    """T frames, prepared once for all judges."""

    frames: list[np.ndarray]
    """[H W 3] RGB uint8."""
    ready: list[Frame]

    def pairs(self, stride: int) -> list[tuple[int, int]]:
        """Frames (i, i + stride) that cover the video from its first to its last frame without overlap."""
        return [(i, i + stride) for i in range(0, len(self.frames) - stride, stride)]


def open_video(video: Float[Tensor, "T 3 H W"]) -> Video:
    """From RGB in [0, 1].

    Raises:
        ValueError: fewer than two frames.
    """
    if len(video) < 2:
        raise ValueError(f"judges compare frames, and the video has {len(video)}: give at least 2")
    frames = list((255 * video.clamp(0, 1)).round().byte().movedim(1, -1).contiguous().cpu().numpy())
    return Video(frames, [prepare(frame) for frame in frames])


def judge(video: Float[Tensor, "T 3 H W"], seed: int = 0) -> dict[str, Value]:
    """What the pixels say of one video, by name; lower `sampson`, `jitter` and `flicker` are better.

    Strides are 1, about a quarter of the video, and the whole of it.
    """
    opened, last = open_video(video), len(video) - 1
    strides = sorted({1, max(1, last // 4), last})
    found: dict[str, Value] = {}
    for stride in strides:
        name = "first_last" if stride == last else f"stride_{stride}"
        pairs = [match(opened.ready[i], opened.ready[j]) for i, j in opened.pairs(stride)]
        told = [epipolar(matches, seed) for matches in pairs]
        for key in Epipolar._fields:
            found[f"{key}/{name}"] = _mean([getattr(one, key) for one in told])
        found[f"matches/{name}"] = Value(float(np.mean([len(m.here) / max(m.sought, 1) for m in pairs])))
        found[f"coverage/{name}"] = Value(float(np.mean([m.coverage for m in pairs])))
        if stride == 1:
            found["displacement"] = _mean([displacement(matches) for matches in pairs])
            found["travel"] = travel(pairs, video.shape[-1], video.shape[-2])
            found["jitter"] = jitter(pairs)
    found["survival"] = survival(opened.ready)
    found["sharpness"] = Value(float(np.mean([_laplacian(frame) for frame in opened.ready])))
    found["flicker"] = flicker(opened.frames)
    return found


class Epipolar(NamedTuple):
    """What matches say of the epipolar geometry of two frames."""

    sampson: Value
    """Mean of min(distance, `Tolerance.truncated`) of one half of the matches to the geometry of the other half."""
    inliers: Value
    """Share of that half within `Tolerance.fit`."""
    parallax: Value
    """90th percentile of all matches' distances to the best homography; 0 for a camera that only turns."""


def epipolar(matches: Matches, seed: int = 0) -> Epipolar:
    """N/A without enough matches, and the first two without parallax."""
    bend, limits = parallax(matches, seed), TOLERANCE[matches.method]
    if bend.value != bend.value:
        return Epipolar(bend, bend, bend)
    if bend.value < limits.parallax:
        blind = Value(NA, f"parallax of {bend.value:.2f} px: any epipolar geometry fits")
        return Epipolar(blind, blind, bend)
    first, second = _halves(len(matches.here), seed)
    options = _ransac(limits.fit, seed)
    fitted = pycolmap.estimate_fundamental_matrix(matches.here[first], matches.there[first], options)
    if fitted is None:
        lost = Value(NA, "no fundamental matrix fits")
        return Epipolar(lost, lost, bend)
    distance = sampson_distance(fitted["F"], matches.here[second], matches.there[second])
    near = Value(float((distance <= limits.fit).mean()))
    return Epipolar(Value(float(np.minimum(distance, limits.truncated).mean())), near, bend)


def sampson(matches: Matches, seed: int = 0) -> Value:
    """`Epipolar.sampson` alone."""
    return epipolar(matches, seed).sampson


def sampson_distance(F: np.ndarray, here: np.ndarray, there: np.ndarray) -> np.ndarray:
    """First-order distance (pixels) of matches [N 2] to x'^T F x = 0 (Hartley and Zisserman, 11.9)."""
    one = np.ones((len(here), 1))
    x, y = np.hstack([here, one]), np.hstack([there, one])
    ahead, back = x @ F.T, y @ F
    slope = ahead[:, 0] ** 2 + ahead[:, 1] ** 2 + back[:, 0] ** 2 + back[:, 1] ** 2
    distance: np.ndarray = np.abs((y * ahead).sum(1)) / np.sqrt(np.maximum(slope, 1e-20))
    return distance


def parallax(matches: Matches, seed: int = 0) -> Value:
    """90th percentile of the matches' distances (pixels) to the best homography; 0 for a camera that only turns."""
    if (reason := too_few(matches)) is not None:
        return Value(NA, reason)
    fitted = pycolmap.estimate_homography_matrix(
        matches.here, matches.there, _ransac(TOLERANCE[matches.method].fit, seed)
    )
    if fitted is None:
        return Value(NA, "no homography fits")
    moved = np.hstack([matches.here, np.ones((len(matches.here), 1))]) @ fitted["H"].T
    off = np.linalg.norm(moved[:, :2] / moved[:, 2:] - matches.there, axis=1)
    return Value(float(np.percentile(off, 90)))


def flicker(frames: list[np.ndarray]) -> Value:
    """Mean change (of 255) of the picture's mean brightness that its neighbours in time do not explain."""
    light = np.array([float(frame.mean()) for frame in frames])
    if len(light) < 3:
        return Value(NA, "fewer than 3 frames")
    return Value(float(np.abs(light[1:-1] - (light[:-2] + light[2:]) / 2).mean()))


def _laplacian(frame: Frame) -> float:
    return float(cv2.Laplacian(frame.gray, cv2.CV_32F).var())


def _mean(values: list[Value]) -> Value:
    """Over the pairs that can be judged; NaN, with the first reason, if fewer than half can."""
    numbers = [v.value for v in values if v.value == v.value]
    if 2 * len(numbers) < len(values) or not numbers:
        return Value(NA, next((v.reason for v in values if v.reason), "nothing to compare"))
    return Value(float(np.mean(numbers)))


def _halves(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng(seed).permutation(count)
    return order[: count // 2], order[count // 2 :]


def _ransac(fit: float, seed: int) -> "pycolmap.RANSACOptions":
    options = pycolmap.RANSACOptions()
    options.max_error, options.random_seed, options.num_threads = fit, seed, 1
    options.min_num_trials, options.max_num_trials = 200, 2000
    return options


Judge = Callable[[Float[Tensor, "T 3 H W"]], dict[str, Value]]
