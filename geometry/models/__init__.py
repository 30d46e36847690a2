"""Geometry networks and how `geometry.backbone` drives them: one file each, with spec, call and parse."""
