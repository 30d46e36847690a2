"""A procedural 4-D world whose truth is known exactly."""

from geometry.world.clips import CameraCommand, Clip, Tracks, film, make_clip, make_clips
from geometry.world.perturb import PERTURBATIONS, Perturbation
from geometry.world.trajectory import MOTIONS, Motion

__all__ = [
    "MOTIONS",
    "PERTURBATIONS",
    "CameraCommand",
    "Clip",
    "Motion",
    "Perturbation",
    "Tracks",
    "film",
    "make_clip",
    "make_clips",
]
