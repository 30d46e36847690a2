"""How far pictures move from frame to frame, how far they get, and how unevenly: by matches alone."""

import cv2
import numpy as np

from vggrpo.evaluate.correspond import TOLERANCE, Matches, too_few
from vggrpo.evaluate.value import NA, Value

PLACES = 4
"""Places of a picture, along each side, whose motion `travel` follows."""
NA_MOTION = np.full((PLACES**2, 2), NA)


def displacement(matches: Matches) -> Value:
    """Median length (pixels) of the matches' motion: 0 for a frozen video."""
    if (reason := too_few(matches)) is not None:
        return Value(NA, reason)
    return Value(float(np.median(np.linalg.norm(matches.there - matches.here, axis=1))))


def travel(pairs: list[Matches], width: int, height: int) -> Value:
    """Motion of the picture's places, averaged over half of the video, then its length: pixels a frame.

    From frame to frame, shake is much of what moves; it leads nowhere, and over many frames it cancels. The median over
    the places of a `PLACES` x `PLACES` grid, the mean over all halves; 0 for a frozen video.
    """
    told = [NA_MOTION if too_few(matches) else _by_place(matches, width, height) for matches in pairs]
    half = max(1, (len(pairs) + 1) // 2)
    found = []
    for start in range(len(pairs) - half + 1):
        window = np.stack(told[start : start + half])
        often = 2 * np.isfinite(window[..., 0]).sum(0) >= half
        if often.sum() * 2 >= PLACES**2:
            found.append(float(np.median(np.linalg.norm(np.nanmean(window[:, often], axis=0), axis=1))))
    if 2 * len(found) < len(pairs) - half + 1:
        return Value(NA, "too few places of the picture can be followed for half of the video")
    return Value(float(np.mean(found)))


def jitter(pairs: list[Matches]) -> Value:
    """|change of the picture's motion| / |motion|, of neighbouring frames: the motion is the matches' best similarity.

    Four numbers a pair: shift of the middle, turn and growth in pixels at the rim. 0 for a video that glides.
    """
    moves = []
    for matches in pairs:
        if (reason := too_few(matches)) is not None:
            return Value(NA, reason)
        middle = matches.here.mean(0)
        found, _ = cv2.estimateAffinePartial2D(
            matches.here - middle,
            matches.there - middle,
            method=cv2.RANSAC,
            ransacReprojThreshold=2 * TOLERANCE[matches.method].fit,
        )
        if found is None:
            return Value(NA, "no similarity fits")
        rim = np.abs(matches.here - middle).max()
        moves.append([found[0, 2], found[1, 2], rim * (found[0, 0] - 1), rim * found[1, 0]])
    if len(moves) < 3:
        return Value(NA, "fewer than 4 frames")
    move = np.array(moves)
    size, change = np.linalg.norm(move, axis=1), np.linalg.norm(np.diff(move, axis=0), axis=1)
    if np.median(size) < 0.05:
        return Value(NA, "nothing moves")
    return Value(float(change.mean() / size.mean()))


def _by_place(matches: Matches, width: int, height: int) -> np.ndarray:
    """[places 2]: median motion (pixels) of the matches of each place, NaN where there is none."""
    cell = np.minimum((matches.here / [width, height] * PLACES).astype(int), PLACES - 1)
    of, move = cell[:, 1] * PLACES + cell[:, 0], matches.there - matches.here
    found = NA_MOTION.copy()
    for place in np.unique(of):
        found[place] = np.median(move[of == place], axis=0)
    return found
