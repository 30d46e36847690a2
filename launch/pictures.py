"""The pictures of the README: assets/pictures/world.png and scene.png.

    python -m launch.pictures        # ten seconds; run it when the world changes, and look at both

What draws them (`tile`, `depth_tile`, `sheet`, `label`) also draws what `make demo` leaves behind.
"""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from geometry import dynamic_mask
from geometry.cameras import inverse, rigid, so3_exp, transform
from geometry.world import Clip, Motion, make_clip
from rewards.base import median_depth

PICTURES = Path(__file__).parent.parent / "assets" / "pictures"
INK, FAINT, SKY, MOVING = (25, 25, 30), (105, 105, 112), (150, 150, 155), (255, 110, 20)
GAP = 4
"""Pixels between tiles."""

CLIPS: tuple[tuple[int, Motion, bool], ...] = (
    (702, "orbit", False),
    (609, "pedestal", True),
    (207, "tilt", False),
    (510, "truck", True),
    (302, "dolly_in", False),
    (709, "orbit", True),
    (406, "dolly_out", False),
    (808, "arc", True),
    (109, "pan", False),
    (904, "random", True),
    (111, "pan", True),
    (3, "static", True),
)
"""Seed, motion and whether something moves by itself: the clips of world.png."""
SCENE: tuple[int, Motion, bool] = CLIPS[0]
"""The clip of scene.png."""


def tile(frame: Float[Tensor, "3 H W"], zoom: int = 2) -> Image.Image:
    """A frame in [0, 1] as an image, every pixel a crisp square of `zoom` pixels."""
    return _zoomed((frame.clamp(0, 1) * 255).round().movedim(0, -1).byte().cpu().numpy(), zoom)


def depth_tile(
    depth: Float[Tensor, "H W"], valid: Bool[Tensor, "H W"], limits: tuple[float, float], zoom: int = 2
) -> Image.Image:
    """1/depth in colours, from far (dark) to near (bright) within `limits` (near, far); grey where nothing is seen."""
    near, far = limits
    share = ((1 / depth - 1 / far) / (1 / near - 1 / far)).clamp(0, 1).cpu().numpy()
    colors = (matplotlib.colormaps["inferno"](0.05 + 0.95 * share)[..., :3] * 255).astype(np.uint8)
    colors[~valid.cpu().numpy()] = SKY
    return _zoomed(colors, zoom)


def depth_limits(clip: Clip) -> tuple[float, float]:
    """Near and far for `depth_tile`, the same for a whole clip: 1 % and 99 % of what it sees."""
    seen = clip.geometry.depth[clip.geometry.valid]
    near, far = seen.quantile(torch.tensor([0.01, 0.99], device=seen.device)).tolist()
    return near, max(far, 1.01 * near)


def motion_tile(frame: Float[Tensor, "3 H W"], moving: Bool[Tensor, "H W"], zoom: int = 2) -> Image.Image:
    """The dynamic mask: bright where something moves by itself, over a frame that is barely there."""
    ghost = (0.12 + 0.3 * frame.mean(0)).expand(3, -1, -1)
    bright = 0.45 * frame.mean(0) + 0.65 * frame.new_tensor(MOVING)[:, None, None] / 255
    return tile(torch.where(moving, bright, ghost), zoom)


def sheet(rows: list[list[Image.Image]]) -> Image.Image:
    """Images side by side in rows, `GAP` pixels apart on white."""
    strips = [_side_by_side(row, vertical=False) for row in rows]
    return _side_by_side(strips, vertical=True)


def framed(image: Image.Image, margin: int) -> Image.Image:
    """White all around."""
    larger = Image.new("RGB", (image.width + 2 * margin, image.height + 2 * margin), "white")
    larger.paste(image, (margin, margin))
    return larger


def label(lines: list[str] | str, width: int, points: int = 15, color: tuple[int, int, int] = INK) -> Image.Image:
    """Text on white, top left, one line a string, as high as it needs to be; a plain string is wrapped at the width."""
    font = ImageFont.load_default(points)
    if isinstance(lines, str):
        lines = _wrapped(lines, font, width)
    image = Image.new("RGB", (width, len(lines) * (points + 4) + 2), "white")
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        draw.text((0, number * (points + 4)), line, font=font, fill=color)
    return image


def world(clips: tuple[tuple[int, Motion, bool], ...] = CLIPS, columns: int = 2) -> Image.Image:
    """The contact sheet: of each clip three frames, the middle one's depth and dynamic mask, and the caption."""
    blocks = [_block(make_clip(seed, motion=motion, dynamic=dynamic)) for seed, motion, dynamic in clips]
    head = _side_by_side(
        [label([name], 128, color=FAINT) for name in ("first frame", "middle", "last", "depth", "what moves")],
        vertical=False,
    )
    pad, rule = Image.new("RGB", (20, 1), "white"), Image.new("RGB", (1, 6), "white")
    rows = [[head, pad] * (columns - 1) + [head]]
    for start in range(0, len(blocks), columns):
        row = [x for block in blocks[start : start + columns] for x in (block, pad)]
        rows += [row[:-1], [rule]]
    return framed(sheet(rows[:-1]), 14)


def scene(seed: int, motion: Motion, dynamic: bool, *, turn: float = 22, pitch: float = 30) -> Figure:
    """One clip as a solid world, its static points fused and its cameras: seen from behind, and as a map."""
    clip = make_clip(seed, size=(384, 384), motion=motion, dynamic=dynamic, supersample=1)
    points, colors = _static_cloud(clip)
    c2w, intrinsics = clip.geometry.c2w, clip.geometry.intrinsics
    focus = points.median(dim=0).values
    sideways, down = so3_exp(torch.tensor([[0.0, turn, 0.0], [-pitch, 0.0, 0.0]]).deg2rad())
    rotation = sideways @ down
    eye = rigid(rotation, focus - 2.4 * focus[2] * rotation[:, 2])

    def from_behind(x: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
        local = transform(inverse(eye), x)
        return torch.cat([local[:, :2] / local[:, 2:], local[:, 2:]], dim=-1)

    def from_above(x: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
        return x[:, [0, 2, 1]]

    figure = Figure(figsize=(12, 5.9), layout="constrained", dpi=100)
    left, right = figure.subplots(1, 2, width_ratios=[1.04, 1])
    for axes, view in ((left, from_behind), (right, from_above)):
        image, extent = _splat(view(points), colors)
        axes.imshow(image, extent=extent, origin="lower", interpolation="antialiased")
        for i in range(0, len(c2w), 4):
            color = matplotlib.colormaps["turbo"](0.08 + 0.84 * i / (len(c2w) - 1))
            for line in _frustum(c2w[i], intrinsics[i]):
                axes.plot(*view(line)[:, :2].T.numpy(), color=color, linewidth=1.5)
        axes.plot(*view(c2w[:, :3, 3])[:, :2].T.numpy(), color="black", linewidth=1.2, marker=".", markersize=5)
        axes.use_sticky_edges = False
        axes.margins(0.02)
        axes.autoscale()
        axes.set_aspect("equal")
    for i, offset, side in ((0, (9, -4), "left"), (len(c2w) - 1, (4, -17), "right")):
        right.annotate(f"frame {i}", (c2w[i, 0, 3], c2w[i, 2, 3]), offset, textcoords="offset points", ha=side)
    left.invert_yaxis()
    left.set_axis_off()
    right.set(xlabel="x, right (scene units)", ylabel="z, forward (scene units)")
    right.spines[["top", "right"]].set_visible(False)
    return figure


def _static_cloud(clip: Clip) -> tuple[Float[Tensor, "N 3"], Float[Tensor, "N 3"]]:
    """Points and colours of what stands still, from all frames; a room's ceiling is taken off, to see in."""
    scene = clip.geometry
    assert scene.valid is not None
    stage = transform(inverse(clip.shot.world), scene.points[None])[0]
    keep = scene.valid & ~dynamic_mask(scene, 0.0) & (scene.depth < 3 * median_depth(scene))
    if clip.shot.indoors:
        keep &= stage[..., 1] > clip.shot.room[0, 0, 1] + 0.01
    return scene.points[keep], clip.video.movedim(1, -1)[keep]


def _splat(
    places: Float[Tensor, "N 3"], colors: Float[Tensor, "N 3"], pixels: int = 900
) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """The cloud as an image `pixels` long on its longer side, coloured by the nearest points, transparent elsewhere.

    `places` are (right, up or down, distance); also returned: the image's edges (left, right, first row, last row).
    """
    low, high = places[:, :2].amin(0), places[:, :2].amax(0)
    scale = pixels / float((high - low).max())
    column, row = ((places[:, :2] - low) * scale).long().unbind(-1)
    image = np.full((int(row.max()) + 3, int(column.max()) + 3, 5), np.inf, np.float32)
    far_first = places[:, 2].argsort(descending=True)
    drawn = torch.cat([colors, torch.ones_like(colors[:, :1]), places[:, 2:]], dim=-1)
    image[row[far_first].numpy(), column[far_first].numpy()] = drawn[far_first].numpy()
    spread = np.stack([np.roll(image, shift, axis=(0, 1)) for shift in np.ndindex(3, 3)])  # points of 3 x 3 pixels
    image = np.take_along_axis(spread, spread[..., -1:].argmin(0)[None], axis=0)[0, ..., :4]
    image[np.isinf(image)] = 0
    (left, first), (height, width) = (low - 1 / scale).tolist(), image.shape[:2]
    return image, (left, left + width / scale, first, first + height / scale)


def _frustum(
    c2w: Float[Tensor, "4 4"], intrinsics: Float[Tensor, "3 3"], length: float = 0.45
) -> list[Float[Tensor, "n 3"]]:
    """A camera's pyramid, `length` scene units deep: its rim and its four edges, as lines in the world."""
    x, y = (intrinsics[:2, 2] / intrinsics.diagonal()[:2] * length).tolist()
    corners = torch.tensor([[-x, -y, length], [x, -y, length], [x, y, length], [-x, y, length], [-x, -y, length]])
    rim = transform(c2w, corners)
    return [rim, *(torch.stack([c2w[:3, 3], corner]) for corner in rim[:4])]


def _block(clip: Clip) -> Image.Image:
    scene, middle = clip.geometry, len(clip.video) // 2
    assert scene.valid is not None
    assert isinstance(clip.caption, str)
    moving = dynamic_mask(scene, 0.004 * median_depth(scene))[middle]
    tiles = [tile(clip.video[t]) for t in (0, middle, -1)]
    tiles.append(depth_tile(scene.depth[middle], scene.valid[middle], depth_limits(clip)))
    tiles.append(motion_tile(clip.video[middle], moving))
    strip = _side_by_side(tiles, vertical=False)
    return sheet([[strip], [label(clip.caption, strip.width)]])


def _wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _zoomed(pixels: np.ndarray, zoom: int) -> Image.Image:
    return Image.fromarray(pixels.repeat(zoom, axis=0).repeat(zoom, axis=1))


def _side_by_side(images: list[Image.Image], *, vertical: bool) -> Image.Image:
    axis = 1 if vertical else 0
    length = sum(image.size[axis] for image in images) + GAP * (len(images) - 1)
    across = max(image.size[1 - axis] for image in images)
    joined = Image.new("RGB", (across, length) if vertical else (length, across), "white")
    at = 0
    for image in images:
        joined.paste(image, (0, at) if vertical else (at, 0))
        at += image.size[axis] + GAP
    return joined


def main() -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    world().save(PICTURES / "world.png", optimize=True)
    scene(*SCENE).savefig(PICTURES / "scene.png")
    for name in ("world.png", "scene.png"):
        print(f"drawn: assets/pictures/{name}, {(PICTURES / name).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
