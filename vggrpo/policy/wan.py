"""diffusers' Wan, tiny and real alike: its velocity at flow times, and the sizes that its folder says.

Timesteps of 0 to 1000 exist only here.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from vggrpo.policy.flow_policy import rows

TIMESTEPS = 1000.0


def wan_velocity(
    transformer: WanTransformer3DModel,
    z_t: Float[Tensor, "B D L h w"],
    t: Float[Tensor, " B"] | Float[Tensor, "B tokens"],
    text: Float[Tensor, "prompts words channels"],
    image: Float[Tensor, "prompts patches width"] | None = None,
) -> Float[Tensor, "B C L h w"]:
    """v = eps - z0 as the network predicts it, at flow times t in [0, 1] of each latent or token; 1 is noise.

    `text` and `image`, CLIP's view of a first frame, have a row for each latent; with `PromptAttention` they may have
    one for each prompt. The network computes in its own dtype; times stay in that of z_t, and v comes back in it.
    """
    inner = [x if x is None else x.to(transformer.dtype) for x in (z_t, text, image)]
    v: Tensor = transformer(inner[0], (TIMESTEPS * t).to(z_t), inner[1], inner[2], return_dict=False)[0]
    return v.to(z_t)


class PromptAttention(WanAttnProcessor):
    """Cross-attention to one prompt of several videos: their tokens become one sequence of queries.

    Queries do not see each other, so this is the same attention; but keys and values are computed once for every
    prompt, and not once for every video.
    """

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Float[Tensor, "n N d"],
        encoder_hidden_states: Float[Tensor, "prompts tokens d"],
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Float[Tensor, "n N d"]:
        """n is a multiple of the number of prompts, and every n / prompts videos in a row have one."""
        queries = hidden_states.reshape(len(encoder_hidden_states), -1, hidden_states.shape[-1])
        found: Tensor = super().__call__(attn, queries, encoder_hidden_states, attention_mask, rotary_emb)
        return found.reshape(hidden_states.shape)


class WanVelocity(nn.Module):
    """A Wan transformer as a `flow_policy.Network`: what is prepared for a launch, and called through it.

    What it is told is the text alone, or (text, first frame's latents), or (text, channels of the first frame), or
    (text, channels, CLIP's view): see `first_frame`. Latents in flight lack a first frame that is given.
    """

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        per_token: bool = False,
        transformer_2: WanTransformer3DModel | None = None,
        boundary: float | None = None,
    ) -> None:
        """A velocity of one transformer, or of two.

        Args:
            transformer: the only one, or the one that is asked at flow times from `boundary` on.
            per_token: every token has a time of its own, as in Wan2.2-TI2V-5B; a first frame that is given has 0.
            transformer_2: the one that is asked at flow times below `boundary` (Wan2.2-A14B).
            boundary: see `transformer`.
        """
        super().__init__()
        assert (transformer_2 is None) == (boundary is None)
        self.transformer, self.transformer_2 = transformer, transformer_2
        self.per_token, self.boundary = per_token, boundary
        for block in (block for one in self.transformers().values() for block in one.blocks):
            block.attn2.set_processor(PromptAttention())

    def transformers(self) -> dict[str, WanTransformer3DModel]:
        """All there are, by their folders in a pipeline."""
        both = {"transformer": self.transformer, "transformer_2": self.transformer_2}
        return {name: one for name, one in both.items() if one is not None}

    def at(self, t: Float[Tensor, " n"]) -> WanTransformer3DModel:
        """The transformer that is asked at these flow times.

        Raises:
            ValueError: times on both sides of the boundary.
        """
        if self.transformer_2 is None or self.boundary is None:
            return self.transformer
        high = above(t, self.boundary)
        if high.any() and not high.all():
            raise ValueError(f"flow times on both sides of the boundary {self.boundary:g} in one batch: ask for each")
        return self.transformer if high.all() else self.transformer_2

    def forward(
        self, z_t: Float[Tensor, "n C L h w"], t: Float[Tensor, " n"], told: Tensor | tuple[Tensor, ...]
    ) -> Float[Tensor, "n C L h w"]:
        """v at flow times t in [0, 1]; where they lie on both sides of the boundary, each side is asked by itself."""
        if self.boundary is not None:
            high = above(t, self.boundary)
            if high.any() and not high.all():
                sides = [side.nonzero()[:, 0] for side in (high, ~high)]
                v = torch.cat([self(z_t[side], t[side], rows(told, side)) for side in sides])
                return v[torch.cat(sides).argsort()]
        text, frame, image = (*((told,) if isinstance(told, Tensor) else told), None, None)[:3]
        assert text is not None
        first = first_rows(text) if image is None else first_rows(text, image)
        text, image = text[first], None if image is None else image[first]
        if self.per_token:
            return self._by_token(z_t, t, text, frame)
        z_t = z_t if frame is None else torch.cat([z_t, frame.to(z_t)], dim=1)
        return wan_velocity(self.at(t), z_t, t, text, image)

    def _by_token(self, z_t: Tensor, t: Tensor, text: Tensor, frame: Tensor | None) -> Tensor:
        """Behind the first frame at time 0, if there is one."""
        given = 0 if frame is None else frame.shape[2]
        whole = z_t if frame is None else torch.cat([frame.to(z_t), z_t], dim=2)
        _, down, across = self.transformer.config.patch_size
        tokens = whole.shape[3] // down * (whole.shape[4] // across)
        times = t[:, None].repeat(1, whole.shape[2] * tokens)
        times[:, : given * tokens] = 0
        return wan_velocity(self.at(t), whole, times, text)[:, :, given:]


def above(t: Float[Tensor, " n"], boundary: float) -> Bool[Tensor, " n"]:
    """Which flow times the first of two transformers is asked at, as diffusers compares them."""
    return TIMESTEPS * t >= boundary * TIMESTEPS


def in_dtype(transformer: WanTransformer3DModel, dtype: torch.dtype) -> WanTransformer3DModel:
    """One that was not loaded, in this dtype as `from_pretrained` holds it: times, norms and modulation keep theirs."""
    for name, weight in transformer.named_parameters():
        if not any(part in name for part in transformer._keep_in_fp32_modules):
            weight.data = weight.data.to(dtype)
    return transformer


def prompts_in(text: Float[Tensor, "n tokens channels"]) -> Float[Tensor, "prompts tokens channels"]:
    """Each prompt once, where every prompt stands in equally many rows, one after the other; else all rows."""
    return text[first_rows(text)]


def first_rows(*told: Float[Tensor, "n _ _"]) -> Int64[Tensor, " prompts"]:
    """Where each prompt begins, if every prompt stands in equally many rows, one after the other; else all rows."""
    n, device = len(told[0]), told[0].device
    changes = torch.stack([(x[1:] != x[:-1]).flatten(1).any(1) for x in told]).any(0)
    first = torch.cat([changes.new_ones(1), changes]).nonzero()[:, 0]
    each, left = divmod(n, len(first))
    equal = left == 0 and torch.equal(first, each * torch.arange(len(first), device=device))
    return first if equal else torch.arange(n, device=device)


def check_there(folder: Path) -> None:
    """Raises ValueError, one line, where there is no such folder: it may be a name on the hub, which is not asked."""
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder {folder}: if this is a hub id, fetch it first where there is a network "
            f"(hf download {folder} --local-dir DIR) and give DIR"
        )


WHOLE = (1, 1, 1)
"""A patch that any latents fill."""


def latent_shape(
    folder: Path, frames: int, height: int, width: int, patch: Sequence[int] = WHOLE
) -> tuple[int, int, int, int]:
    """(C, L, h, w) of a video of this size in the latents of a Wan folder's VAE.

    Args:
        patch: latents in a token, (time, down, across), of the transformer that is to make it (`wan_folder.Layout`).

    Raises:
        ValueError: no VAE there, or a size that its strides, times the patch, do not divide.
    """
    check_there(folder)
    path = folder / "vae" / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no vae/config.json: it must be a Wan model in diffusers layout")
    return latents_of(json.loads(path.read_text()), str(folder), frames, height, width, patch)


def latents_of(
    config: Mapping[str, Any], source: str, frames: int, height: int, width: int, patch: Sequence[int] = WHOLE
) -> tuple[int, int, int, int]:
    """(C, L, h, w) in the latents of a VAE with this configuration, which is that of `source`.

    Raises:
        ValueError: as `latent_shape`.
    """
    s, p = config.get("scale_factor_temporal", 4), config.get("scale_factor_spatial", 8)
    down, across = p * patch[1], p * patch[2]
    if frames % s != 1 or height % down or width % across:
        sides = f"{down}" if down == across else f"{down} x {across}"
        raise ValueError(
            f"{source} takes {s} n + 1 frames with sides that are multiples of {sides}, got {frames} of "
            f"{height} x {width}"
        )
    return config["z_dim"], (frames - 1) // s + 1, height // p, width // p


def own_shift(folder: Path) -> float:
    """The shift of a Wan folder's own time grid, whichever of diffusers' schedulers it has.

    Raises:
        ValueError: no scheduler there, or one without a shift.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no scheduler/scheduler_config.json: give the time grid's shift yourself")
    config = json.loads(path.read_text())
    shift = config.get("flow_shift", config.get("shift"))
    if shift is None:
        raise ValueError(f"{path} says nothing of a shift: give the time grid's shift yourself")
    return float(shift)
