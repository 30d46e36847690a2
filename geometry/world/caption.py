"""A grammar that turns a scene and a camera command into a prompt."""

from geometry.world.scene import Body, Scene
from geometry.world.trajectory import Move

CAMERA = {
    "static": ("The camera stands still",),
    "pan": ("The camera pans left", "The camera pans right"),
    "tilt": ("The camera tilts up", "The camera tilts down"),
    "dolly_in": ("The camera dollies in",),
    "dolly_out": ("The camera dollies out",),
    "truck": ("The camera trucks left", "The camera trucks right"),
    "pedestal": ("The camera rises", "The camera sinks"),
    "orbit": ("The camera orbits anticlockwise", "The camera orbits clockwise"),
    "arc": ("The camera arcs anticlockwise, easing in and out,", "The camera arcs clockwise, easing in and out,"),
    "random": ("The camera drifts freely",),
}
"""How a caption begins, by the camera's motion: one way, or one for each side (left, up, anticlockwise first)."""


def caption(scene: Scene, move: Move) -> str:
    """One camera sentence, one about the place and the bodies, one for each body that moves."""
    verb = CAMERA[move.motion]
    camera = verb[0] if len(verb) == 1 else verb[int(move.side > 0)]
    speed = "" if move.motion == "static" else f" {_pace(move.speed)}"
    if scene.room is None:
        place = f"on {_article(scene.surfaces[3].name)} ground under the sky"
    else:
        floor, wall = scene.surfaces[3].name, scene.surfaces[5].name
        place = f"in a room with {_article(floor)} floor and {_article(wall)} wall"
    bodies = _listed([_article(body.name) for body in scene.bodies])
    moving = [f" The {body.name} {_does(body)}." for body in scene.bodies if body.going]
    return f"{camera}{speed} {place}. There are {bodies}.{''.join(moving)}"


def _pace(speed: float) -> str:
    return "slowly" if speed < 0.9 else "fast" if speed > 1.2 else "steadily"


def _does(body: Body) -> str:
    if body.drift is None:
        return f"{body.going} {'clockwise' if body.spin > 0 else 'anticlockwise'}"
    return f"{body.going} to the {'right' if body.drift[0] > 0 else 'left'}"


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _listed(nouns: list[str]) -> str:
    return f"{', '.join(nouns[:-1])} and {nouns[-1]}"
