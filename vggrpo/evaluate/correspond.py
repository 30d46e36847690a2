"""Where the points of one frame are in another, without any learned weights: SIFT in large frames, flow in small ones.

At small sizes SIFT finds a handful of points; DIS flow (OpenCV) on an enlarged picture finds hundreds, and the way
there and back tells which of them to believe. From `LONG_SIDE` pixels on it is the other way round: keypoints are
matched by RootSIFT, each the other's nearest and clearly nearer than the next. Pixels are those of the frames as given,
(u, v), centres at +0.5.
"""

from typing import Literal, NamedTuple

import cv2
import numpy as np

LONG_SIDE = 256
"""Smaller frames are enlarged to it before flow is sought: DIS works on patches of 8 pixels. Others have SIFT."""
KEYPOINTS, CONTRAST, RATIO = 2000, 0.01, 0.8
"""Of SIFT: the most in a frame, their least contrast (OpenCV's .04 finds nothing in a pale video), and how much nearer
than the next-best a match must be."""
AGREE = 0.3
"""Pixels between a point and where the way there and back leads."""
TEXTURE = 2.0
"""Least standard deviation (of 255) around a point: what is flat can be anywhere."""
CELLS = 8
"""Coverage counts the cells of an 8 x 8 grid that hold a match."""
MIN_MATCHES = 60
"""Of a pair of frames, both halves together."""
MIN_COVERAGE = 0.2
"""Share of an 8 x 8 grid."""


class Matches(NamedTuple):
    """N points of one frame, where they are in another, and the share of the picture that they come from."""

    here: np.ndarray
    """[N 2]."""
    there: np.ndarray
    """[N 2]."""
    coverage: float
    sought: int
    """Points with texture, or keypoints: what N is to be compared with."""
    method: Literal["flow", "sift"] = "flow"
    """How they were found, and so how exact they can be."""


class Tolerance(NamedTuple):
    """What counts as near, in pixels; SIFT's frames have more of them."""

    fit: float
    """Within which a match supports a fundamental matrix or a homography."""
    truncated: float
    """At which a held-out distance stops to count more."""
    parallax: float
    """Least 90th percentile of distances to the best homography: below it every epipolar geometry will do."""


TOLERANCE = {"flow": Tolerance(0.5, 2.0, 0.35), "sift": Tolerance(1.0, 5.0, 1.0)}
"""By how the matches were found."""


class Keypoints(NamedTuple):
    """N keypoints of a frame."""

    at: np.ndarray
    """[N 2], pixels."""
    descriptor: np.ndarray
    """[N 128], RootSIFT: unit vectors."""


class Frame(NamedTuple):
    """One frame as matching sees it."""

    gray: np.ndarray
    """Enlarged if it is small, uint8."""
    scale: float
    """Pixels of it per pixel of the frame."""
    keypoints: Keypoints | None
    """Of a large frame."""


def prepare(frame: np.ndarray) -> Frame:
    """[H W 3] RGB uint8."""
    gray = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    scale = LONG_SIDE / max(gray.shape)
    if scale <= 1:
        return Frame(gray, 1.0, _keypoints(gray))
    size = (round(gray.shape[1] * scale), round(gray.shape[0] * scale))
    return Frame(cv2.resize(gray, size, interpolation=cv2.INTER_CUBIC), scale, None)


def match(a: Frame, b: Frame) -> Matches:
    """Points of `a`, found in `b`: by SIFT if both are large, else by flow."""
    if a.keypoints is None or b.keypoints is None:
        return match_flow(a, b)
    return match_keypoints(a.keypoints, b.keypoints, (a.gray.shape[0], a.gray.shape[1]))


def match_keypoints(a: Keypoints, b: Keypoints, size: tuple[int, int]) -> Matches:
    """Keypoints of `a` (in a frame of `size` H, W) that choose one of `b`, and are chosen by it."""
    none = Matches(np.zeros((0, 2)), np.zeros((0, 2)), 0.0, len(a.at), "sift")
    if min(len(a.at), len(b.at)) < 2:
        return none
    nearness = a.descriptor @ b.descriptor.T  # of unit vectors: |x - y|^2 = 2 - 2 x.y
    best, back = nearness.argmax(1), nearness.argmax(0)
    mine = np.arange(len(a.at))
    first, second = -np.partition(-nearness, 1, axis=1)[:, :2].T
    clear = np.sqrt(np.maximum(2 - 2 * first, 0)) < RATIO * np.sqrt(np.maximum(2 - 2 * second, 1e-12))
    kept = clear & (back[best] == mine)
    here = a.at[kept]
    return Matches(here, b.at[best[kept]], _coverage(here, (size[1], size[0])), len(a.at), "sift")


def match_flow(a: Frame, b: Frame, every: float = 2.0) -> Matches:
    """Points of `a` on a grid of `every` pixels, found in `b`."""
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    start = np.zeros((*a.gray.shape, 2), np.float32)
    ahead, back = flow.calc(a.gray, b.gray, start.copy()), flow.calc(b.gray, a.gray, start)
    height, width = a.gray.shape
    step = every * a.scale
    u, v = np.meshgrid(np.arange(step / 2, width, step), np.arange(step / 2, height, step))
    grid = np.stack([u.ravel(), v.ravel()], axis=1).astype(np.float32)  # sample positions: pixel centres at +0.5
    there = grid + _at(ahead, grid)
    loop = np.linalg.norm(there + _at(back, there) - grid, axis=1) / a.scale
    rough = _at(_spread(a.gray), grid)[:, 0] >= TEXTURE
    inside = ((there >= 0.5) & (there <= np.array([width, height]) - 0.5)).all(axis=1)
    kept = rough & inside & (loop <= AGREE)
    coverage = _coverage(grid[kept], (width, height))
    return Matches(grid[kept] / a.scale, there[kept] / a.scale, coverage, int(rough.sum()))


def too_few(matches: Matches) -> str | None:
    """Why nothing can be said of a pair of frames, if so."""
    if len(matches.here) < MIN_MATCHES:
        return f"{len(matches.here)} matches of {matches.sought}, fewer than {MIN_MATCHES}"
    if matches.coverage < MIN_COVERAGE:
        return f"matches cover {matches.coverage:.0%} of the picture, less than {MIN_COVERAGE:.0%}"
    return None


def _keypoints(gray: np.ndarray) -> Keypoints:
    """OpenCV's SIFT, whose pixel centres are whole numbers."""
    found, descriptor = cv2.SIFT.create(nfeatures=KEYPOINTS, contrastThreshold=CONTRAST).detectAndCompute(gray, None)
    if descriptor is None:
        return Keypoints(np.zeros((0, 2)), np.zeros((0, 128), np.float32))
    at = np.array([point.pt for point in found], dtype=float) + 0.5
    root = np.sqrt(descriptor / np.maximum(descriptor.sum(1, keepdims=True), 1e-6))
    return Keypoints(at, root)


def _coverage(points: np.ndarray, size: tuple[int, int]) -> float:
    """Share of the cells of a picture of `size` (W, H) that hold a point."""
    cells = np.minimum(np.floor(points / np.array(size) * CELLS).astype(int), CELLS - 1)
    return len(np.unique(cells[:, 0] * CELLS + cells[:, 1])) / CELLS**2


def _at(image: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Bilinear values of [H W] or [H W C] at [N 2]; centres at +0.5."""
    x, y = points[:, :1] - 0.5, points[:, 1:] - 0.5
    found = cv2.remap(
        image, x.astype(np.float32), y.astype(np.float32), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    return found.reshape(len(points), -1)


def _spread(gray: np.ndarray, window: int = 17) -> np.ndarray:
    """Standard deviation of the brightness in a window around each pixel."""
    x = gray.astype(np.float32)
    mean, square = cv2.blur(x, (window, window)), cv2.blur(x * x, (window, window))
    spread: np.ndarray = np.sqrt(np.maximum(square - mean * mean, 0))
    return spread
