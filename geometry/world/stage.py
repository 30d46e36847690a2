"""From a seed to what the renderer takes: a scene, a camera path through it that touches nothing, a caption."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geometry.cameras import anchored, inverse, pinhole, relative, rigid, so3_exp, so3_log
from geometry.world.caption import caption
from geometry.world.scene import Body, Material, Scene, draw_scene
from geometry.world.shot import PATTERN_CODES, SHAPE_CODES, Shot
from geometry.world.trajectory import MOTIONS, Motion, Move, draw_move, path, shake, sway

MAX_BODIES = 6
CLEARANCE = 0.35
"""Scene units that the camera keeps from walls and bodies."""
_BACKDROP = np.array([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])


@dataclass(frozen=True)
class Take:
    """One drawn clip before it is rendered."""

    scene: Scene
    move: Move
    caption: str
    relative_pose: Float[Tensor, "pairs 6"]
    shot: Shot
    """With a batch axis of one."""


def draw_take(
    seed: int,
    frames: int,
    size: tuple[int, int],
    dynamic: bool,
    motion: Motion | None,
    jitter: float,
    texture_scale: float,
    scene: int | None = None,
    swaying: float = 0.0,
) -> Take:
    """Draw scenes and paths from the seed's own stream until the camera passes through free space.

    With the number of a scene only the path is drawn: `known_scene`.
    """
    for attempt in range(1000):
        rng = np.random.default_rng([seed, attempt])
        if scene is None:
            stage = draw_scene(rng, dynamic=dynamic, texture_scale=texture_scale)
        else:
            stage = known_scene(scene, dynamic, texture_scale)
        move = draw_move(rng, motion)
        position, rotation = path(rng, move, frames, stage.focus)
        steady = _camera(stage, position, rotation)
        if len(stage.bodies) >= 2 and _clear(stage, steady[:, :3, 3].numpy()):
            break
    else:
        raise RuntimeError(f"seed {seed}: no free camera path in 1000 scenes")  # a bug of ours: about 1 in 3 is free
    shaken = shake(np.random.default_rng([seed, 2**32]), frames, jitter)
    swayed = sway(np.random.default_rng([seed, 2**32, 1]), frames, swaying)
    off, turned = (torch.from_numpy(a + b) for a, b in zip(shaken, swayed, strict=True))
    wobble = rigid(so3_exp(turned), off)
    between = relative(steady)
    relative_pose = torch.cat([between[:, :3, 3], so3_log(between[:, :3, :3])], dim=-1)
    shot = _shot(stage, steady @ wobble, size)
    return Take(stage, move, caption(stage, move), relative_pose.float(), shot)


@cache
def known_scene(number: int, dynamic: bool, texture_scale: float = 1.0) -> Scene:
    """One of a series of scenes in which every named motion is free at its full speed, to either side."""
    for attempt in range(100_000):
        scene = draw_scene(np.random.default_rng([number, attempt, 1]), dynamic=dynamic, texture_scale=texture_scale)
        if len(scene.bodies) >= 2 and all(_free(scene, motion) for motion in MOTIONS):
            return scene
    raise RuntimeError(f"scene {number}: none is free for every motion")  # a bug of ours


def stack_takes(takes: list[Take]) -> Shot:
    """The batch of shots of some takes."""
    shots = [vars(take.shot) for take in takes]
    return Shot(**{name: torch.cat([shot[name] for shot in shots]) for name in shots[0]})


def _camera(scene: Scene, position: np.ndarray, rotation: np.ndarray) -> Float[Tensor, "T 4 4"]:
    """Camera to stage, float64: the path in the axes of a nominal view that looks down by the scene's pitch."""
    nominal = rigid(so3_exp(torch.tensor([-scene.pitch, 0.0, 0.0], dtype=torch.float64)), torch.zeros(3).double())
    return nominal @ rigid(so3_exp(torch.from_numpy(rotation)), torch.from_numpy(position))


def _free(scene: Scene, motion: Motion) -> bool:
    ways = [(side, seed) for side in (-1, 1) for seed in range(4 if motion == "arc" else 1)]  # an arc rises or sinks
    paths = [path(np.random.default_rng(seed), Move(motion, 1.4, side), 17, scene.focus) for side, seed in ways]
    return all(_clear(scene, _camera(scene, *each)[:, :3, 3].numpy()) for each in paths)


def _clear(scene: Scene, camera: np.ndarray) -> bool:
    if (camera[:, 1] > scene.floor - CLEARANCE).any():
        return False
    if scene.room is not None and ((camera < scene.room[0] + CLEARANCE) | (camera > scene.room[1] - CLEARANCE)).any():
        return False
    u = _times(len(camera))[1:-1]
    gaps = [np.linalg.norm(camera - body.place(u)[0], axis=-1) - body.radius for body in scene.bodies]
    return bool(min(gap.min() for gap in gaps) > CLEARANCE) if gaps else True


def _times(frames: int) -> np.ndarray:
    """Clip time of every frame, with one more before and one more after: `[T + 2]`."""
    step = 1 / max(frames - 1, 1)
    return (np.arange(-1, frames + 1) * step) - (0.5 if frames > 1 else 0.0)


def _shot(scene: Scene, camera: Float[Tensor, "T 4 4"], size: tuple[int, int]) -> Shot:
    frames = len(camera)
    poses = torch.eye(4, dtype=torch.float64).repeat(frames + 2, MAX_BODIES, 1, 1)
    shape, half = torch.full((MAX_BODIES,), -1), torch.ones(MAX_BODIES, 3)
    material = torch.zeros(6 + MAX_BODIES, 14)
    material[:, 1] = 1.0  # a cell of a body that is not there: anything but 0
    poses[:, : len(scene.bodies)] = _bodies_to_stage(scene.bodies, frames)
    for n, body in enumerate(scene.bodies):
        shape[n], half[n] = SHAPE_CODES[body.shape], torch.from_numpy(body.half)
        material[6 + n] = _row(body.material)
    for wall, surface in enumerate(scene.surfaces):
        fade = 0.0 if scene.room is not None else 1 / (4 * scene.focus) ** 2
        material[wall] = _row(surface, fade)
    if scene.room is None:  # the open ground is the floor of a room without walls
        material[:6] = material[3]
    room = torch.from_numpy(_BACKDROP.copy() if scene.room is None else scene.room)
    room[1, 1] = scene.floor
    world = inverse(camera[0])
    motion = world @ poses[2:] @ inverse(world @ poses[1:-1]) - torch.eye(4)
    motion[:, [n for n in range(MAX_BODIES) if n >= len(scene.bodies) or not scene.bodies[n].going]] = 0  # exactly
    fields = {
        "camera": camera,
        "c2w": anchored(camera),
        "world": world,
        "intrinsics": pinhole(torch.tensor(scene.fov, dtype=torch.float64), *size),
        "room": room,
        "indoors": torch.tensor(int(scene.room is not None)),
        "shape": shape,
        "half": half,
        "pose": poses[1:-1],
        "motion": motion,
        "material": material.expand(frames, -1, -1),
        "sky": torch.from_numpy(scene.sky),
        "light": torch.from_numpy(scene.light),
    }
    return Shot(**{k: (v.float() if v.is_floating_point() else v)[None].contiguous() for k, v in fields.items()})


def _bodies_to_stage(bodies: tuple[Body, ...], frames: int) -> Float[Tensor, "_ N 4 4"]:
    placed = [body.place(_times(frames)) for body in bodies]
    spin = torch.zeros(frames + 2, len(bodies), 3, dtype=torch.float64)
    spin[..., 1] = torch.from_numpy(np.stack([angle for _, angle in placed], axis=1))
    turn = torch.from_numpy(np.stack([body.turn for body in bodies]))
    centre = torch.from_numpy(np.stack([centre for centre, _ in placed], axis=1))
    return rigid(so3_exp(turn) @ so3_exp(spin), centre)


def _row(material: Material, fade: float = 0.0) -> Float[Tensor, " 14"]:
    turn = [np.cos(material.turn), np.sin(material.turn), fade]
    head = [PATTERN_CODES[material.pattern], material.cell]
    return torch.tensor([*head, *material.rgb.flatten(), *material.offset, *turn], dtype=torch.float32)
