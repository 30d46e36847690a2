"""Comparisons on paper: Markdown, a page of HTML that stands alone, and strips of the videos side by side."""

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

from vggrpo.evaluate.compare import MOTION, Comparison, Paired, Verdict

COLUMNS = (
    "judge", "base", "tuned", "difference", "95 % interval", "sign test", "pairs", "motion-matched", "N/A base / tuned",
)  # fmt: skip
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}
table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .7rem;text-align:right}
td:first-child,th:first-child{text-align:left}tr:nth-child(even){background:#f4f5f7}th{border-bottom:2px solid #888}
.better{color:#0a7a2f}.worse{color:#b3261e}.verdict{font-size:1.1rem;font-weight:600}
img{max-width:100%;image-rendering:pixelated}img.plot{image-rendering:auto}
figcaption{color:#555;font-size:.85rem;margin:0 0 1rem}figure{margin:1rem 0 0}"""

HIGHER = ("reward/", "sharpness", "survival", "inliers/", "sfm/registered", "sfm/track_length", "verb", "side")
"""Beginnings of the names of what is better when it is higher."""
NEUTRAL = ("parallax/", "displacement", "travel", "matches/", "coverage/")
"""Of what is neither."""
HEADLINE = "sampson/stride_4"
"""The judge of the picture: against motion, video by video."""


class Shown(NamedTuple):
    """A prompt with the videos of the base and of every candidate."""

    prompt: str
    videos: dict[str, Float[Tensor, "T 3 H W"]]


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
                f"{row.sign_p:.2g}" if row.pairs else "-",
                str(row.pairs),
                f"{_signed(other.difference)} [{_signed(other.low)}, {_signed(other.high)}]" if other.pairs else "-",
                f"{row.base_na:.0%} / {row.tuned_na:.0%}",
            )
        )
    return found


def overview(found: Mapping[str, Comparison]) -> list[tuple[str, ...]]:
    """One row for each judge, one column for each candidate: its difference from the base and the interval."""
    first = next(iter(found.values()))
    lines: list[tuple[str, ...]] = []
    for name, row in first.table.items():
        cells = []
        for comparison in found.values():
            one = comparison.table[name]
            text = f"{_signed(one.difference)} [{_signed(one.low)}, {_signed(one.high)}]" if one.pairs else "-"
            more = f" ({one.tuned_na:.0%} N/A)" if one.tuned_na else ""
            cells.append(f"{text}{_mark(name, one)}{more}")
        lines.append((name, _number(row.base) + (f" ({row.base_na:.0%} N/A)" if row.base_na else ""), *cells))
    return lines


def verdict_line(told: Verdict) -> str:
    """In one sentence."""
    kept = f"motion {told.motion:.2f} and sharpness {told.sharpness:.2f} of the base's"
    for kind, names in (("sounder", told.sounder), ("steadier", told.steadier)):
        kept += f"; {kind}: {', '.join(names)}" if names else ""
    kept += f"; not counted, for it was trained on much the same: {', '.join(told.taught)}" if told.taught else ""
    return f"PASS: {kept}" if told.passed else f"NOT PASSED: {'; '.join(told.reasons)} ({kept})"


def markdown(title: str, found: Mapping[str, Comparison]) -> str:
    """The report for a README or a log: verdicts, all candidates in one table, then each by itself."""
    lines = [f"# {title}", "", *(f"- **{name}**: {verdict_line(one.verdict)}" for name, one in found.items()), ""]
    lines += _table(("judge", "base", *found), overview(found))
    for name, one in found.items():
        lines += ["", f"## {name} against the base", "", *_table(COLUMNS, rows(one.table, one.matched))]
    return "\n".join([*lines, "", NOTE, ""])


def page(title: str, found: Mapping[str, Comparison], shown: Sequence[Shown], plot: bytes | None = None) -> str:
    """The same as one HTML file, with strips of the videos in it; `plot` is a PNG."""
    verdicts = "".join(
        f'<p class="verdict">{html.escape(name)}: {html.escape(verdict_line(one.verdict))}</p>'
        for name, one in found.items()
    )
    everything = []
    for cells in overview(found):
        kinds = ["", "", *(_kind(cells[0], one.table[cells[0]]) for one in found.values())]
        everything.append(_row(cells, kinds))
    parts = [_html_table(("judge", "base", *found), everything)]
    if plot is not None:
        parts.append(f'<figure><img class="plot" alt="consistency against motion" src="{_inline(plot)}"></figure>')
    for name, one in found.items():
        lines = []
        for (judge, row), cells in zip(one.table.items(), rows(one.table, one.matched), strict=True):
            kind = _kind(judge, row)
            lines.append(_row(cells, [kind if k in (3, 4) else "" for k in range(len(cells))]))
        parts.append(f"<h2>{html.escape(name)} against the base</h2>{_html_table(COLUMNS, lines)}")
    figures = "".join(
        f'<figure><img alt="{html.escape(", ".join(one.videos))}" src="{_inline(_png(strips(one)))}"></figure>'
        f"<figcaption>{html.escape(one.prompt)}</figcaption>"
        for one in shown
    )
    order = html.escape(", ".join(shown[0].videos)) if shown else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>{verdicts}{''.join(parts)}"
        f"<p>{html.escape(NOTE)}</p><h2>From above: {order}. Same prompt, same noise</h2>{figures}</body></html>\n"
    )


NOTE = (
    "Differences are tuned - base on the same prompts and noise; intervals are 95 % bootstrap over prompts, and "
    "(better) or (worse) stands only where 0 is outside. Lower is better for sampson (pixels), jitter, path_jerk, "
    "reprojection, focal_deviation and flicker; higher for inliers, survival, sharpness, registered, track_length, "
    "verb and side. Parallax, displacement, travel, coverage and sharpness are there so that a frozen or blurred video "
    "cannot win. Rewards are what training raised, and prove nothing by themselves. Motion-matched: only pairs whose "
    "travel (motion over half of a video) is within 0.8 and 1.25 of the base's."
)


def strips(one: Shown, shown: int = 6, zoom: int = 2) -> Image.Image:
    """Frames from beginning to end, the base's above the candidates'."""
    videos = list(one.videos.values())
    at = torch.linspace(0, len(videos[0]) - 1, shown).round().long()
    picture = torch.cat([torch.cat(list(video[at]), dim=-1) for video in videos], dim=-2)
    picture = picture.clamp(0, 1).repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    return Image.fromarray((255 * picture).round().byte().movedim(0, -1).contiguous().numpy())


def scatter(told: Mapping[str, Sequence[tuple[float, float]]], judge: str) -> bytes:
    """A PNG of (motion, judge) of every video, one colour a model, with its means: what was bought with stillness?"""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for number, (name, points) in enumerate(told.items()):
        kept = [point for point in points if point == point and point[0] == point[0] and point[1] == point[1]]
        x, y = ([point[k] for point in kept] for k in (0, 1))
        color = f"C{number}"
        axes.scatter(x, y, s=14, alpha=0.45, color=color, linewidths=0)
        if kept:
            mean = [sum(x) / len(x)], [sum(y) / len(y)]
            axes.scatter(*mean, s=90, marker="P", color=color, edgecolor="white", label=name)
    axes.set(xlabel=f"{MOTION}, pixels a frame", ylabel=f"{judge}, pixels (lower is sounder)", xscale="log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:.1g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return buffer.getvalue()


def write_report(
    folder: Path, title: str, found: Mapping[str, Comparison], shown: Sequence[Shown], plot: bytes | None = None
) -> None:
    """report.md and report.html."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(markdown(title, found))
    (folder / "report.html").write_text(page(title, found, shown, plot))


def _kind(name: str, row: Paired) -> str:
    """A CSS class: better or worse, if that is sure."""
    if row.pairs == 0 or name.startswith(NEUTRAL) or not (row.high < 0 or row.low > 0):
        return ""
    return "better" if (row.low > 0) == name.startswith(HIGHER) else "worse"


def _mark(name: str, row: Paired) -> str:
    return f" ({kind})" if (kind := _kind(name, row)) else ""


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(line) + " |" for line in lines),
    ]


def _html_table(head: Sequence[str], lines: Sequence[str]) -> str:
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _row(cells: Sequence[str], kinds: Sequence[str]) -> str:
    marks = [f' class="{kind}"' if kind else "" for kind in kinds]
    return "<tr>" + "".join(f"<td{m}>{html.escape(cell)}</td>" for m, cell in zip(marks, cells, strict=True)) + "</tr>"


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _inline(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _number(x: float) -> str:
    return "-" if x != x else f"{x:.3g}"


def _signed(x: float) -> str:
    return "-" if x != x else f"{x:+.3g}"
