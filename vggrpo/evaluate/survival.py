"""Whether what is seen stays itself: corners of the first frame, followed to the last.

A corner is lost when the way there and back (pyramidal Lucas-Kanade, OpenCV) does not close, or when what is around it
no longer looks as it did in the first frame. One that leaves the picture is neither kept nor lost. Nothing is lost in a
frozen video: read it beside the motion.
"""

import itertools
from collections.abc import Sequence

import cv2
import numpy as np

from vggrpo.evaluate.correspond import AGREE, LONG_SIDE, Frame
from vggrpo.evaluate.value import NA, Value

CORNERS, APART = 200, 6.0
"""The most that are followed, and the least distance between two (pixels of a picture of `LONG_SIDE`)."""
MIN_CORNERS = 20
"""Fewer that are kept or lost say nothing."""
PATCH = 21
"""Pixels across the surroundings that are compared."""
ALIKE = 0.5
"""Least correlation of a corner's surroundings with those of the first frame."""


def survival(frames: Sequence[Frame]) -> Value:
    """Share of the first frame's corners that are there in the last, of those that are still in view."""
    first = frames[0].gray
    unit = max(1.0, max(first.shape) / LONG_SIDE)
    found = cv2.goodFeaturesToTrack(first, CORNERS, 0.01, APART * unit)
    if found is None or len(found) < MIN_CORNERS:
        return Value(NA, f"{0 if found is None else len(found)} corners, fewer than {MIN_CORNERS}")
    start = found.reshape(-1, 2)  # centres at whole numbers, as OpenCV counts
    at, alive, gone = start.copy(), np.ones(len(start), bool), np.zeros(len(start), bool)
    rim, size = PATCH / 2, np.array([first.shape[1], first.shape[0]])
    looks = [_patch(first, point) for point in start]
    for before, after in itertools.pairwise(frames):
        there, ok, _ = cv2.calcOpticalFlowPyrLK(before.gray, after.gray, at, np.empty_like(at))
        back, ok_back, _ = cv2.calcOpticalFlowPyrLK(after.gray, before.gray, there, np.empty_like(at))
        inside = ((there >= rim) & (there <= size - 1 - rim)).all(1)
        gone |= alive & ~inside
        loop = np.linalg.norm(back - at, axis=1) <= AGREE * frames[0].scale * unit
        alive &= inside & loop & (ok[:, 0] > 0) & (ok_back[:, 0] > 0)
        for k in np.flatnonzero(alive):
            alive[k] = float((looks[k] * _patch(after.gray, there[k])).mean()) >= ALIKE
        at = there
    judged = int((~gone).sum())
    if judged < MIN_CORNERS:
        return Value(NA, f"{len(start) - judged} of {len(start)} corners leave the picture")
    return Value(float(alive.sum() / judged))


def _patch(gray: np.ndarray, at: np.ndarray) -> np.ndarray:
    """What is around a point, with mean 0 and variance 1 (0 where it is flat)."""
    patch = cv2.getRectSubPix(gray, (PATCH, PATCH), (float(at[0]), float(at[1]))).astype(np.float32)
    patch -= patch.mean()
    return patch / max(float(patch.std()), 1.0)
