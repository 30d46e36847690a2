"""A VAE's card in words: what `card.json` says, for people."""

from typing import Any

BAR = 27.0
"""Decibels asked of a VAE that was trained on a CPU."""


def result_lines(found: dict[str, Any]) -> list[str]:
    """The held-out numbers as a Markdown table."""
    rows = {
        "**all**": f"**{found['psnr']:.2f}** (clips from {found['lowest_clip']:.1f} to {found['highest_clip']:.1f})",
        "nothing moves / bodies move": f"{found['static']:.2f} / {found['dynamic']:.2f}",
        "steady / hand-held camera": f"{found['steady']:.2f} / {found['hand_held']:.2f}",
        **{f"camera: {name}": f"{value:.2f}" for name, value in found["family"].items()},
        "with the training's latent noise": f"{found['noisy_latents']:.2f}",
        "all but the first frame": f"{found['after_first_frame']:.2f}",
        "control, same frames: 16 principal components of 4 x 8 x 8 blocks": (
            f"{found['controls']['linear_after_first_frame']:.2f}"
        ),
        "control: another clip's latents": f"{found['controls']['shuffled_latents']:.2f}",
        "control: the mean colour": f"{found['controls']['constant']:.2f}",
    }
    head = [f"| {found['clips']} fresh clips, seeds from {found['first_seed']} | PSNR, dB |", "|---|---|"]
    return head + [f"| {name} | {value} |" for name, value in rows.items()]


def card_text(card: dict[str, Any]) -> str:
    """The asset's README."""
    recipe, found = card["recipe"], card["held_out"]
    verdict = "clears" if found["psnr"] >= BAR else "misses"
    millions, num_clips = card["parameters"] / 1e6, recipe["num_clips"]
    late = card["curve"][-3:]
    last_steps, last_gain = late[-1]["step"] - late[0]["step"], late[-1]["psnr"] - late[0]["psnr"]
    plans = [f"{num_steps} steps from step {first} on" for first, num_steps in card["plans"]]
    replanned = f"The plan changed on the way: {', then '.join(plans)}.\n" if len(plans) > 1 else ""
    curve = "\n".join(f"| {p['step']} | {p['seconds'] / 60:.1f} | {p['psnr']:.2f} |" for p in card["curve"])
    return f"""# The embedded video VAE

A diffusers `AutoencoderKLWan` with {millions:.1f} million parameters, trained on the procedural world only:
{card["what"]}.
Made for 17 frames of 64 x 64. Other 4n + 1 lengths and other sizes (multiples of 8) work, and were not trained for.

    from diffusers import AutoencoderKLWan
    vae = AutoencoderKLWan.from_pretrained("assets/tiny-wan/vae")

`vggrpo.bootstrap.vae.load_vae` does the same after comparing every file with `card.json`.

## What it keeps

It {verdict} the bar of {BAR:.0f} dB. PSNR of each whole clip, of the posterior's mode, averaged over clips:

{chr(10).join(result_lines(found))}

![Held-out clips and their reconstructions](reconstructions.png)

*Frames 0 and 10 of one held-out clip of each camera family; above as rendered, below encoded and decoded.*

What it loses: the edges of small bodies and of fine stripes and checks, most where everything moves at once; a latent
describes 768 numbers with 16. In the last {last_steps} steps of training the curve below rose by {last_gain:.2f} dB.

## How it was made

    {card["command"]}

{num_clips} clips (seeds 0 to {num_clips - 1}: half with moving bodies, half hand-held), {card["steps"]} steps,
{card["hours"]:.2f} hours on the clock, {card["hardware"]}.
{replanned}It starts at the linear code that `vggrpo/bootstrap/vae_init.py` computes in closed form.
The running average of the weights is shipped, in fp16. The curve, on 16 clips of yet other seeds:

| step | minutes | PSNR, dB |
|---|---|---|
{curve}

The posterior's variance was not trained: its standard deviation is {recipe["latent_noise"]:g} everywhere,
which is the noise that the decoder was trained with.
`latents_mean` and `latents_std` were measured on 256 training clips.

| file | sha256 |
|---|---|
""" + "".join(f"| {name} | {digest} |\n" for name, digest in card["sha256"].items())
