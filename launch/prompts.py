"""The prompts that ship: captions of the generator's scenes whose camera moves. `python -m launch.prompts` writes them.

A camera that is told to stand still has nothing to be steadier at, and the motion floor would punish it for obeying.
"""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

from vggrpo.bootstrap.captions import draw_captions, seeds_of

FOLDER = Path("assets/prompts")
SCENES = 2
"""Of the generator that ships: `launch/recipes/bootstrap/generator_hand_held.yaml`."""
FILES = {"train": (50_000_000, 64, False), "held_out": (51_000_000, 28, True)}
"""Name: first seed, how many, and whether the generator was never told such a caption; 28 are all that there are."""
DRAWN = 400
"""Seeds that they are chosen from."""


def prompts(first_seed: int, count: int, unseen: bool) -> list[str]:
    """Captions of the first seeds whose camera moves, each once."""
    return list(itertools.islice(_moving(first_seed, unseen), count))


def main() -> None:
    """Write every file."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, row in FILES.items():
        (FOLDER / f"{name}.txt").write_text("".join(f"{prompt}\n" for prompt in prompts(*row)))


def _moving(first_seed: int, unseen: bool) -> Iterator[str]:
    """Without an order: neighbouring seeds share a scene."""
    told = set()
    seeds = seeds_of(first_seed, DRAWN, SCENES, unseen)
    random.Random(0).shuffle(seeds)
    for caption in draw_captions(seeds, SCENES):
        if caption.facts["camera"] != "static" and caption.text not in told:
            told.add(caption.text)
            yield caption.text


if __name__ == "__main__":
    main()
