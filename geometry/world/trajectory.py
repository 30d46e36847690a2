"""Camera paths: how far, which way, and how steadily the camera moves. Conventions in `geometry/types.py`.

Every path is centred on the nominal view (it passes through the identity half way), so that what the scene was built
around stays in view whichever way the camera goes. Lengths are in multiples of the distance to the focus.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Motion = Literal[
    "static", "pan", "tilt", "dolly_in", "dolly_out", "truck", "pedestal", "orbit", "arc", "random"
]  # fmt: skip
MOTIONS: tuple[Motion, ...] = get_args(Motion)
SHAKE_UNITS = 0.02
"""Scene units of hand-held translation that come with one degree of hand-held rotation."""
SWAY_FRAMES = (7.0, 9.0)
"""Shortest and longest period of sway: about two steps a second, at 16 frames a second."""


@dataclass(frozen=True)
class Move:
    """A camera command."""

    motion: Motion
    speed: float
    """About 1; 0.7 is slow and 1.4 fast. What it multiplies, `path` says."""
    side: int
    """+1 right, down or clockwise seen from above; -1 the other way. 0 where the motion has no sides."""


def draw_move(rng: np.random.Generator, motion: Motion | None) -> Move:
    """A random command, or a given motion at a random speed and side."""
    chosen = MOTIONS[rng.integers(len(MOTIONS))]
    speed, side = rng.uniform(0.7, 1.4), int(rng.choice([-1, 1]))
    motion = chosen if motion is None else motion
    if motion == "static":
        speed = 0.0
    return Move(motion, float(speed), 0 if motion in ("static", "dolly_in", "dolly_out", "random") else side)


def path(rng: np.random.Generator, move: Move, frames: int, focus: float) -> tuple[np.ndarray, np.ndarray]:
    """Position (scene units) and rotation vector (radians) of the camera in the axes of the nominal view, both `[T 3]`.

    At speed 1 a clip is: pan 24 degrees, tilt 18, orbit 28 and arc 26 around the focus; dolly 0.4, truck 0.45, pedestal
    0.3 of the focus distance; random about 0.4 and 12 degrees. All but arc (eased in and out) and random have constant
    velocity in the camera's own axes.
    """
    u = np.linspace(-0.5, 0.5, frames) if frames > 1 else np.zeros(1)
    position, rotation = np.zeros((frames, 3)), np.zeros((frames, 3))
    amount = move.speed * move.side
    match move.motion:
        case "pan":
            rotation[:, 1] = math.radians(24) * amount * u
        case "tilt":
            rotation[:, 0] = -math.radians(18) * amount * u
        case "dolly_in":
            position[:, 2] = 0.4 * focus * move.speed * u
        case "dolly_out":
            position[:, 2] = -0.4 * focus * move.speed * u
        case "truck":
            position[:, 0] = 0.45 * focus * amount * u
        case "pedestal":
            position[:, 1] = 0.3 * focus * amount * u
        case "orbit":
            position, rotation = _around(math.radians(28) * amount * u, focus)
        case "arc":
            eased = 3 * (u + 0.5) ** 2 - 2 * (u + 0.5) ** 3 - 0.5
            position, rotation = _around(math.radians(26) * amount * eased, focus)
            position[:, 1] += 0.12 * focus * rng.choice([-1, 1]) * eased
        case "random":
            position = _smooth(rng, u) * 0.16 * focus * move.speed * np.array([1.0, 0.5, 1.0])
            rotation = _smooth(rng, u) * math.radians(5) * move.speed * np.array([0.6, 1.0, 0.4])
    return position, rotation


def shake(rng: np.random.Generator, frames: int, jitter: float) -> tuple[np.ndarray, np.ndarray]:
    """Hand-held noise, white in time, none in frame 0: position `[T 3]` and rotation `[T 3]`.

    `jitter` is the standard deviation per axis in degrees; positions shake by `SHAKE_UNITS` scene units per degree.
    """
    noise = rng.standard_normal((2, frames, 3)) * jitter
    noise[:, 0] = 0
    return noise[0] * SHAKE_UNITS, np.radians(noise[1])


def sway(rng: np.random.Generator, frames: int, amount: float) -> tuple[np.ndarray, np.ndarray]:
    """How a camera bobs that is carried by somebody who walks, none in frame 0: position `[T 3]` and rotation `[T 3]`.

    One wave: down and downwards, up and upwards. `amount` is its root mean square in degrees of pitch; height goes with
    it by `SHAKE_UNITS` scene units per degree. Unlike `shake` it has one velocity from frame to frame, so that a video
    VAE of four frames a latent can keep it.
    """
    position, rotation = np.zeros((frames, 3)), np.zeros((frames, 3))
    period, phase = rng.uniform(*SWAY_FRAMES), rng.uniform(0, 2 * np.pi)
    wave = math.sqrt(2) * amount * np.sin(2 * np.pi * np.arange(frames) / period + phase)
    position[:, 1] = SHAKE_UNITS * (wave - wave[0])
    rotation[:, 0] = -np.radians(wave - wave[0])
    return position, rotation


def _around(angle: np.ndarray, focus: float) -> tuple[np.ndarray, np.ndarray]:
    """On a circle around the focus, looking at it."""
    position = np.stack([-focus * np.sin(angle), np.zeros_like(angle), focus * (1 - np.cos(angle))], axis=-1)
    rotation = np.stack([np.zeros_like(angle), angle, np.zeros_like(angle)], axis=-1)
    return position, rotation


def _smooth(rng: np.random.Generator, u: np.ndarray) -> np.ndarray:
    """A drift plus two slow waves on each axis, `[T 3]`; the drift keeps the camera from standing still for long."""
    drift = rng.choice([-1, 1], size=3) * rng.uniform(1.2, 2.0, size=3)
    phase, size = rng.uniform(0, 2 * np.pi, size=(2, 3)), rng.uniform(0.1, 0.4, size=(2, 3))
    waves = [size[k] * np.sin(2 * np.pi * (0.5 + 0.5 * k) * u[:, None] + phase[k]) for k in range(2)]
    return drift * u[:, None] + waves[0] + waves[1]
