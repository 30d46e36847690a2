"""What stands in the world: a room or open ground, two to six bodies, and what they are made of.

Stage coordinates: the nominal camera is at the origin, level, looking along +z, y down; the floor is at y = `floor`.
Everything is drawn from one numpy generator, so a seed is a scene on every machine.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

Shape = Literal["box", "sphere", "cylinder"]
Pattern = Literal["noise", "checker", "stripes", "gradient"]
Going = Literal["slides", "spins", "bounces"]
SHAPES: tuple[Shape, ...] = get_args(Shape)
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)
GOINGS: tuple[Going, ...] = get_args(Going)
SURFACES: dict[Pattern, str] = {
    "noise": "marbled",
    "checker": "checkered",
    "stripes": "striped",
    "gradient": "two-tone",
}

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.80, 0.20, 0.18),
    "orange": (0.90, 0.52, 0.15),
    "yellow": (0.90, 0.80, 0.25),
    "green": (0.25, 0.62, 0.28),
    "cyan": (0.25, 0.70, 0.75),
    "blue": (0.20, 0.35, 0.80),
    "purple": (0.52, 0.28, 0.68),
    "pink": (0.90, 0.50, 0.65),
    "brown": (0.48, 0.32, 0.20),
    "grey": (0.55, 0.55, 0.57),
    "white": (0.92, 0.91, 0.88),
}


@dataclass(frozen=True)
class Material:
    """A procedural texture between two colours."""

    pattern: Pattern
    color: str
    rgb: np.ndarray
    """[2 3]: the named colour and its partner."""
    cell: float
    """Scene units of one noise cell, check, stripe or gradient."""
    turn: float
    """Radians by which the pattern is turned in the surface."""
    offset: np.ndarray
    """[3]: where in the noise it starts."""

    @property
    def name(self) -> str:
        """Surface and colour in words."""
        return f"{SURFACES[self.pattern]} {self.color}"


@dataclass(frozen=True)
class Body:
    """A solid that stands or moves."""

    shape: Shape
    half: np.ndarray
    """[3] half extents; sphere: the radius three times; cylinder: (radius, half height, radius), axis y."""
    centre: np.ndarray
    """[3] half way through the clip."""
    turn: np.ndarray
    """[3] rotation vector half way through the clip."""
    material: Material
    going: Going | None = None
    drift: np.ndarray | None = None
    """[3] scene units from the first to the last frame."""
    spin: float = 0.0
    """Radians about the body's own vertical axis from the first to the last frame."""
    hop: float = 0.0
    """Height of a bounce, scene units."""
    hops: float = 0.0
    """Bounces per clip."""

    @property
    def name(self) -> str:
        """What a caption calls it: surface, colour and shape."""
        return f"{self.material.name} {self.shape}"

    @property
    def radius(self) -> float:
        """Of the sphere that bounds it."""
        return float(self.half[0]) if self.shape == "sphere" else math.hypot(*self.half)

    def place(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Centre `[n 3]` and spin `[n]` at clip times u `[n]`, -0.5 the first frame and +0.5 the last."""
        centre = self.centre + np.zeros((len(u), 3)) if self.drift is None else self.centre + u[:, None] * self.drift
        if self.hop:
            centre[:, 1] -= self.hop * np.abs(np.sin(np.pi * self.hops * (u + 0.5)))
        return centre, self.spin * u


@dataclass(frozen=True)
class Scene:
    """A place and what stands in it."""

    fov: float
    """Horizontal, degrees."""
    focus: float
    """Distance at which the scene was built, scene units; the length that camera paths are measured in."""
    pitch: float
    """Radians that the nominal camera looks down."""
    floor: float
    room: np.ndarray | None
    """[2 3] lower and upper corner; None: open ground under a sky."""
    surfaces: tuple[Material, ...]
    """Left, right, ceiling, floor, behind, ahead (axis by axis, lower then upper); open ground uses the floor's."""
    sky: np.ndarray
    """[2 3] colours at the horizon and overhead."""
    light: np.ndarray
    """[3] unit vector towards the light."""
    bodies: tuple[Body, ...]


def draw_scene(rng: np.random.Generator, *, dynamic: bool, texture_scale: float) -> Scene:
    """A random scene; `dynamic` gives at least one large body a motion of its own."""
    fov, focus, floor = rng.uniform(45, 80), rng.uniform(2.6, 4.2), rng.uniform(0.9, 1.4)
    view = 2 * math.tan(math.radians(fov) / 2)  # width of the view at distance 1
    pitch = math.atan2(0.45 * floor, focus) + math.radians(rng.uniform(-2, 3))
    room = None
    if rng.random() < 0.6:
        wide = focus * rng.uniform(0.9, 1.3, size=2)
        lower = np.array([-wide[0], -rng.uniform(1.3, 2.2), -focus * rng.uniform(0.7, 1.0)])
        room = np.stack([lower, np.array([wide[1], floor, focus * rng.uniform(1.6, 2.1)])])
    cells = texture_scale * view * focus * rng.uniform(0.2, 0.4, size=6)
    surfaces = tuple(_draw_material(rng, float(cell)) for cell in cells)
    tint = rng.uniform(-0.06, 0.06, size=3)
    sky = np.clip(np.array([[0.85, 0.86, 0.86], [0.40, 0.58, 0.85]]) + tint, 0, 1)
    light = np.array([rng.uniform(-1, 1), -rng.uniform(0.6, 1.2), -rng.uniform(0.1, 1.0)])
    scene = Scene(fov, focus, pitch, floor, room, surfaces, sky, light / np.linalg.norm(light), ())
    return replace(scene, bodies=_draw_bodies(rng, scene, dynamic, texture_scale * view))


def _draw_material(rng: np.random.Generator, cell: float) -> Material:
    color = list(COLORS)[rng.integers(len(COLORS))]
    first = np.array(COLORS[color]) + rng.uniform(-0.05, 0.05, size=3)
    pattern = PATTERNS[rng.integers(len(PATTERNS))]
    if pattern == "gradient":
        second = np.array(list(COLORS.values())[rng.integers(len(COLORS))])
    elif first.mean() > 0.5:
        second = first * rng.uniform(0.25, 0.5)
    else:
        second = first + (1 - first) * rng.uniform(0.55, 0.8)
    rgb = np.clip(np.stack([first, second]), 0.02, 0.98)
    return Material(pattern, color, rgb, cell, float(rng.uniform(0, np.pi)), rng.uniform(0, 32, size=3))


def _draw_bodies(rng: np.random.Generator, scene: Scene, dynamic: bool, cell: float) -> tuple[Body, ...]:
    bodies: list[Body] = []
    num_bodies = int(rng.integers(2, 7))
    for _ in range(200):
        hero = dynamic and not bodies
        body = _draw_body(rng, scene, hero, moving=hero or (dynamic and rng.random() < 0.3))
        if _fits(body, bodies, scene):
            body = replace(body, material=_draw_material(rng, cell * float(body.centre[2]) * rng.uniform(0.12, 0.22)))
            if body.name not in {other.name for other in bodies}:  # so that a caption says which one moves
                bodies.append(body)
        if len(bodies) == num_bodies:
            break
    return tuple(bodies)


def _draw_body(rng: np.random.Generator, scene: Scene, hero: bool, moving: bool) -> Body:
    """A body somewhere in view, still of the floor's material."""
    distance = scene.focus * (rng.uniform(0.62, 0.85) if hero else rng.uniform(0.75, 1.45))
    half_view = distance * math.tan(math.radians(scene.fov) / 2)
    # A hero is wide enough that what moves is a fair share of the picture, whatever the field of view.
    size = half_view * (rng.uniform(0.42, 0.60) if hero else rng.uniform(0.16, 0.38))
    shape = SHAPES[rng.integers(len(SHAPES))]
    half = size * (np.ones(3) if shape == "sphere" else rng.uniform(0.6, 1.0, size=3))
    half[2] = half[0] if shape == "cylinder" else half[2]
    x = half_view * (rng.uniform(-0.25, 0.25) if hero else rng.uniform(-0.8, 0.8))
    y = scene.floor - half[1] if rng.random() < 0.6 else rng.uniform(-0.4, 0.3) * half_view + 0.15
    if hero:  # in the middle of the view: the camera looks down by pitch
        y = distance * math.tan(scene.pitch) + rng.uniform(-0.15, 0.15) * size
    y = min(y, scene.floor - half[1])
    tilt = rng.normal(size=2) * (0.25 if y + half[1] < scene.floor - 0.25 else 0.0)
    turn = np.array([tilt[0], rng.uniform(0, np.pi), tilt[1]])
    body = Body(shape, half, np.array([x, y, distance]), turn, scene.surfaces[3])
    return _moving(rng, body, half_view) if moving else body


def _moving(rng: np.random.Generator, body: Body, half_view: float) -> Body:
    """A body drifts or spins at a constant rate, so that it never pauses and its scene flow shows it in every frame.

    It does not do both: then some point of it is at rest at every moment, and only for that moment.
    """
    going = GOINGS[rng.integers(len(GOINGS))]
    angle = rng.uniform(0, 2 * np.pi)
    drift = (
        half_view * rng.uniform(0.45, 0.9) * np.array([math.cos(angle), 0.3 * math.sin(angle), 0.5 * math.sin(angle)])
    )
    drift[0] += math.copysign(0.25 * half_view, drift[0])
    spin = float(rng.choice([-1, 1]) * rng.uniform(1.2, 2.6))
    match going:
        case "slides":
            return replace(body, going=going, drift=drift)
        case "spins":
            return replace(body, going=going, spin=spin)
        case "bounces":
            flat = drift * np.array([1, 0, 1])
            return replace(body, going=going, drift=flat, hop=float(0.5 * half_view), hops=float(rng.uniform(1, 2)))


_WHEN = np.linspace(-0.55, 0.55, 8)


def _fits(body: Body, others: list[Body], scene: Scene) -> bool:
    """Inside the room, above the floor, and never through another body or the nominal camera."""
    centre, _ = body.place(_WHEN if body.going else _WHEN[:1])
    low, high = centre.min(axis=0), centre.max(axis=0)
    reach = body.half[1] if body.turn[0] == 0 and body.turn[2] == 0 else body.radius
    if high[1] + reach > scene.floor + 1e-6 or _gap(centre, np.zeros(3)) < body.radius + 0.5:
        return False
    if scene.room is not None:
        away = np.array([body.radius, reach, body.radius])
        if (low < scene.room[0] + away).any() or (high[[0, 2]] > (scene.room[1] - away)[[0, 2]]).any():
            return False
    return all(
        _gap(centre, other.place(_WHEN if other.going else _WHEN[:1])[0]) > 0.9 * (body.radius + other.radius)
        for other in others
    )


def _gap(a: np.ndarray, b: np.ndarray) -> float:
    """Smallest distance between two paths `[n 3]`, sampled at the same times."""
    return math.sqrt(((a - b) ** 2).sum(axis=-1).min())
