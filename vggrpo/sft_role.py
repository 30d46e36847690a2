"""Which transformer of a Wan is finetuned, at which flow times it is asked, and what it is told beside the caption.

Wan2.2-A14B has two, one on each side of a boundary: a finetuning is of one of them, at the times of its side. A Wan of
first frames is told of each clip's own, as the trainer tells it of a prompt's (`policy/first_frame.py`).
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from diffusers import WanTransformer3DModel

from vggrpo.bootstrap.training import Training
from vggrpo.data import Encoded
from vggrpo.policy.first_frame import Way, check_words
from vggrpo.policy.wan import WanVelocity, latent_shape
from vggrpo.policy.wan_folder import read_layout
from vggrpo.sft_config import SftRecipe

PATCH = (1, 2, 2)
"""Of a transformer that starts from nothing."""


@dataclass(frozen=True)
class Role:
    """What is finetuned, as far as its folder says."""

    part: str = "transformer"
    """Its folder in the model's."""
    span: tuple[float, float] = (0.0, 1.0)
    """Flow times that it is asked at."""
    way: Way | None = None
    """How it is told of a first frame; None: it is not."""
    sight: bool = False
    """It also reads CLIP's view of it."""


@dataclass
class Finetuning(Training[WanTransformer3DModel]):
    """A training of a transformer in its role."""

    role: Role = field(default_factory=Role)
    velocity: WanVelocity = field(init=False)
    """The network, as a policy calls it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.velocity = WanVelocity(self.network, self.role.way == "kept")


def role_of(recipe: SftRecipe) -> Role:
    """What this recipe trains.

    Raises:
        ValueError: a folder that is no Wan; clips of a size that the model does not make; two transformers and no
            `side`, or a side of one; a first frame that the model cannot be told of or cannot go without, or that
            leaves nothing to learn.
    """
    folder, patch, role = Path(recipe.model), PATCH, Role()
    if recipe.new is None:
        layout = read_layout(folder)
        patch = layout.patch
        given = layout.way == "channels" if recipe.tell_first_frame is None else recipe.tell_first_frame
        way = layout.told(given, "tell_first_frame")
        role = replace(_side(recipe, layout.boundary), way=way, sight=layout.sight)
    for clips in (recipe.data, recipe.held_out):
        latent_shape(folder, clips.frames, clips.height, clips.width, patch)
        if role.way == "kept" and clips.frames == 1:
            raise ValueError("tell_first_frame: of clips of one frame nothing is left to learn: give them 5 or more")
    if role.way == "kept" and recipe.first_weight != 1:
        raise ValueError("first_weight is of the first latent frame, which is told and not learnt: leave it 1")
    if role.sight:
        check_words(recipe.max_len)
    return role


def without_first(data: Encoded) -> Encoded:
    """Clips whose first latent frame is told, and not learnt."""
    return replace(data, z0=data.z0[:, :, 1:], given=(data.z0[:, :, :1],))


def _side(recipe: SftRecipe, boundary: float | None) -> Role:
    if (boundary is None) != (recipe.side is None):
        raise ValueError(
            f"{recipe.model} has two transformers, one at flow times from {boundary:g} on and one below: train one at "
            "a time, side=high or side=low"
            if boundary is not None
            else f"side is {recipe.side}, and {recipe.model} has one transformer, for all times: leave side out"
        )
    if boundary is None:
        return Role()
    return Role(span=(boundary, 1.0)) if recipe.side == "high" else Role("transformer_2", (0.0, boundary))
