"""A latent geometry model's report in words: what `card.json` says, for people."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vggrpo.bootstrap.geometry_publish import BARS
from vggrpo.stitch.fidelity import COARSE, FIDELITY_BARS, FINE, OFF, REWARDS, UNSEEN, blind
from vggrpo.stitch.judge import RATIO_BAR, ratios
from vggrpo.stitch.noise import SHOWN

MODELS = ("teacher", "teacher on decoded latents", "random connector", "closed form", "refined", "distilled")
"""In the order of the tables; "refined" where the recipe refines."""
SOURCES = {"latent model": "latent model", "teacher": "teacher (RGB)", "barely trained": "control: barely trained"}


def table(head: Sequence[str], rows: Mapping[str, Sequence[float | str]]) -> list[str]:
    """Markdown; numbers with two or three digits, - for what was not measured."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, values in rows.items():
        cells = [value if isinstance(value, str) else "-" if value != value else f"{value:.3g}" for value in values]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def held_out_table(numbers: dict[str, dict[str, float]]) -> list[str]:
    """Every way to get a geometry against the truth, and the shipped one's errors in the teacher's."""
    there = [name for name in MODELS if name in numbers]
    rows: dict[str, Sequence[float | str]] = {name: [numbers[name][k] for k in BARS] for name in there}
    for name in there[there.index("closed form") :]:
        rows[f"{name} / teacher"] = list(ratios(numbers[name], numbers["teacher"]).values())
    return table(["all clips", *BARS], rows)


def fidelity_table(
    found: dict[str, dict[str, dict[str, float]]], rewards: Iterable[str], sources: Mapping[str, str]
) -> list[str]:
    """Rank correlations over everything, and apart; `sources` in the words of the table."""
    kinds = ("all", "fine", "coarse", "answered faults", "within a clip")
    rows: dict[str, Sequence[float | str]] = {
        f"{reward}, {words}": [found[source][reward][kind] for kind in kinds]
        for reward in rewards
        for source, words in sources.items()
    }
    return table(["reward, read from", *kinds], rows)


def verdicts(card: dict[str, Any]) -> list[str]:
    """The bars, one line each."""
    numbers = card["held_out"]["all"]
    against = ratios(numbers["distilled"], numbers["teacher"])
    rows: dict[str, Sequence[float | str]] = {
        f"{BARS[name][0]}, in the teacher's error": [x, f"<= {RATIO_BAR}", _met(x <= RATIO_BAR)]
        for name, x in against.items()
        if BARS[name][1] is not None
    }
    for reward, bar in FIDELITY_BARS.items():
        x = card["report"]["fidelity"]["spearman"]["latent model"][reward]["all"]
        rows[f"{reward}, Spearman with the truth's"] = [x, f">= {bar}", _met(x >= bar)]
    return table(["", "measured", "bar", ""], rows)


def card_text(card: dict[str, Any]) -> str:
    """The asset's README."""
    report, recipe = card["report"], card["recipe"]
    first, last = card["seeds"]["held out"]
    held_out = (last - first + 1) // card["seeds"]["held out, every"]
    held, modes, spearman = card["held_out"], report["modes"], report["fidelity"]["spearman"]
    kinds = {
        f"{kind}: {name}": [numbers[name].get(k, float("nan")) for k in BARS]
        for kind, numbers in held.items()
        for name in numbers
        if kind != "all"
    }
    distances = {
        name: [x for k, x in held["all"][name].items() if k.startswith("from")]
        for name in MODELS
        if name in held["all"] and name != "teacher"
    }
    outputs = [k.removeprefix("from teacher: ") for k in held["all"]["distilled"] if k.startswith("from")]
    ranking = {
        f"{r['mode']}, {'x'.join(map(str, r['kernel']))}, `{r['point']}`": [
            r["r2"],
            r["total"],
            *r["distances"].values(),
        ]
        for r in report["ranking"]
    }
    noise = {
        f"{row['level']:g}, {way}": [row[k] for k in SHOWN] + [row["moved: rotation"], row["moved: log_depth"]]
        for way, rows in report["noise"].items()
        for row in rows
    }
    faults = [k for k in spearman["latent model"]["motion_smoothness"] if k.startswith("fault")]
    by_fault = {
        f"{name.removeprefix('fault: ')}, {words}": [spearman[source][reward][name] for reward in REWARDS]
        for name in faults
        for source, words in SOURCES.items()
    }
    unseen = [
        f"- `{reward}`: {', '.join(names) if names else 'none'}"
        for reward, names in blind(spearman["latent model"]).items()
    ]
    costs = {name: list(x.values()) for name, x in modes["cost"].items()}
    curve = {str(p["step"]): [p["seconds"] / 60, p["total"], p["rotation"], p["log_depth"]] for p in card["curve"]}
    refined = {str(p["step"]): [p["seconds"] / 60, p["r2"], p["change r2"]] for p in card["refined"]["curve"]}
    net, took = recipe["refine"], card["refined"]["hours"]
    connector = "one Conv3d"
    if refined:
        connector += f" and, for what it misses, {net['blocks']} residual blocks of {net['width']} channels"
        connector += f" and {net['finish']} of {net['finish_width']} on the tokens" if net["finish"] else ""
    lines = [
        "# tiny-lgm",
        "",
        f"The latent geometry model of the embedded stack: {card['what']}.",
        f"A connector ({connector}) takes the latents to the tokens of `{card['point']}` of",
        f"`{recipe['geometry']}`, whose tail, with LoRA, does the rest; {card['parameters']:,} trained numbers.",
        f'Time mode "{card["mode"]}": a token map for each of the 17 video frames.',
        "",
        "    from vggrpo.stitch.load import load_lgm",
        '    model = load_lgm("assets/tiny-lgm", "assets/tiny-geometry", "assets/tiny-wan/vae")',
        "    scene = model(z0)        # normalised latents, as samplers hold them -> geometry.Geometry",
        "",
        f"Made by `{card['command']}`: {net['steps']} steps, {60 * took:.0f} minutes of refining,",
        f"{card['steps']} steps, {60 * card['hours']:.0f} minutes of distillation,",
        f"{card['hardware']}, on {recipe['num_clips']} clips of the world (seeds from {recipe['first_clip']}) and",
        f"{recipe['sampling']['num_samples']} videos of the generator.",
        "",
        "## Bars",
        "",
        *verdicts(card),
        "",
        "![Ranking of the closed forms, distillation, errors](made.png)",
        "",
        f"## Against the truth: {held_out} steady clips, {held_out // 10} of each camera motion, intrinsics given",
        "",
        *held_out_table(held["all"]),
        "",
        "Rotation in degrees; `vggrpo.bootstrap.geometry_eval.measure` says what is measured. For speed and dynamic",
        "mask the ratio is of 1 - value. `random connector` has the closed form's numbers in another order. Half",
        "of the cameras do not turn: medians of rotation flatter whoever answers that none does, as it nearly does;",
        "`turning` counts only frames whose camera turns.",
        "",
        *table(["clips", *BARS], kinds),
        "",
        "Rows from `focal length unknown` on are of every second of them, as are the time modes' below. Controls must",
        "fail.",
        "",
        "## Distance from the teacher, output by output (`geometry/distance.py`)",
        "",
        *table(["", *outputs], distances),
        "",
        "## Which layer, which connector (closed form, held-out clips)",
        "",
        *table(["time mode, kernel, stitch point", "R^2", "total", *report["ranking"][0]["distances"]], ranking),
        "",
        "## One map per video frame, or one per latent frame",
        "",
        "Errors at the frames of the latter (0, 4, 8, ...), every second clip; `teacher, every fourth frame` sees only",
        "those. Milliseconds a clip, one at a time.",
        "",
        *table(["", *BARS], {name: [x[k] for k in BARS] for name, x in modes["errors"].items()}),
        "",
        *table(["", "tokens", "forward, ms", "with gradient to the latents, ms"], costs),
        "",
        "## Perturbed latents",
        "",
        "![Errors and movement against the size of the noise](noise.png)",
        "",
        f"Noise of so much of the latents' norm, {recipe['noise_clips']} clips; `latent`: this model, `decoded`: the",
        "teacher on the decoded video. The last two columns: how far the output moved from its own without noise.",
        "",
        *table(["noise, way", *SHOWN, "rotation moved, radians", "log depth moved"], noise),
        "",
        "## Rewards on its geometry",
        "",
        "![Rewards on estimated geometry against the truth's](fidelity.png)",
        "",
        f"{recipe['fidelity_clips']} clips, spoilt in {len(faults)} ways, at magnitudes {COARSE} of the catalogue's",
        f"five (coarse) and {FINE} times the smallest (fine), then encoded; no intrinsics are given. Rank correlation",
        f"with the reward of the true geometry. Left out, because no pixel shows it: {', '.join(UNSEEN)}. The control",
        "is a geometry model after 25 steps of training, stitched in the same way.",
        "",
        *fidelity_table(spearman, REWARDS, SOURCES),
        "",
        "What such a correlation can be: the true cameras and the true depth, but for one smooth error a frame. Under",
        "faults marked - below the true rewards of a clip differ by less than .001, and are ranked all the same.",
        "",
        *fidelity_table(spearman, ["reprojection_consistency"], {name: f"true, {name}" for name in OFF}),
        "",
        "By fault, within a clip (- where the true reward does not change):",
        "",
        *table(["fault, read from", *REWARDS], by_fault),
        "",
        "Faults that the true reward answers to and this model's does not (below 0.5):",
        "",
        *unseen,
        "",
        "## Curve (clips that layers are ranked on, the running average of the weights)",
        "",
        *table(["step", "minutes", "total distance", "rotation", "log depth"], curve),
        "",
        *(["The refiner's, on the same clips; the change is that from frame to frame.", ""] if refined else []),
        *(table(["step", "minutes", "R^2 of tokens", "R^2 of their change"], refined) if refined else []),
        "",
        *table(["file", "sha256"], {name: [digest] for name, digest in card["sha256"].items()}),
        "",
    ]
    return "\n".join(lines)


def _met(yes: bool) -> str:
    return "met" if yes else "missed"
