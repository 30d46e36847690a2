"""What an iteration costs, from formulas: evaluations of the network, floating-point operations, bytes.

    N   tokens of a video: L h w over the patch                       d, f    width, width of the feed-forward layer
    M   tokens of a prompt                                            n       videos of this rank: B K over the ranks
    m   M over the videos that share a prompt in a micro-batch: its keys and values are computed once
    I   tokens of CLIP's view of a first frame, 0 where none is read  i       I over the same videos
    r   rank of the LoRA, on q, k, v and out of both attentions       layers  blocks

Operations of a Wan forward pass, per video; a product of [a, b] and [b, c] is 2abc of them:
    block   N (12 d^2 + 4 d f) + 4 (m + i) d^2 + 4 N^2 d + 4 N (M + I) d    self- and cross-attention, feed-forward
    LoRA    4 r d (6 N + 2 (m + i))                                   six maps of N tokens, two of m and two of i
    ends    patch and output 2 N d (p_in + p_out), text 2 m d (text_dim + d), time 2 d (freq_dim + 7 d),
            image 2 i image_dim (image_dim + d)
The backward pass multiplies by every weight once more to reach the LoRA further down (frozen weights have no gradient),
but not beneath the first block's q, k and v, nor into text and image; attention costs 2.5 times as much, for it is
computed again, and the LoRA twice. Gradient checkpointing adds a forward pass.

Bytes at the peak, which is a replayed micro-batch with its graph:
    frozen weights 4 each, or in bf16 2, but for time embedding and norms, of all transformers that there are; trained
        weights, which are fp32, 16 each (weight, gradient, two moments), 20 with an average
    saved for the backward pass, per video and block:
        fp32   4 (N (14 d + f) + 3 m d)
        bf16   4 (12 N d + 3 m d) + 2 (N (6 d + f) + 2 m d)           a map with LoRA keeps an fp32 copy of its input
        both   4 (N (6 r + 9 + 2 heads) + 2 m r)                      low ranks, norms
        image  as of the text with i for m, N heads, and attention to it: 2 N d in fp32, N d in bf16
        and 32 N d where every token has a time of its own
    or N d alone, and one block, with checkpointing
    what all blocks are told of times that are each token's own, 7 N d
    states of the trained steps, (S + 1) n latents; z0, and the reference's velocity in flight
    what videos are told of first frames, twice, for there is a negative prompt
What the allocator wastes and what libraries hold is not in it, nor is the latent geometry model's own working memory.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vggrpo.config import GrpoConfig, SamplingConfig

FLOAT, HALF = 4, 2
"""Bytes."""


@dataclass(frozen=True)
class Shape:
    """A Wan transformer with LoRA, and the video that it is given."""

    layers: int
    heads: int
    d: int
    f: int
    text_dim: int
    freq_dim: int
    patch_in: int
    """Numbers that make a token."""
    patch_out: int
    N: int
    M: int
    r: int
    sharing: int = 1
    """Videos that have one prompt, in a row, in a micro-batch."""
    per_token: bool = False
    """Every token has a time of its own (Wan2.2-TI2V-5B)."""
    half: bool = False
    """Held and computed in bf16."""
    image_dim: int = 0
    """Width of CLIP's view; 0: none is read."""
    I: int = 0  # noqa: E741
    resident: int = 1
    """Transformers of this shape that are held (Wan2.2-A14B: two); one at a time is asked."""
    adapted: int = 1
    """Those of them that have LoRA."""

    @staticmethod
    def of(
        config: Mapping[str, Any],
        latent: tuple[int, int, int, int],
        M: int,
        r: int,
        sharing: int = 1,
        *,
        per_token: bool = False,
        half: bool = False,
        seen: int = 0,
        resident: int = 1,
        adapted: int = 1,
    ) -> "Shape":
        """From the transformer's config.json and (C, L, h, w); `seen` are the tokens I of an image."""
        C, L, h, w = latent
        p = config["patch_size"]
        volume = math.prod(p)
        d = config["num_attention_heads"] * config["attention_head_dim"]
        N = (L // p[0]) * (h // p[1]) * (w // p[2])
        out = config.get("out_channels") or C
        return Shape(
            config["num_layers"], config["num_attention_heads"], d, config["ffn_dim"], config["text_dim"],
            config["freq_dim"], config["in_channels"] * volume, out * volume, N, M, r, sharing, per_token, half,
            config.get("image_dim") or 0, seen, resident, adapted,
        )  # fmt: skip

    @property
    def m(self) -> float:
        """Tokens of a prompt, for each video that shares it."""
        return self.M / self.sharing

    @property
    def i(self) -> float:
        """Tokens of an image, likewise."""
        return self.I / self.sharing

    @property
    def num_frozen(self) -> int:
        """Parameters of a transformer itself."""
        d, f = self.d, self.f
        attention = 4 * (d * d + d) + 2 * d
        block = 2 * attention + 2 * d * f + f + d + 2 * d + 6 * d  # with the norm before cross-attention
        ends = d * self.patch_in + d + self.patch_out * d + self.patch_out + 2 * d
        text = self.text_dim * d + d + d * d + d
        time = self.freq_dim * d + d + d * d + d + 6 * d * d + 6 * d
        image = 0
        if self.image_dim:  # keys and values of every block, with a norm; norms around two maps
            block += 2 * (d * d + d) + d
            image = self._image_norms + self.image_dim * (self.image_dim + 1) + (self.image_dim + 1) * d
        return self.layers * block + ends + text + time + image

    @property
    def num_whole(self) -> int:
        """Those of them that stay in fp32 in a bf16 model: time embedding, norm and modulation of every block."""
        d = self.d
        return self.layers * 8 * d + self.freq_dim * d + d + d * d + d + 2 * d + self._image_norms

    @property
    def num_trained(self) -> int:
        """Parameters of a LoRA: eight maps of d x d in a block, and two to an image."""
        return self.layers * (10 if self.image_dim else 8) * 2 * self.d * self.r

    @property
    def _image_norms(self) -> int:
        return 2 * (self.image_dim + self.d) if self.image_dim else 0


@dataclass(frozen=True)
class Counts:
    """Evaluations of one video, on one rank, in one iteration; guidance counts twice."""

    rollout: int
    replay: int
    """With a graph."""
    reference: int
    geometry: int


def evaluations(sampling: SamplingConfig, grpo: GrpoConfig, num_prompts: int, num_members: int, begin: int) -> Counts:
    """Of an iteration on a rank that holds `num_prompts` x `num_members` videos.

    Args:
        begin: first step of the window; with shared noise the steps before it run once per group.
    """
    n, twice = num_prompts * num_members, 1 if sampling.guidance_scale in (0, 1) else 2
    before = num_prompts if sampling.share_noise else n
    steps = begin * before + (sampling.num_steps - begin) * n
    replay = sampling.window.size * n * twice * grpo.num_updates
    return Counts(steps * twice, replay, replay if grpo.beta > 0 else 0, n)


def forward_flops(shape: Shape) -> float:
    """Of one video."""
    d, N, m, i = shape.d, shape.N, shape.m, shape.i
    ends = 2 * N * d * (shape.patch_in + shape.patch_out)
    text = 2 * m * d * (shape.text_dim + d)
    time = 2 * d * (shape.freq_dim + 7 * d)
    image = 2 * i * shape.image_dim * (shape.image_dim + d)
    block = _maps(shape) + 4 * (m + i) * d * d + _attention(shape) + _lora(shape)
    return shape.layers * block + ends + text + time + image


def backward_flops(shape: Shape) -> float:
    """Of one video, to the LoRA, on top of the forward pass."""
    d, N, r = shape.d, shape.N, shape.r
    block = _maps(shape) + 2.5 * _attention(shape) + 2 * _lora(shape) - 4 * (shape.m + shape.i) * r * d
    beneath = 6 * N * d * d + 6 * N * r * d
    return shape.layers * block - beneath + 2 * N * d * shape.patch_out


def iteration_flops(shape: Shape, counts: Counts, *, checkpointing: bool) -> float:
    """Of all evaluations of the network; the latent geometry model's are not in it."""
    forward = counts.rollout + counts.reference + counts.replay * (2 if checkpointing else 1)
    return forward * forward_flops(shape) + counts.replay * backward_flops(shape)


def saved_bytes(shape: Shape, *, checkpointing: bool = False) -> int:
    """What a forward pass of one video keeps for its backward pass."""
    d, N, m, r = shape.d, shape.N, shape.m + shape.i, shape.r
    wide = 12 * N * d + 3 * m * d if shape.half else N * (14 * d + shape.f) + 3 * m * d
    narrow = N * (6 * d + shape.f) + 2 * m * d if shape.half else 0.0
    wide += N * (6 * r + 9 + 2 * shape.heads) + 2 * m * r + (8 * N * d if shape.per_token else 0)
    if shape.I:
        wide += N * shape.heads + (0 if shape.half else 2 * N * d)
        narrow += N * d if shape.half else 0
    block = FLOAT * wide + HALF * narrow
    between = (HALF if shape.half else FLOAT) * N * d
    once = 0 if shape.half else FLOAT * round(m * d)  # what all blocks read of text and image; in bf16 each has a copy
    return round(shape.layers * between + block if checkpointing else shape.layers * block) + once


def peak_bytes(
    shape: Shape, sampling: SamplingConfig, latent: tuple[int, int, int, int], num_videos: int, *, averaged: bool
) -> int:
    """Of one rank that holds the whole model and `num_videos` of the batch; the geometry model comes on top."""
    micro = min(sampling.micro_batch, num_videos)
    twice = 1 if sampling.guidance_scale in (0, 1) else 2
    size = math.prod(latent)
    kept = (sampling.window.size + 1) * num_videos * size * (4 if sampling.storage == "float32" else 2)
    frozen = FLOAT * shape.num_frozen
    if shape.half:
        frozen = HALF * shape.num_frozen + (FLOAT - HALF) * shape.num_whole
    weights = shape.resident * frozen + FLOAT * (5 if averaged else 4) * shape.adapted * shape.num_trained
    channels = shape.patch_in - shape.patch_out  # of a first frame
    told = 2 * FLOAT * num_videos * (channels * shape.N + shape.I * shape.image_dim)
    graph = micro * twice * saved_bytes(shape, checkpointing=sampling.gradient_checkpointing)
    if shape.per_token:
        graph += micro * twice * 7 * shape.N * shape.d * (HALF if shape.half else FLOAT)
    return weights + graph + kept + told + 3 * FLOAT * num_videos * size


def _maps(shape: Shape) -> int:
    """Of a block's tokens: q, k, v and out, q and out again, the feed-forward layer."""
    return shape.N * (12 * shape.d**2 + 4 * shape.d * shape.f)


def _attention(shape: Shape) -> int:
    return 4 * shape.N * shape.d * (shape.N + shape.M + shape.I)


def _lora(shape: Shape) -> float:
    return 4 * shape.r * shape.d * (6 * shape.N + 2 * (shape.m + shape.i))
