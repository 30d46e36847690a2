"""SIGTERM and SIGINT ask a run to stop: the first is obeyed at the next chance, the second at once."""

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any

STATUS = 143
"""Exit status of a run that was asked to stop: 128 + SIGTERM."""


class Interrupted(Exception):
    """The run was asked to stop, and is where it can."""


class Signals:
    """While the context lasts, a signal is remembered instead of killing the process."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def poll(self) -> None:
        """Raise `Interrupted` if a signal has come: to be called wherever work may be abandoned."""
        if self.received is not None:
            raise Interrupted(self.received)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(STATUS)
        self.received = signal.Signals(number).name
        print(f"\nvggrpo: {self.received}: stopping; once more leaves at once, without a checkpoint", file=sys.stderr)
