"""Geometry of videos: types, cameras, reprojection, and a procedural world whose truth is known exactly."""

from geometry.types import FlowGrid, Geometry, GeometryModel, check_geometry

__all__ = ["FlowGrid", "Geometry", "GeometryModel", "check_geometry"]
