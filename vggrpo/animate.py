"""Videos side by side in one moving picture: GIF, WebP or PNG, by Pillow."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SUFFIXES = (".gif", ".webp", ".png")
GAP, HEADER = 6, 20
"""Pixels between videos, and above them for their names."""
INK, PAPER = (25, 25, 30), (255, 255, 255)

Named = Mapping[str, Float[Tensor, "T 3 H W"]]
"""Videos of one prompt by the model that made them, RGB in [0, 1]."""


def check_animation(path: str | None) -> None:
    """Refuse what no moving picture can be written to.

    Raises:
        ValueError: another ending, or no such folder.
    """
    if path is not None and Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"animate must end in {', '.join(SUFFIXES)}, got {path}")
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise ValueError(f"animate: there is no folder {Path(path).parent}")


def frames_of(videos: Sequence[Named], columns: int = 2, zoom: int = 2) -> list[Image.Image]:
    """One picture a frame: prompts in `columns`, the models of each side by side under their names.

    Raises:
        ValueError: no videos, or videos of several lengths or sizes.
    """
    shapes = {tuple(video.shape) for named in videos for video in named.values()}
    if len(shapes) != 1:
        raise ValueError(f"an animation needs videos of one length and size, got {sorted(shapes) or 'none'}")
    T, _, H, W = shapes.pop()
    width, height, models = zoom * W, zoom * H, max(len(named) for named in videos)
    block = models * (width + 2) - 2 + 2 * GAP
    rows = -(-len(videos) // columns)
    columns = min(columns, len(videos))
    canvas = Image.new("RGB", (columns * block, HEADER + rows * (height + GAP)), PAPER)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    places = [
        (
            (number % columns) * block + GAP + k * (width + 2),
            HEADER + (number // columns) * (height + GAP),
            video,
        )
        for number, named in enumerate(videos)
        for k, video in enumerate(named.values())
    ]
    for column in range(columns):
        for k, name in enumerate(videos[column]):
            pen.text((column * block + GAP + k * (width + 2), 2), name, font=font, fill=INK)
    pictures = []
    for t in range(T):
        picture = canvas.copy()
        for left, top, video in places:
            pixels = (255 * video[t].clamp(0, 1)).round().byte().movedim(0, -1).contiguous().cpu().numpy()
            picture.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST), (left, top))
        pictures.append(picture)
    return pictures


def save_animation(path: str | Path, videos: Sequence[Named], fps: int = 8, columns: int = 2, zoom: int = 2) -> None:
    """Write it; it plays there and back without end, so that nothing jumps.

    Raises:
        ValueError: as `check_animation` and `frames_of`.
    """
    check_animation(str(path))
    frames = frames_of(videos, columns, zoom)
    frames += frames[-2:0:-1]
    if Path(path).suffix.lower() == ".gif":  # one palette for all frames, or colours shimmer
        some = Image.new("RGB", (frames[0].width, 3 * frames[0].height))
        for k, frame in enumerate((frames[0], frames[len(frames) // 4], frames[len(frames) // 2])):
            some.paste(frame, (0, k * frame.height))
        palette = some.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    options: dict[str, Any] = {"lossless": False, "quality": 85} if Path(path).suffix.lower() == ".webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0, **options)
