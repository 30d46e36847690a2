"""What the card of a pair's latent geometry model says, for people."""

from typing import Any

from vggrpo.stitch.card import table


def card_text(card: dict[str, Any]) -> str:
    """The asset's README."""
    recipe, held, clips = card["recipe"], card["held_out"], card["clips"]
    outputs, connector = list(held["closed form"]), "one Conv3d" + ("" if card["refined"] is None else ", refined")
    order = ("random connector", "closed form", "refined", "distilled", "teacher on decoded latents")
    ranking = {f"`{one['point']}`": [one["r2"], one["total"], *one["distances"].values()] for one in card["ranking"]}
    curve = {str(point["step"]): [point["seconds"] / 60, point["total"]] for point in card["curve"]}
    lines = [
        f"# {recipe['geometry']} in the latents of {recipe['wan']}",
        "",
        f"{card['what']}. A connector ({connector}) takes the latents to the tokens of `{card['point']}`, whose tail,",
        f'with LoRA, does the rest; {card["parameters"]:,} trained numbers, time mode "{card["mode"]}".',
        "The weights of the geometry model are not in here, and their licence goes with this model.",
        "",
        f"Made by `{card['command']}`: {clips['fitted']} clips to fit on, {clips['ranking']} to rank on;",
        f"{card['steps']} steps, {60 * card['hours']:.0f} minutes of distillation, {card['hardware']}.",
        "",
        f"## Distance from the teacher on {clips['held out']} clips that nothing else saw (`geometry/distance.py`)",
        "",
        *table(["", *outputs], {name: [held[name][k] for k in outputs] for name in order if name in held}),
        "",
        "`random connector` is the control: the closed form's numbers in another order. `teacher on decoded latents`",
        "is the way without stitching: through the VAE's decoder.",
        "",
        "## Stitch points in closed form, on the clips to rank on",
        "",
        *table(["point", "R^2", "total", *outputs], ranking),
        "",
        "## Curve (clips to rank on, the running average of the weights)",
        "",
        *table(["step", "minutes", "total"], curve),
        "",
    ]
    return "\n".join(lines)
