"""Clips of any size on disk, one file each: latents and the video that they are of. Only one is in memory at a time.

out/clips/00000.safetensors    z [C L h w] normalised, fp32; video [T 3 H W], bytes
"""

from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from jaxtyping import Float
from torch import Tensor

from geometry.stitch import Sample
from vggrpo.bootstrap.assets import load_tensors, save_tensors
from vggrpo.bootstrap.progress import Progress
from vggrpo.bootstrap.vae import decode, denormalise, encode, normalise
from vggrpo.data import SUFFIXES, read_prompts, read_video
from vggrpo.stitch.pair_recipe import ClipsRecipe, PairRecipe
from vggrpo.stitch.team import Team


def listed_videos(clips: ClipsRecipe) -> list[Path]:
    """The folder's videos, by name.

    Raises:
        ValueError: no such folder, or no videos in it.
    """
    if clips.videos is None:
        return []
    folder = Path(clips.videos)
    if not folder.is_dir():
        raise ValueError(f"no folder of videos at {folder}: set clips.videos")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)[: clips.num_videos]
    if not found:
        raise ValueError(f"{folder} holds no video ({', '.join(SUFFIXES)}): set clips.videos")
    return found


def split(recipe: PairRecipe) -> tuple[list[int], list[int], list[int]]:
    """Numbers of the clips to fit on, to rank on, and to report on; the last two are spread over all.

    Raises:
        ValueError: nothing would be left to fit on; from `listed_videos`.
    """
    clips = recipe.clips
    num, apart = len(listed_videos(clips)) + clips.sampling.num_samples, clips.ranking + clips.held_out
    if num <= apart:
        raise ValueError(
            f"there are {num} clips, and {apart} are held out (clips.ranking + clips.held_out): give more, or hold "
            "out fewer"
        )
    out = [(2 * i + 1) * num // (2 * apart) for i in range(apart)]
    order = torch.randperm(apart, generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    ranking = sorted(out[i] for i in order[: clips.ranking])
    return [i for i in range(num) if i not in out], ranking, [i for i in out if i not in ranking]


def fill(recipe: PairRecipe, vae: AutoencoderKLWan, team: Team) -> None:
    """Write all clips that are not there yet; processes share the work.

    Raises:
        ValueError: from `listed_videos`, `read_video` and `drawer`.
    """
    videos, clips, progress = listed_videos(recipe.clips), recipe.clips, Progress()
    num = len(videos) + clips.sampling.num_samples
    todo = [i for i in team.mine(list(range(num))) if not _file(recipe, i).exists()]
    draw_one: Callable[[int], Tensor] | None = None
    for done, number in enumerate(todo, 1):
        if number < len(videos):
            video = read_video(videos[number], clips.how())
            with torch.no_grad():
                z = normalise(vae, encode(vae, video[None].float().to(vae.device) / 255))[0]
        else:
            draw_one = draw_one or drawer(recipe, str(vae.device))
            z = draw_one(number - len(videos))
            with torch.no_grad():
                seen = decode(vae, denormalise(vae, z[None]))[0].clamp(0, 1)
            video = (255 * seen).round().byte()
        save_tensors(_file(recipe, number), {"z": z.float().cpu().contiguous(), "video": video.cpu().contiguous()})
        progress(f"clips: {done} of {len(todo)} of this process")
    team.wait()


def load_clip(recipe: PairRecipe, number: int, device: torch.device, frames: int | None = None) -> Sample:
    """One clip, as a batch of one; its first `frames` and the latents that they are of.

    Raises:
        ValueError: a file that is missing or damaged.
    """
    found, _ = load_tensors(_file(recipe, number))
    z, video = found["z"], found["video"]
    if frames is not None:
        stride = (len(video) - 1) // (z.shape[1] - 1)
        z, video = z[:, : (frames - 1) // stride + 1], video[:frames]
    return Sample(z[None].to(device), video[None].to(device).float() / 255)


def samples(recipe: PairRecipe, numbers: list[int], team: Team) -> Iterator[Sample]:
    """This process's share of some clips, one at a time."""
    return (load_clip(recipe, number, team.device) for number in team.mine(numbers))


def drawer(recipe: PairRecipe, device: str) -> Callable[[int], Float[Tensor, "C L h w"]]:
    """What draws the videos: number -> latents, by the ODE with guidance. Prompts are taken in turn, over and over.

    Raises:
        ValueError: no whole Wan in the folder, or one that needs a first frame; no prompts.
    """
    from vggrpo.policy.encoders import load_encoders
    from vggrpo.policy.wan import latent_shape, own_shift
    from vggrpo.policy.wan_folder import load_velocity, read_layout
    from vggrpo.sampler import draw, normal, time_grid

    folder, clips, how = Path(recipe.wan), recipe.clips, recipe.clips.sampling
    if read_layout(folder).way == "channels":
        raise ValueError(
            f"{folder} makes videos of a first frame, and samples to stitch on have none: set "
            "clips.sampling.num_samples=0 and give clips.videos, or the Wan of the same VAE that takes prompts alone"
        )
    prompts = list(islice(cycle(read_prompts(how.prompts)), how.num_samples))
    encode = load_encoders(folder, how.max_len, device).text
    texts = {prompt: encode([prompt]).float().to(device) for prompt in {*prompts, ""}}
    del encode  # and with it the text encoder
    network = load_velocity(folder, torch.bfloat16 if recipe.bf16 else torch.float32).eval().requires_grad_(False)
    network = network.to(device)
    shape = latent_shape(folder, clips.frames, clips.height, clips.width, read_layout(folder).patch)
    grid = time_grid(how.num_steps, own_shift(folder) if how.shift is None else how.shift)

    @torch.no_grad()
    def one(number: int) -> Tensor:
        text, negative = texts[prompts[number]], texts[""]
        noise = normal((1, *shape), [torch.Generator().manual_seed(how.first_seed + number)]).to(device)
        return draw(network, noise, text, negative, grid, how.guidance_scale)[0]

    return one


def _file(recipe: PairRecipe, number: int) -> Path:
    return Path(recipe.out) / "clips" / f"{number:05d}.safetensors"
