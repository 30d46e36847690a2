"""The prompts that ship: captions of the world whose camera moves. `python -m launch.prompts` writes them again.

A camera that is told to stand still has nothing to be steadier at, and the motion floor would punish it for obeying.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

from vggrpo.bootstrap.captions import draw_captions

FOLDER = Path("assets/prompts")
FILES = {"train": (50_000_000, 64), "held_out": (51_000_000, 32)}
"""Name: first seed, how many. The generator's own captions and the judges' have other seeds."""


def prompts(first_seed: int, count: int) -> list[str]:
    """Captions of the first seeds whose camera moves."""
    return list(itertools.islice(_moving(first_seed), count))


def main() -> None:
    """Write every file."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, (first_seed, count) in FILES.items():
        (FOLDER / f"{name}.txt").write_text("".join(f"{prompt}\n" for prompt in prompts(first_seed, count)))


def _moving(first_seed: int) -> Iterator[str]:
    for seed in itertools.count(first_seed):
        (caption,) = draw_captions([seed])
        if caption.facts["camera"] != "static":
            yield caption.text


if __name__ == "__main__":
    main()
