"""A comparison on paper: Markdown, a page of HTML that stands alone, and strips of the videos side by side."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vggrpo.evaluate.compare import Paired, Verdict

COLUMNS = ("judge", "base", "tuned", "difference", "95 % interval", "pairs", "motion-matched", "N/A base / tuned")
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}
table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .7rem;text-align:right}
td:first-child,th:first-child{text-align:left}tr:nth-child(even){background:#f4f5f7}th{border-bottom:2px solid #888}
.better{color:#0a7a2f}.worse{color:#b3261e}.verdict{font-size:1.2rem;font-weight:600}
img{max-width:100%;image-rendering:pixelated}
figcaption{color:#555;font-size:.85rem;margin:0 0 1rem}figure{margin:1rem 0 0}"""


HIGHER, NEUTRAL = ("reward/", "sharpness"), ("parallax/", "displacement", "matches/")
"""Beginnings of the names of what is better when it is higher, and of what is neither."""


class Pair(NamedTuple):
    """A prompt with its two videos."""

    prompt: str
    base: Float[Tensor, "T 3 H W"]
    tuned: Float[Tensor, "T 3 H W"]


def rows(table: Mapping[str, Paired], matched: Mapping[str, Paired]) -> list[tuple[str, ...]]:
    """One row for each judge, as text; - for what nobody could judge."""
    found: list[tuple[str, ...]] = []
    for name, row in table.items():
        other = matched[name]
        found.append(
            (
                name,
                _number(row.base),
                _number(row.tuned),
                _signed(row.difference),
                f"[{_signed(row.low)}, {_signed(row.high)}]" if row.pairs else "-",
                str(row.pairs),
                f"{_signed(other.difference)} [{_signed(other.low)}, {_signed(other.high)}]" if other.pairs else "-",
                f"{row.base_na:.0%} / {row.tuned_na:.0%}",
            )
        )
    return found


def verdict_line(told: Verdict) -> str:
    """In one sentence."""
    kept = f"motion {told.motion:.2f} and sharpness {told.sharpness:.2f} of the base's"
    return f"PASS: {kept}" if told.passed else f"NOT PASSED: {'; '.join(told.reasons)} ({kept})"


def markdown(title: str, table: Mapping[str, Paired], matched: Mapping[str, Paired], told: Verdict) -> str:
    """The report for a README or a log."""
    lines = [f"# {title}", "", verdict_line(told), "", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows(table, matched)), "", NOTE, ""])


def page(
    title: str,
    table: Mapping[str, Paired],
    matched: Mapping[str, Paired],
    told: Verdict,
    pairs: Sequence[Pair],
) -> str:
    """The same as one HTML file, with strips of the videos in it."""
    cells = []
    for (name, row), values in zip(table.items(), rows(table, matched), strict=True):
        sure = row.pairs > 0 and (row.high < 0 or row.low > 0) and not name.startswith(NEUTRAL)
        better = (row.low > 0) if name.startswith(HIGHER) else (row.high < 0)
        kind = "" if not sure else ' class="better"' if better else ' class="worse"'
        tds = "".join(f"<td{kind if k in (3, 4) else ''}>{html.escape(value)}</td>" for k, value in enumerate(values))
        cells.append(f"<tr>{tds}</tr>")
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    figures = "".join(
        f'<figure><img alt="above base, below tuned" src="data:image/png;base64,{_png(strips(pair))}"></figure>'
        f"<figcaption>{html.escape(pair.prompt)}</figcaption>"
        for pair in pairs
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        f'<p class="verdict">{html.escape(verdict_line(told))}</p>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(cells)}</tbody></table><p>{html.escape(NOTE)}</p>"
        f"<h2>Base above, tuned below: same prompt, same noise</h2>{figures}</body></html>\n"
    )


NOTE = (
    "Differences are tuned - base on the same prompts and noise; intervals are bootstrap over prompts. Lower is better "
    "for sampson (pixels), jitter and flicker; parallax, displacement and sharpness are there so that a frozen or "
    "blurred video cannot win. Rewards are what training raised, and prove nothing by themselves. Motion-matched: only "
    "pairs whose displacement is within 0.8 and 1.25 of the base's."
)


def strips(pair: Pair, shown: int = 6, zoom: int = 2) -> Image.Image:
    """Frames from beginning to end, the base's above the tuned one's."""
    at = torch.linspace(0, len(pair.base) - 1, shown).round().long()
    picture = torch.cat([torch.cat(list(video[at]), dim=-1) for video in (pair.base, pair.tuned)], dim=-2)
    picture = picture.clamp(0, 1).repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    return Image.fromarray((255 * picture).round().byte().movedim(0, -1).contiguous().numpy())


def write_report(
    folder: Path,
    title: str,
    table: Mapping[str, Paired],
    matched: Mapping[str, Paired],
    told: Verdict,
    pairs: Sequence[Pair],
) -> None:
    """report.md and report.html."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(markdown(title, table, matched, told))
    (folder / "report.html").write_text(page(title, table, matched, told, pairs))


def _png(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _number(x: float) -> str:
    return "-" if x != x else f"{x:.3g}"


def _signed(x: float) -> str:
    return "-" if x != x else f"{x:+.3g}"
