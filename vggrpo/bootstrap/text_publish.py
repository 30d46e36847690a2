"""A trained text stage becomes an asset: tokenizer/ and text_encoder/ of a WanPipeline, with what they tell."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vggrpo.bootstrap.assets import save_json, sha256
from vggrpo.bootstrap.captions import Captioned, draw_captions
from vggrpo.bootstrap.text import ENCODER, TOKENIZER, TextStage, build_encoder, load_text
from vggrpo.bootstrap.text_train import HELD_OUT, TextRecipe, probe
from vggrpo.bootstrap.training import Training
from vggrpo.bootstrap.vae_publish import hardware

FILES = (
    "config.json",
    "model.safetensors",
    f"../{TOKENIZER}/tokenizer.json",
    f"../{TOKENIZER}/tokenizer_config.json",
)
"""All that the stage is loaded from, seen from its card."""


def publish_text(
    stage: TextStage, training: Training, recipe: TextRecipe, path: str, captions: Sequence[Captioned]
) -> list[str]:
    """Write the stage below `recipe.asset` and measure what was written. Returns what to tell the user."""
    folder = Path(recipe.asset)
    stage.tokenizer.save_pretrained(folder / TOKENIZER)
    stage.encoder.save_pretrained(folder / ENCODER)
    card: dict[str, Any] = {
        "what": f"UMT5EncoderModel of width {recipe.width} and a Unigram tokenizer of {len(stage.tokenizer)} pieces",
        "command": f"vggrpo bootstrap text {path}",
        "recipe": asdict(recipe),
        "seeds": {"training": [0, recipe.num_captions - 1], "held out": [HELD_OUT.start, HELD_OUT.stop - 1]},
        "steps": training.step,
        "hours": round(training.seconds / 3600, 3),
        "hardware": hardware("cpu"),
        "parameters": sum(weight.numel() for weight in stage.encoder.parameters()),
        "curve": training.curve,
        "sha256": {name: sha256(folder / ENCODER / name) for name in FILES},
    }
    save_json(folder / ENCODER / "card.json", card)
    card["held_out"] = measure(load_text(folder), recipe, captions)
    save_json(folder / ENCODER / "card.json", card)
    (folder / ENCODER / "README.md").write_text(card_text(card))
    return [f"wrote {folder / TOKENIZER} and {folder / ENCODER}", *table(card["held_out"])]


def measure(stage: TextStage, recipe: TextRecipe, captions: Sequence[Captioned]) -> dict[str, dict[str, float]]:
    """What a linear probe reads from held-out captions, beside an untrained encoder and shuffled facts."""
    held_out = draw_captions(HELD_OUT)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        untrained = TextStage(stage.tokenizer, build_encoder(len(stage.tokenizer), recipe.width, recipe.layers).eval())
    return {
        "trained": probe(stage, captions, held_out),
        "untrained": probe(untrained, captions, held_out),
        "shuffled": probe(stage, captions, held_out, shuffled=True),
    }


def table(found: dict[str, dict[str, float]]) -> list[str]:
    """The probe's results in Markdown."""
    rows = [
        f"| {fact} | {hit:.1%} | {found['untrained'][fact]:.1%} | {found['shuffled'][fact]:.1%} |"
        for fact, hit in found["trained"].items()
    ]
    return ["| what is read | shipped | untrained encoder | control: shuffled facts |", "|---|---|---|---|", *rows]


def card_text(card: dict[str, Any]) -> str:
    """The asset's README."""
    recipe, curve = card["recipe"], ", ".join(f"{p['loss']:.2f} (step {p['step']})" for p in card["curve"])
    num_held_out = card["seeds"]["held out"][1] - card["seeds"]["held out"][0] + 1
    return f"""# The embedded text stage

{card["what"]}: {card["parameters"]:,} parameters, trained on captions of the procedural world only.

    from transformers import AutoTokenizer, UMT5EncoderModel
    tokenizer = AutoTokenizer.from_pretrained("assets/tiny-wan/tokenizer")
    encoder = UMT5EncoderModel.from_pretrained("assets/tiny-wan/text_encoder")

`vggrpo.bootstrap.text.load_text` does the same after comparing every file with `card.json`.
Every word of the captions is one token; other words fall apart into characters, which the encoder was not trained on.
Upper and lower case are alike. Give `max_sequence_length={recipe["max_len"]}` to a pipeline: longer prompts are cut.

## What it tells

Share of {num_held_out} held-out captions that a linear map of the **mean** token embedding gets right:

{chr(10).join(table(card["held_out"]))}

A video model attends to single tokens, where a camera verb or a pace is a word of its own; the mean is the harder
question: "left" and "clockwise" are said of cameras and of bodies, and bodies must be counted. The untrained encoder
has the same size and the same tokenizer; what the training adds to it is the difference of the first two columns.

## How it was made

    {card["command"]}

{recipe["num_captions"]} captions (seeds 0 to {recipe["num_captions"] - 1}), {card["steps"]} steps of filling in masked
words, {60 * card["hours"]:.0f} minutes, {card["hardware"]}. Loss (nats per masked word): {curve}.
It cannot go to 0, for most of a caption's words are independent of the others.

| file | sha256 |
|---|---|
""" + "".join(f"| {name.removeprefix('../')} | {digest} |\n" for name, digest in card["sha256"].items())
