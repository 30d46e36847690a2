"""The tiny text stage: a tokenizer for the world's captions and a UMT5 encoder, and how prompts go through them.

The vocabulary is counted, not trained, for the library's trainer gives now one and now another from the same captions:
every word of the captions is one token, and other words fall apart into characters.
"""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from vggrpo.bootstrap.assets import read_card

TOKENIZER, ENCODER = "tokenizer", "text_encoder"
"""Where a WanPipeline has them."""
SPECIAL = ("<pad>", "</s>", "<unk>", "<mask>")
RARE = -20.0
"""Log-probability of a single character: below that of any word, so that a known word is always whole."""


class TextStage(NamedTuple):
    """What turns prompts into what a video transformer attends to."""

    tokenizer: PreTrainedTokenizerBase
    encoder: UMT5EncoderModel


def build_tokenizer(captions: Sequence[str], max_len: int) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer of the captions' words and marks, and of ASCII characters for other words; lower case.

    `max_len` is the number of tokens, `</s>` included, that it is meant for.
    """
    normal = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(Regex(r"[.,;:!?()\"]"), "isolated")]
    )
    words = Counter(word for text in captions for word, _ in split.pre_tokenize_str(normal.normalize_str(text)))
    pieces = [(word, math.log(count / words.total())) for word, count in sorted(words.items())]
    characters = sorted({chr(code).lower() for code in range(33, 127)} | {"▁"})
    pieces += [(character, RARE) for character in characters if character not in words]
    tokenizer = Tokenizer(models.Unigram([(name, 0.0) for name in SPECIAL] + pieces, SPECIAL.index("<unk>"), False))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normal, split, decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", SPECIAL.index("</s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=max_len,
    )


def build_encoder(vocabulary: int, width: int, layers: int) -> UMT5EncoderModel:
    """An untrained UMT5 encoder with heads of 16 channels; random numbers come from torch's global generator."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=16,
            d_ff=2 * width,
            num_layers=layers,
            num_heads=width // 16,
            dropout_rate=0.0,
            pad_token_id=SPECIAL.index("<pad>"),
            eos_token_id=SPECIAL.index("</s>"),
        )
    )


@torch.no_grad()
def encode_prompts(
    stage: TextStage, prompts: Sequence[str], max_len: int
) -> tuple[Float[Tensor, "B max_len channels"], Bool[Tensor, "B max_len"]]:
    """What WanPipeline makes of prompts: embeddings, 0 beyond a prompt's end, and which of them are tokens.

    Longer prompts are cut at `max_len` tokens.
    """
    tokens = stage.tokenizer(
        list(prompts), padding="max_length", max_length=max_len, truncation=True, return_tensors="pt"
    ).to(stage.encoder.device)
    mask: Tensor = tokens.attention_mask
    embeddings: Tensor = stage.encoder(tokens.input_ids, mask).last_hidden_state
    return embeddings * mask[..., None], mask.bool()


def load_text(folder: Path) -> TextStage:
    """The text stage of an asset folder in diffusers layout, frozen, from files that are what its card says.

    Raises:
        ValueError: a file is missing or has been changed (`assets.read_card`).
    """
    read_card(folder / ENCODER)
    tokenizer = AutoTokenizer.from_pretrained(folder / TOKENIZER, local_files_only=True)
    encoder = UMT5EncoderModel.from_pretrained(folder / ENCODER, local_files_only=True, torch_dtype=torch.float32)
    return TextStage(tokenizer, encoder.eval().requires_grad_(False))
