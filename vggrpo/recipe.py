"""Recipes: dataclasses read strictly from YAML, `key=value` on top. What is wrong is one line with file and key."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from vggrpo.config import Recipe

T = TypeVar("T")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A training run's recipe; see `read_recipe`."""
    return read_recipe(Recipe, path, overrides)


def read_recipe(kind: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read a YAML recipe of some kind, a dataclass; `overrides` are `section.key=value`, later ones win.

    Raises:
        ValueError: no such file, no such key (did you mean ...?), a value of the wrong type or out of range; each with
            the file and the key it came from.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no recipe at {path}")
    try:
        data = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    source = str(path)
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign or not key:
            raise ValueError(f"an override is section.key=value, got {override!r}")
        *parents, last = key.split(".")
        node = data
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"override {override!r}: {parent} is not a section")
        node[last] = yaml.safe_load(value)
        source = f"{path} with overrides"
    return _build(kind, data, source, "")


def recipe_from(data: dict[str, Any], source: str) -> Recipe:
    """A training run's recipe from what `dataclasses.asdict` made of one; keys that it lacks have their defaults.

    Raises:
        ValueError: as `read_recipe`.
    """
    return _build(Recipe, data, source, "")


def _build(cls: type[T], data: Any, source: str, where: str) -> T:
    """A dataclass from a mapping, or one line that says which key of which file is wrong."""
    if not isinstance(data, dict):
        raise ValueError(f"{source}: {where or 'the recipe'} must be a section of keys, got {data!r}")
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(hints)}"
            raise ValueError(f"{source}: unknown key {_join(where, key)!r}: {hint}")
    values = {key: _convert(hints[key], value, source, _join(where, key)) for key, value in data.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{source}: {where}{': ' if where else ''}{error}") from None


def _convert(hint: Any, value: Any, source: str, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type[Any], hint), value, source, where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(args[0], value, source, where)
    if origin is Literal and value in args:
        return value
    if origin is list and isinstance(value, list):
        return [_convert(args[0], item, source, where) for item in value]
    if origin is dict and isinstance(value, dict):
        return {str(name): _convert(args[1], item, source, _join(where, name)) for name, item in value.items()}
    if hint is float and (number := _number(value)) is not None:
        return number
    if hint in (int, bool, str) and type(value) is hint:
        return value
    wanted = f"one of {', '.join(map(str, args))}" if origin is Literal else getattr(hint, "__name__", str(hint))
    raise ValueError(f"{source}: {where} must be {wanted}, got {value!r}")


def _number(value: Any) -> float | None:
    """YAML 1.1 reads 1e-3 as a string; None for what is no number."""
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _join(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)
