"""Where the points of one frame are in another, without any learned weights: dense flow, checked both ways.

At small sizes SIFT finds a handful of points; DIS flow (OpenCV) on an enlarged picture finds hundreds, and the way
there and back tells which of them to believe. Pixels are those of the frames as given, (u, v), centres at +0.5.
"""

from typing import NamedTuple

import cv2
import numpy as np

LONG_SIDE = 256
"""Frames are enlarged to it before flow is sought: DIS works on patches of 8 pixels."""
AGREE = 0.3
"""Pixels between a point and where the way there and back leads."""
TEXTURE = 2.0
"""Least standard deviation (of 255) around a point: what is flat can be anywhere."""
CELLS = 8
"""Coverage counts the cells of an 8 x 8 grid that hold a match."""


class Matches(NamedTuple):
    """N points of one frame, where they are in another, and the share of the picture that they come from."""

    here: np.ndarray
    """[N 2]."""
    there: np.ndarray
    """[N 2]."""
    coverage: float
    sought: int
    """Points with texture: what N is to be compared with."""


class Frame(NamedTuple):
    """One frame as flow sees it."""

    gray: np.ndarray
    """Enlarged, uint8."""
    scale: float
    """Pixels of it per pixel of the frame."""


def prepare(frame: np.ndarray) -> Frame:
    """[H W 3] RGB uint8."""
    gray = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    scale = max(1.0, LONG_SIDE / max(gray.shape))
    size = (round(gray.shape[1] * scale), round(gray.shape[0] * scale))
    return Frame(cv2.resize(gray, size, interpolation=cv2.INTER_CUBIC) if scale > 1 else gray, scale)


def match(a: Frame, b: Frame, every: float = 2.0) -> Matches:
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
    cells = np.floor(grid[kept] / np.array([width, height]) * CELLS).astype(int)
    coverage = len(np.unique(cells[:, 0] * CELLS + cells[:, 1])) / CELLS**2
    return Matches(grid[kept] / a.scale, there[kept] / a.scale, coverage, int(rough.sum()))


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
