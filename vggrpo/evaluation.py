"""`vggrpo evaluate`: a model with and without its LoRA, on the same prompts and noise, judged in pairs.

out/videos.jsonl   every video: prompt, seed, rewards, each judge's number or the reason why there is none
out/report.json    the table; also as report.md and report.html, with videos side by side
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from jaxtyping import Float
from torch import Tensor

from vggrpo.bootstrap.assets import save_json
from vggrpo.bootstrap.vae import decode, denormalise
from vggrpo.data import read_prompts
from vggrpo.evaluate.compare import compare
from vggrpo.evaluate.judges import judge
from vggrpo.evaluate.report import Pair, markdown, write_report
from vggrpo.evaluate.value import Value
from vggrpo.sample import SampleConfig, load_models, sample_videos

SHOWN = 6
"""Prompts in the report's pictures."""


@dataclass(frozen=True)
class EvaluateConfig:
    """What is compared, and how it is sampled."""

    sampling: SampleConfig
    """Of both sides; `lora` is the tuned side's. The base is the same model without it."""
    num_seeds: int = 1
    """Videos of each prompt and side."""

    def check(self) -> None:
        """Raises ValueError for what cannot be; not when built, so that the command line can say it in one line."""
        self.sampling.check()
        if self.num_seeds < 1:
            raise ValueError(f"num_seeds must be >= 1, got {self.num_seeds}")
        if self.sampling.lora is None and self.sampling.best_of == 1 and self.sampling.guidance_geometry == 0:
            raise ValueError("nothing differs from the base: give sampling.lora, best_of or guidance_geometry")


def evaluate_lora(cfg: EvaluateConfig, say: Callable[[str], None]) -> str:
    """Sample, judge, compare and write; the report comes back as Markdown.

    Raises:
        ValueError: from loading and reading.
    """
    cfg.check()
    out, prompts = Path(cfg.sampling.out), read_prompts(cfg.sampling.prompts)
    plain = replace(cfg.sampling, lora=None, best_of=1, guidance_geometry=0.0)
    sides: dict[str, list[dict[str, Value]]] = {}
    videos: dict[str, list[Float[Tensor, "T 3 H W"]]] = {}
    vae = AutoencoderKLWan.from_pretrained(Path(cfg.sampling.model) / "vae", local_files_only=True)
    vae = vae.to(cfg.sampling.device).eval()
    lines = []
    for side, how in (("base", plain), ("tuned", cfg.sampling)):
        sides[side], videos[side] = [], []
        models = load_models(how, prompts)
        for seed in range(cfg.num_seeds):
            for number, one in enumerate(sample_videos(models, prompts, replace(how, seed=how.seed + seed))):
                with torch.no_grad():
                    video = decode(vae, denormalise(vae, one.z0[None]))[0].clamp(0, 1).cpu()
                told = {f"reward/{name}": Value(r) for name, r in one.rewards.items()} | judge(video)
                sides[side].append(told)
                if seed == 0 and number < SHOWN:
                    videos[side].append(video)
                lines.append({"side": side, "prompt": number, "seed": how.seed + seed, "told": _plain(told)})
                say(f"{side}: {len(sides[side])} of {len(prompts) * cfg.num_seeds} videos")
    of = [number for _ in range(cfg.num_seeds) for number in range(len(prompts))]
    table, matched, told_all = compare(sides["base"], sides["tuned"], of)
    out.mkdir(parents=True, exist_ok=True)
    (out / "videos.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plain_table = {name: {k: _none(x) for k, x in asdict(row).items()} for name, row in table.items()}
    plain_matched = {name: {k: _none(x) for k, x in asdict(row).items()} for name, row in matched.items()}
    save_json(
        out / "report.json",
        {"config": asdict(cfg), "verdict": asdict(told_all), "table": plain_table, "motion_matched": plain_matched},
    )
    shown = [Pair(prompts[k], *pair) for k, pair in enumerate(zip(videos["base"], videos["tuned"], strict=True))]
    title = f"{len(prompts)} prompts, {cfg.num_seeds} seed(s)"
    write_report(out, title, table, matched, told_all, shown)
    return markdown(title, table, matched, told_all)


def _plain(told: dict[str, Value]) -> dict[str, float | str | None]:
    """JSON has no NaN: the reason stands in its place."""
    return {name: x.reason or None if math.isnan(x.value) else x.value for name, x in told.items()}


def _none(x: float | int) -> float | int | None:
    return None if x != x else x
