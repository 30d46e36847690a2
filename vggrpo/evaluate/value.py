"""What a judge says: a number, or that there is none and why."""

from typing import NamedTuple


class Value(NamedTuple):
    """A number, or NaN and the reason."""

    value: float
    reason: str = ""


NA = float("nan")
