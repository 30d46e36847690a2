"""What a video model is finetuned on: prompts, clips of the world or of a folder, and a cache of both, encoded.

Encoders are called once per clip; after that a training needs neither VAE nor text encoder.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from vggrpo.bootstrap.assets import load_tensors, save_json, save_tensors, sha256
from vggrpo.bootstrap.captions import draw_captions, seeds_of
from vggrpo.bootstrap.footage import render_footage

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")
SHARD = 16
"""Clips in one file of the cache, and what an interruption can lose."""


class Encoders(NamedTuple):
    """What turns clips and prompts into what a video model works on."""

    video: Callable[[Float[Tensor, "B T 3 H W"]], Float[Tensor, "B C L h w"]]
    """Normalised latents of video in [0, 1]."""
    text: Callable[[list[str]], Float[Tensor, "B tokens channels"]]
    """Prompt embeddings, 0 beyond a prompt's end."""
    identity: dict[str, Any]
    """What tells these encoders from others: sha256 of their files, the number of tokens, what is told."""
    first: Callable[[Float[Tensor, "B T 3 H W"]], tuple[Tensor, ...]] = lambda clips: ()
    """What the model is told of each clip's first frame, [B ...] each."""


@dataclass(frozen=True)
class DataConfig:
    """Which clips, and in what size."""

    videos: str | None = None
    """Folder of videos, each with its caption in a .txt beside it; None is the world."""
    first_seed: int = 0
    """Of the world's clips."""
    scenes: int | None = None
    """Scenes that the world's clips share, as many with moving bodies as without; None gives each clip its own."""
    sway: float = 0.0
    """Degrees of hand-held sway of half of the world's clips; 0: they shake from frame to frame in its place."""
    unseen: bool = False
    """Only those clips of shared scenes whose camera does what no training clip does there, for tests."""
    num_clips: int = 1024
    """From the world, or at most this many of the folder's videos, by name."""
    frames: int = 17
    """4 n + 1, from a video's beginning."""
    every: int = 1
    """Take one in so many of a video's frames."""
    height: int = 64
    """A video is scaled until it covers height x width, and its middle is kept."""
    width: int = 64
    """See `height`."""
    negative_prompt: str = ""
    """What an unconditional model is told, in training and guidance."""
    cache: str = "runs/cache"
    """Folder of the encoded clips."""

    def __post_init__(self) -> None:
        if self.frames < 1 or self.frames % 4 != 1:
            raise ValueError(f"frames must be 4 n + 1 (1, 5, ..., 17, ..., 81), got {self.frames}")
        if min(self.num_clips, self.every, self.height, self.width) < 1 or self.first_seed < 0:
            raise ValueError("num_clips, every, height and width must be >= 1, and first_seed >= 0")
        if self.scenes is not None and self.scenes < 1:
            raise ValueError(f"scenes must be None or >= 1, got {self.scenes}")
        if self.sway < 0 or (self.sway and self.videos is not None):
            raise ValueError(f"sway must be >= 0, and is the world's alone, got {self.sway:g}")
        if self.scenes is None and self.unseen:
            raise ValueError("unseen commands are those of shared scenes: give scenes")
        if self.videos is None and (self.frames, self.height, self.width, self.every) != (17, 64, 64, 1):
            raise ValueError("the world's clips have 17 frames of 64 x 64: leave frames, height, width and every alone")

    @property
    def seeds(self) -> list[int]:
        """Of the world's clips."""
        return seeds_of(self.first_seed, self.num_clips, self.scenes, self.unseen)


@dataclass(frozen=True)
class Encoded:
    """N clips as a video model sees them."""

    z0: Float[Tensor, "N C L h w"]
    text: Float[Tensor, "N tokens channels"]
    negative: Float[Tensor, "tokens channels"]
    """Embedding of the negative prompt."""
    captions: tuple[str, ...]
    given: tuple[Tensor, ...] = ()
    """What is told of each clip's first frame, [N ...] each."""


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a text file, one a line; blank lines do not count.

    Raises:
        ValueError: no such file, one that is not UTF-8, one without a prompt.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no prompts at {path}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt: write one on each line")
    return prompts


def read_video(path: Path, config: DataConfig) -> UInt8[Tensor, "T 3 H W"]:
    """The first frames of a video, scaled and cropped.

    Raises:
        ValueError: a file that cannot be decoded, or one with too few frames.
    """
    import av

    pictures: list[Tensor] = []
    try:
        with av.open(str(path)) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number % config.every == 0:
                    pictures.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
                if len(pictures) == config.frames:
                    break
    except (av.error.FFmpegError, IndexError, OSError) as error:
        reason = "it has no video stream" if isinstance(error, IndexError) else str(error).splitlines()[0]
        raise ValueError(f"cannot read {path} as a video ({reason}): repair or remove it") from None
    if len(pictures) < config.frames:
        raise ValueError(
            f"{path} gives {len(pictures)} frames, taking one in {config.every}, and {config.frames} are needed: "
            "remove it, or lower frames or every"
        )
    return _cover(torch.stack(pictures).movedim(-1, 1), config.height, config.width)


def read_frames(paths: Sequence[Path], config: DataConfig) -> UInt8[Tensor, "T 3 H W"]:
    """A video whose frames are pictures of one size, scaled and cropped.

    Raises:
        ValueError: a file that is no picture, pictures of several sizes, or too few of them.
    """
    from PIL import Image, UnidentifiedImageError

    chosen = list(paths)[:: config.every][: config.frames]
    if len(chosen) < config.frames:
        raise ValueError(f"{len(chosen)} frames, taking one in {config.every}, and {config.frames} are needed")
    pictures = []
    for path in chosen:
        try:
            pictures.append(torch.from_numpy(np.array(Image.open(path).convert("RGB"))))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"cannot read {path} as a picture ({error}): repair or remove it") from None
    if len({picture.shape for picture in pictures}) > 1:
        raise ValueError(f"the frames in {paths[0].parent} have several sizes: a video has one")
    return _cover(torch.stack(pictures).movedim(-1, 1), config.height, config.width)


def write_video(path: Path, video: UInt8[Tensor, "T 3 H W"], fps: int) -> None:
    """An mp4 (H.264, nearly without loss) that is complete or not there."""
    import av

    part = path.with_suffix(f".part{path.suffix}")
    with av.open(str(part), "w") as container:
        stream = container.add_stream("h264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = video.shape[-1], video.shape[-2], "yuv420p"
        stream.options = {"crf": "12"}
        for frame in video.movedim(1, -1).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    os.replace(part, path)


def read_folder(config: DataConfig) -> dict[Path, str]:
    """Videos of a folder with their captions, by name.

    Raises:
        ValueError: no such folder, no videos in it, a video without a caption.
    """
    folder = Path(config.videos or "")
    if not folder.is_dir():
        raise ValueError(f"no folder of videos at {folder}")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)[: config.num_clips]
    if not found:
        raise ValueError(f"{folder} holds no video ({', '.join(SUFFIXES)})")
    return {path: " ".join(read_prompts(path.with_suffix(".txt"))) for path in found}


def encode_clips(config: DataConfig, encoders: Encoders, say: Callable[[str], None]) -> Encoded:
    """The clips of `config`, encoded; from the cache as far as they have been before. `say` hears of progress.

    The cache is a folder named by a digest of all that changes the result: encoders, tokens, size, frames, negative
    prompt, the seeds or the files' own bytes and captions.

    Raises:
        ValueError: from `read_folder` and `read_video`, or a cache that is damaged.
    """
    sources: list[Any] = []
    if config.videos is None:
        sources = config.seeds
        captions = [caption.text for caption in draw_captions(config.seeds, config.scenes)]
        names: list[Any] = sources
    else:
        listed = read_folder(config)
        sources, captions = list(listed), list(listed.values())
        names = [sha256(path) for path in sources]
    key = {
        "encoders": encoders.identity,
        "size": [config.frames, config.every, config.height, config.width],
        "negative_prompt": config.negative_prompt,
        "clips": names,
        "scenes": config.scenes,
        "captions": captions,
    } | ({"sway": config.sway} if config.sway else {})  # caches that knew of none keep their names
    folder = Path(config.cache) / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    shards = [slice(start, start + SHARD) for start in range(0, len(sources), SHARD)]
    for number, part in enumerate(shards):
        if not _shard(folder, number).exists():
            video = torch.cat(list(_load(config, sources[part]))).float() / 255
            tensors = {"z0": encoders.video(video), "text": encoders.text(captions[part])}
            tensors |= {f"given.{n}": x for n, x in enumerate(encoders.first(video))}
            save_tensors(_shard(folder, number), {name: x.float().cpu().contiguous() for name, x in tensors.items()})
            say(f"encoding: {min(part.stop, len(sources))} of {len(sources)} clips")
    save_json(folder / "index.json", key)
    stored = [load_tensors(_shard(folder, number))[0] for number in range(len(shards))]
    whole = {name: torch.cat([shard[name] for shard in stored]) for name in stored[0]}
    given = tuple(whole[name] for name in sorted(whole) if name.startswith("given."))
    negative = encoders.text([config.negative_prompt])[0].float().cpu()
    return Encoded(whole["z0"], whole["text"], negative, tuple(captions), given)


def _load(config: DataConfig, sources: list[Any]) -> Iterator[UInt8[Tensor, "B T 3 H W"]]:
    if config.videos is None:
        return render_footage(sources, scenes=config.scenes, sway=config.sway)
    return (read_video(path, config)[None] for path in sources)


def _cover(video: UInt8[Tensor, "T 3 H W"], height: int, width: int) -> UInt8[Tensor, "T 3 {height} {width}"]:
    H, W = video.shape[-2:]
    scale = max(height / H, width / W)
    size = max(round(H * scale), height), max(round(W * scale), width)
    if size != (H, W):
        video = F.interpolate(video.float(), size, mode="bilinear", antialias=True).round().clamp(0, 255).byte()
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return video[..., top : top + height, left : left + width]


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"
