"""One line that says where a long run is."""

import sys
import time

SECONDS_BETWEEN_LINES = 30


class Progress:
    """On a terminal the line renews itself; into a file a line is written now and then."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self.last = -float("inf")

    def __call__(self, line: str) -> None:
        if self.terminal:
            print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self.last >= SECONDS_BETWEEN_LINES:
            self.last = time.monotonic()
            print(line, file=sys.stderr, flush=True)
