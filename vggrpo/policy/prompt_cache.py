"""Embeddings of prompts on disk: a text encoder of five billion parameters is loaded once, and not at every start.

    CACHE/prompts/<sha256>.safetensors    the tokens of one prompt [n channels], in the encoder's dtype
    CACHE/files/<sha256>.json             sha256 of a file of a folder, by its path, size and time of change

The name of the first is made of the encoder's and tokenizer's files (their sha256, not their names), the encoder's
dtype, the prompt and the number of tokens it is cut at. Files are whole or not there: several processes may write them.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, UMT5EncoderModel

from vggrpo.bootstrap.assets import sha256
from vggrpo.bootstrap.text import ENCODER, TOKENIZER, TextStage, encode_prompts
from vggrpo.policy.flow_policy import TextEncoder
from vggrpo.types import Condition

VERSION = 1
"""Of what is stored: another one does not read this one's files."""
EXACT = (".json", ".safetensors", ".model", ".txt")
"""Files that an encoder's or a tokenizer's answer depends on."""


def prompt_encoder(
    folder: Path,
    prompts: Iterable[str],
    max_len: int,
    *,
    cache: str | Path | None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TextEncoder:
    """What the text encoder of a Wan folder says of these prompts, as fp32 on `device`; of no other can it be asked.

    The encoder is loaded, on `device`, if the cache lacks one of them, and does not stay.

    Args:
        max_len: tokens, `</s>` included; longer prompts are cut.
        cache: folder; None: nothing is kept.
        dtype: in which the encoder is held and computes.

    Raises:
        ValueError: the folder has no text encoder or tokenizer, or a file of the cache is damaged.
    """
    wanted = list(dict.fromkeys(prompts))
    for part in (ENCODER, TOKENIZER):
        if not (folder / part / "config.json").is_file() and not (folder / part / "tokenizer_config.json").is_file():
            raise ValueError(f"{folder} has no {part}/: it must be a Wan model in diffusers layout")
    places: dict[str, Path] = {}
    if cache is not None:
        made_by = identity(folder, Path(cache), dtype)
        places = {prompt: _place(Path(cache), made_by, prompt, max_len) for prompt in wanted}
    known = {prompt: _read(path) for prompt, path in places.items() if path.is_file()}
    missing = [prompt for prompt in wanted if prompt not in known]
    if missing:
        encode = text_encoder(folder, max_len, device, dtype)
        for prompt in missing:
            known[prompt] = encode(prompt)
            if prompt in places:
                _write(places[prompt], known[prompt])
    return known_prompts(known, max_len, device)


def text_encoder(
    folder: Path, max_len: int, device: torch.device | str, dtype: torch.dtype
) -> Callable[[str], Float[Tensor, "n channels"]]:
    """A Wan folder's own text encoder: a prompt's tokens, n <= `max_len` of them, on the CPU."""
    encoder = UMT5EncoderModel.from_pretrained(folder / ENCODER, local_files_only=True, dtype=dtype)
    words = AutoTokenizer.from_pretrained(folder / TOKENIZER, local_files_only=True)
    stage = TextStage(words, encoder.eval().requires_grad_(False).to(device))

    def encode(prompt: str) -> Tensor:
        embedding, mask = encode_prompts(stage, [prompt], max_len)
        n = int(mask[0].sum())
        assert mask[0, :n].all(), "a tokenizer that pads on the left"
        return embedding[0, :n].cpu()

    return encode


def known_prompts(
    known: dict[str, Float[Tensor, "_ channels"]], max_len: int, device: torch.device | str = "cpu"
) -> TextEncoder:
    """Prompts whose tokens are known, kept on the CPU and handed out on `device`: fp32, 0 beyond a prompt's end."""

    def encode(cond: Condition) -> Float[Tensor, "B max_len channels"]:
        for prompt in cond.prompt:
            if prompt not in known:
                raise ValueError(f"the prompt {prompt!r} was not encoded beforehand")
        found = [known[prompt].to(device, torch.float32) for prompt in cond.prompt]
        return torch.stack([torch.cat([x, x.new_zeros(max_len - len(x), x.shape[1])]) for x in found])

    return encode


def identity(folder: Path, cache: Path, dtype: torch.dtype) -> str:
    """What decides an embedding besides the prompt: sha256 of every file of encoder and tokenizer, and the dtype."""
    files = {
        f"{part}/{path.name}": _digest(path, cache)
        for part in (ENCODER, TOKENIZER)
        for path in sorted((folder / part).iterdir())
        if path.suffix in EXACT and path.name != "card.json"
    }
    return _sha256([VERSION, files, str(dtype)])


def _digest(path: Path, cache: Path) -> str:
    """sha256 of a file; remembered, for one of 10 GB takes half a minute to read."""
    found = path.stat()
    kept = cache / "files" / f"{_sha256([str(path.resolve()), found.st_size, found.st_mtime_ns])}.json"
    if kept.is_file():
        digest: str = json.loads(kept.read_text())
        return digest
    digest = sha256(path)
    _whole(kept, lambda part: part.write_text(json.dumps(digest)))
    return digest


def _place(cache: Path, made_by: str, prompt: str, max_len: int) -> Path:
    return cache / "prompts" / f"{_sha256([made_by, prompt, max_len])}.safetensors"


def _read(path: Path) -> Tensor:
    try:
        return load_file(path)["tokens"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and the prompt is encoded again") from None


def _write(path: Path, tokens: Tensor) -> None:
    _whole(path, lambda part: save_file({"tokens": tokens.contiguous()}, part))


def _whole(path: Path, write: Callable[[Path], object]) -> None:
    """A file that is either complete or not there, whoever else writes it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    write(part)
    os.replace(part, path)


def _sha256(facts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
