"""Geometry of videos: types, cameras, reprojection, and a procedural world whose truth is known exactly."""

from geometry.reproject import dynamic_mask
from geometry.types import FlowGrid, Geometry, GeometryModel, check_geometry

__all__ = ["FlowGrid", "Geometry", "GeometryModel", "check_geometry", "dynamic_mask"]
