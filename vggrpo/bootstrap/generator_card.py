"""The generator's card in words: what `card.json` says, for people."""

from typing import Any

from geometry.world.trajectory import SWAY_FRAMES
from vggrpo.bootstrap.captions import HELD_OUT

VERBS, SHARPNESS = 0.7, 0.2
"""Bars: share of captions whose camera is recovered; how far sharpness may be from the VAE's."""


def result_lines(found: dict[str, Any]) -> list[str]:
    """The held-out numbers as a Markdown table."""
    controls, ceiling = found["controls"], found["ceiling"]
    off = abs(found["sharpness"] - 1)
    rows = {
        "camera does what the caption says (motion and side)": (
            f"**{found['verb']:.0%}**, bar {VERBS:.0%}: {'met' if found['verb'] >= VERBS else 'missed'}"
        ),
        "the motion alone": f"{found['motion']:.0%}",
        "ceiling: rendered clips of the same captions through the VAE": f"{ceiling['verb']:.0%}",
        "rendered clips as they are": f"{found['rendered']['verb']:.0%}",
        "control: against other captions": f"{controls['other captions']:.0%}",
        "control: unconditional samples": f"{controls['unconditional']:.0%}",
        "sharpness, in units of the ceiling's": (
            f"**{found['sharpness']:.2f}**, bar within {SHARPNESS:.0%}: {'met' if off <= SHARPNESS else 'missed'}"
        ),
        "control: the ceiling blurred by 3 x 3": f"{controls['blurred']:.2f}",
    }
    head = [f"| {found['clips']} held-out captions, seeds from {found['first_seed']} | |", "|---|---|"]
    return head + [f"| {name} | {value} |" for name, value in rows.items()]


def card_text(card: dict[str, Any], captions: list[str]) -> str:
    """The asset's README. `captions` are those of the contact sheet."""
    recipe, found = card["recipe"], card["held_out"]
    training, num_steps, guidance = recipe["training"], recipe["sampling"]["num_steps"], recipe["sampling"]["guidance"]
    first, last = card["seeds"]["training"]
    plans = [f"{planned} steps from step {start} on" for start, planned in card["plans"]]
    replanned = f"The plan changed on the way: {', then '.join(plans)}.\n" if len(plans) > 1 else ""
    curve = "\n".join(
        f"| {p['step']} | {p['loss']:.4f} | {p['other_captions']:.4f} | {', '.join(f'{x:.3f}' for x in p['by_time'])} |"
        for p in _thinned(card["curve"])
    )
    late = card["curve"][-3:]
    ending, fell = late[-1]["step"] - late[0]["step"], late[0]["loss"] - late[-1]["loss"]
    motions = "\n".join(
        f"| {name} | {share:.0%} | {found['ceiling']['by_motion'][name]:.0%} | "
        f"{', '.join(f'{other} {count}' for other, count in found['read_as'][name].items())} |"
        for name, share in found["by_motion"].items()
    )
    begun = "that transformer" if card["went_on_from"] else "a transformer of its own"
    listed = "\n".join(f"{number}. {caption}" for number, caption in enumerate(captions, 1))
    return f"""# The embedded generator

A whole diffusers `WanPipeline`, its transformer of {card["parameters"] / 1e6:.1f} million parameters trained on the
procedural world only: from a caption to 17 frames of 64 x 64.

    from diffusers import WanPipeline
    pipe = WanPipeline.from_pretrained("assets/tiny-wan")
    pipe("The camera pans left ...", height=64, width=64, num_frames=17, max_sequence_length={training["max_len"]},
         num_inference_steps={num_steps}, guidance_scale={guidance:g})

`vggrpo.bootstrap.generator.load_generator` does the same after comparing every file with `card.json`.
Prompts are those of the world's grammar. Do give `max_sequence_length`: as in every Wan, padding is attended to.
Other 4n + 1 lengths and other sizes (multiples of 16) work, and were not trained for.

**It is deliberately ordinary**: it was trained on footage as web video is, half of it with moving bodies and half of it
{_held(training["data"]["sway"])} that no caption mentions. So half of what it samples should
move like that too: that is what reinforcement learning is to take out of it.
{_known(training["data"]["scenes"])}
## What it does

Sharpness does not ask whether what is sharp makes sense: look at the picture, too.

{chr(10).join(result_lines(found))}

Sampled with {num_steps} steps and guidance {guidance:g}. The camera is read by the referee
([tiny-referee](../tiny-referee/README.md)), which no reward uses. By motion:

| told | done | ceiling | read as (`-`: the other side) |
|---|---|---|---|
{motions}

![Samples of held-out captions](samples.png)

*Frames 0, 4, 8, 12 and 16 of samples of the first {len(captions)} held-out captions, row by row:*

{listed}

## How it was made

{_begun(card["went_on_from"])}    {card["command"]}

which is `vggrpo sft` on {begun}: {training["data"]["num_clips"]} clips (seeds {first} to {last}),
{card["steps"]} steps of {training["batch"]} clips, {card["hours"]:.2f} hours on the clock, {card["hardware"]}.
{replanned}The header of the recipe says what was particular about the shipped run.

The running average of the weights is shipped, in fp16. In the last {ending} steps the loss below fell by {fell:.4f}.
Flow loss on {training["held_out"]["num_clips"]} held-out clips, with their own captions and with each other's:

| step | loss | with other captions | by fifths of t, data to noise |
|---|---|---|---|
{curve}

| file | sha256 |
|---|---|
""" + "".join(f"| {name} | {digest} |\n" for name, digest in card["sha256"].items())


def _held(sway: float) -> str:
    if not sway:
        return "with hand-held shake"
    shortest, longest = SWAY_FRAMES
    return f"with the sway of a camera carried by hand ({sway:g} degrees, periods of {shortest} to {longest} frames)"


def _begun(earlier: dict[str, Any] | None) -> str:
    if earlier is None:
        return ""
    first, last = earlier["seeds"]["training"]
    return f"""    {earlier["command"]}

from nothing: {earlier["clips"]} clips (seeds {first} to {last}, half of them shaken from frame to frame),
{earlier["steps"]} steps, {earlier["hours"]:.2f} hours, {earlier["hardware"]}. Then

"""


def _known(scenes: int | None) -> str:
    if scenes is None:
        return ""
    return f"""
**It knows {2 * scenes} scenes**, {scenes} with and {scenes} without moving bodies, each from many camera paths: a model
of this size does not learn to invent new ones in hours of a CPU. One in {HELD_OUT} of the camera's commands (motion,
side and pace) of every scene was kept out of training, other ones in other scenes; held-out captions are of those.
Prompts that it can follow are in [prompts](../prompts/train.txt).
"""


def _thinned(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every so many points, a dozen or so, and the last."""
    every = -(-len(curve) // 12)
    return [point for number, point in enumerate(curve, 1) if number % every == 0 or number == len(curve)]
