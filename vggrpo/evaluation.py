"""`vggrpo evaluate`: a model and what was made of it, on the same prompts and noise, judged in pairs.

out/videos.jsonl   every video: prompt, seed, rewards, each judge's number or the reason why there is none
out/report.json    the tables; also as report.md and report.html, with videos side by side
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro
import yaml
from diffusers import AutoencoderKLWan
from jaxtyping import Float
from torch import Tensor

from vggrpo.animate import check_animation, save_animation
from vggrpo.average import AVERAGE
from vggrpo.bootstrap.assets import save_json
from vggrpo.bootstrap.vae import decode, denormalise
from vggrpo.data import read_prompts
from vggrpo.evaluate.compare import MOTION, Comparison, compare
from vggrpo.evaluate.panel import Panel, When, ask, load_panel
from vggrpo.evaluate.report import HEADLINE, Shown, markdown, scatter, write_report
from vggrpo.evaluate.value import Value
from vggrpo.policy.wan import latent_shape
from vggrpo.policy.wan_folder import read_layout
from vggrpo.sample import Models, load_models, sample_videos
from vggrpo.sample_config import Drawing, SampleConfig

SHOWN = 6
"""Prompts in the report's pictures."""
BASE = "base"
TAUGHT = {"epipolar": "sampson/"}
"""Rewards, and the judges whose kind they are: both are Sampson distances of pixels, though neither the matches nor the
cameras are the same."""
Repeated = tyro.conf.UseAppendAction


@dataclass(frozen=True, kw_only=True)
class Judging(Drawing):
    """How videos are drawn, and who judges them."""

    out: str
    """Folder of the report."""
    prompts: str = "assets/prompts/held_out.txt"
    """Text file, one prompt on each line."""
    num_prompts: int | None = None
    """The first so many of them; all by default."""
    num_seeds: int = 1
    """Videos of each prompt and model."""
    referee: str | None = "assets/tiny-referee"
    """Folder of the second geometry model, which knows the embedded world; None for any other."""
    fov: float | None = 62.0
    """Field of view, degrees across the image, that structure from motion should find; the middle of the world's."""
    sfm: When = "large"
    """Structure from motion: on frames of 256 pixels and more, on smaller ones, too, or never; seconds a video."""

    def check(self) -> None:
        """Raises ValueError, as `Drawing.check`."""
        super().check()
        if self.num_seeds < 1 or (self.num_prompts is not None and self.num_prompts < 1):
            raise ValueError(f"num_seeds and num_prompts must be >= 1, got {self.num_seeds} and {self.num_prompts}")

    def chosen_prompts(self) -> list[str]:
        """Raises ValueError, as `read_prompts`."""
        return read_prompts(self.prompts)[: self.num_prompts]

    def how(self, model: str, **more: Any) -> SampleConfig:
        """The same drawing of a model."""
        drawing = {field.name: getattr(self, field.name) for field in fields(Drawing)}
        return SampleConfig(prompts=self.prompts, out=self.out, model=model, **drawing, **more)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Judging):
    """What is compared with the base: LoRAs, and ways to spend compute in place of training."""

    base: str = "assets/tiny-wan"
    """Wan folder in diffusers layout."""
    lora: Annotated[tuple[str, ...], Repeated] = ()
    """name=folder of a LoRA, or its folder alone; may be repeated."""
    best_of: Annotated[tuple[int, ...], Repeated] = ()
    """Of n samples of the base the one whose rewards are best; may be repeated."""
    guidance_geometry: Annotated[tuple[float, ...], Repeated] = ()
    """The base guided by its rewards' gradient at this scale; may be repeated."""
    animate: str | None = None
    """Also base and candidates side by side, moving: a .gif, .webp or .png."""

    def check(self) -> None:
        """Raises ValueError, as `Drawing.check`."""
        super().check()
        check_animation(self.animate)
        candidates(self)


class Candidate(NamedTuple):
    """What the base is compared with."""

    name: str
    how: SampleConfig


def candidates(cfg: EvaluateConfig) -> list[Candidate]:
    """LoRAs first, then the ways without training.

    Raises:
        ValueError: none, two of one name, or a number that cannot be.
    """
    found = []
    for given in cfg.lora:
        name, equals, folder = given.partition("=")
        folder = folder if equals else given
        found.append(Candidate(name if equals else Path(folder).name, cfg.how(cfg.base, lora=folder)))
    found += [Candidate(f"best of {n}", cfg.how(cfg.base, best_of=n)) for n in cfg.best_of]
    found += [
        Candidate(f"guidance {scale:g}", cfg.how(cfg.base, guidance_geometry=scale)) for scale in cfg.guidance_geometry
    ]
    names = [one.name for one in found]
    if not found:
        raise ValueError("nothing differs from the base: give lora, best_of or guidance_geometry")
    if BASE in names or len(set(names)) < len(names) or "" in names:
        raise ValueError(f"candidates need names of their own, other than {BASE!r}: --lora name=folder; got {names}")
    for one in found:
        one.how.check()
        if one.how.best_of == 1 and one.how.lora is None and one.how.guidance_geometry == 0:
            raise ValueError(f"{one.name} is the base itself: give best_of > 1, or guidance_geometry > 0")
    return found


def taught_judges(lora: str | None) -> tuple[str, ...]:
    """Beginnings of the names of judges who measure what a LoRA was trained on, by the recipe in its run's folder."""
    if lora is None:
        return ()
    folder = Path(lora)
    path = (folder.parent if folder.name == AVERAGE else folder) / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text()) if path.is_file() else {}
    weights = (recipe.get("grpo") or {}).get("weights") or {}
    return tuple(judge for name, judge in TAUGHT.items() if name in weights)


class Judged(NamedTuple):
    """One video and what was said of it."""

    prompt: int
    seed: int
    video: Float[Tensor, "T 3 H W"]
    told: dict[str, Value]


def judged_videos(
    models: Models,
    vae: AutoencoderKLWan,
    prompts: Sequence[str],
    how: SampleConfig,
    num_seeds: int,
    panel: Panel,
) -> Iterator[Judged]:
    """Videos of every prompt and seed, with their rewards among the verdicts; seed by seed."""
    for seed in range(how.seed, how.seed + num_seeds):
        for number, one in enumerate(sample_videos(models, list(prompts), replace(how, seed=seed))):
            with torch.no_grad():
                video = decode(vae, denormalise(vae, one.z0[None]))[0].clamp(0, 1).cpu()
            told = {f"reward/{name}": _value(r) for name, r in one.rewards.items()}
            yield Judged(number, seed, video, told | ask(panel, video, one.prompt))


def load_decoder(model: str, device: str) -> AutoencoderKLWan:
    """The VAE of a Wan folder, for the pictures alone."""
    vae = AutoencoderKLWan.from_pretrained(Path(model) / "vae", local_files_only=True)
    return vae.to(device).eval()


def evaluate_models(cfg: EvaluateConfig, say: Callable[[str], None]) -> str:
    """Sample, judge, compare and write; the report comes back as Markdown.

    Raises:
        ValueError: from loading and reading.
    """
    cfg.check()
    out, prompts = Path(cfg.out), cfg.chosen_prompts()
    base = Path(cfg.base)  # what cannot be is told before anything is written
    latent_shape(base, cfg.frames, cfg.height, cfg.width, read_layout(base).patch)
    panel = load_panel(cfg.referee, cfg.fov, sfm=cfg.sfm)
    sides = [Candidate(BASE, cfg.how(cfg.base)), *candidates(cfg)]
    vae = load_decoder(cfg.base, cfg.device)
    told: dict[str, list[dict[str, Value]]] = {}
    shown = [Shown(prompt, {}) for prompt in prompts[:SHOWN]]
    of: list[int] = []
    out.mkdir(parents=True, exist_ok=True)
    with (out / "videos.jsonl").open("w") as file:
        for name, how in sides:
            told[name], of, models = [], [], load_models(how, prompts)
            for one in judged_videos(models, vae, prompts, how, cfg.num_seeds, panel):
                told[name].append(one.told)
                of.append(one.prompt)
                if one.seed == how.seed and one.prompt < SHOWN:
                    shown[one.prompt].videos[name] = one.video
                line = {"model": name, "prompt": one.prompt, "seed": one.seed, "told": plain(one.told)}
                file.write(json.dumps(line) + "\n")
                say(f"{name}: {len(told[name])} of {len(prompts) * cfg.num_seeds} videos")
    found = {name: compare(told[BASE], told[name], of, taught_judges(how.lora)) for name, how in sides[1:]}
    save_json(out / "report.json", {"config": asdict(cfg), "candidates": {k: as_json(v) for k, v in found.items()}})
    title = f"{len(prompts)} prompts, {cfg.num_seeds} seed(s)"
    judge = HEADLINE if HEADLINE in told[BASE][0] else next(k for k in told[BASE][0] if k.startswith("sampson/"))
    plot = scatter({k: [(v[MOTION].value, v[judge].value) for v in each] for k, each in told.items()}, judge)
    write_report(out, title, found, shown, plot)
    if cfg.animate is not None:
        save_animation(cfg.animate, [one.videos for one in shown])
    return markdown(title, found)


def plain(told: dict[str, Value]) -> dict[str, float | str | None]:
    """JSON has no NaN: the reason stands in its place."""
    return {name: x.reason or None if math.isnan(x.value) else x.value for name, x in told.items()}


def as_json(found: Comparison) -> dict[str, Any]:
    """A comparison without NaN."""

    def none(x: Any) -> Any:
        return None if isinstance(x, float) and math.isnan(x) else x

    def rows(table: dict[str, Any]) -> dict[str, Any]:
        return {name: {k: none(x) for k, x in asdict(row).items()} for name, row in table.items()}

    verdict = {k: none(x) for k, x in asdict(found.verdict).items()}
    return {"verdict": verdict, "table": rows(found.table), "motion_matched": rows(found.matched)}


def _value(reward: float) -> Value:
    return Value(reward, "the reward cannot score it" if math.isnan(reward) else "")
