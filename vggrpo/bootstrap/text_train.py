"""Training the text encoder to fill in masked words of captions, and what can then be read from its embeddings."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vggrpo.bootstrap.captions import FACTS, Captioned
from vggrpo.bootstrap.text import TextStage, build_encoder, build_tokenizer, encode_prompts
from vggrpo.bootstrap.training import Training, load_training, save_training

MAY_CHANGE = ("out", "asset", "checkpoint_every")
"""Fields in which a resumed run may differ from what it was started with."""
HELD_OUT = range(20_000_000, 20_000_512)
"""Seeds of the captions that nothing is trained on."""
WARMUP = 100
RIDGE = 1.0


@dataclass(frozen=True)
class TextRecipe:
    """All of the text stage's training."""

    out: str = "runs/bootstrap/text"
    """Folder of the checkpoint."""
    asset: str = "assets/tiny-wan"
    """Folder that gets tokenizer/ and text_encoder/, with a card in the latter."""
    seed: int = 0
    """Of every random stream."""
    num_captions: int = 2048
    """Training captions; their seeds are 0 ... num_captions - 1. The vocabulary is theirs."""
    max_len: int = 96
    """Tokens of a prompt that the video model sees, `</s>` included."""
    width: int = 64
    """Channels of an embedding."""
    layers: int = 2
    """Of the encoder."""
    num_steps: int = 2000
    """Optimiser steps; 0 leaves the encoder random."""
    batch: int = 32
    """Captions in a step."""
    lr: float = 3e-3
    """Highest learning rate of AdamW (betas .9, .98; no weight decay); it falls to 0 in a line."""
    masked: float = 0.6
    """Largest share of a caption's words that are masked; each caption draws its own, from 0.1 on."""
    checkpoint_every: int = 300
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        for name, least in (("num_captions", 1), ("max_len", 2), ("layers", 1), ("batch", 1), ("checkpoint_every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if self.width < 16 or self.width % 16:
            raise ValueError(f"width must be a multiple of 16, got {self.width}")
        if self.num_steps < 0 or not 0.1 < self.masked < 1:
            raise ValueError(f"num_steps must be >= 0 and masked in (0.1, 1), got {self.num_steps} and {self.masked:g}")


def start_text(recipe: TextRecipe, captions: Sequence[Captioned]) -> tuple[TextStage, Training]:
    """The text stage at step 0, or where the checkpoint in `recipe.out` left it.

    Raises:
        ValueError: the checkpoint is damaged, or was made by another recipe.
    """
    tokenizer = build_tokenizer([caption.text for caption in captions], recipe.max_len)
    torch.manual_seed(recipe.seed)
    encoder = build_encoder(len(tokenizer), recipe.width, recipe.layers)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0)
    training = Training(encoder, optimizer)
    load_training(_checkpoint(recipe), training, asdict(recipe), MAY_CHANGE)
    return TextStage(tokenizer, encoder), training


def train_text(
    stage: TextStage, training: Training, recipe: TextRecipe, captions: Sequence[Captioned]
) -> Iterator[float]:
    """Train to the recipe's last step, yielding every step's loss (nats per masked word); checkpoints on the way.

    The loss has a floor far above 0: most words of a caption are independent of the others.
    """
    tokens = stage.tokenizer([caption.text for caption in captions], padding=True, return_tensors="pt")
    while training.step < recipe.num_steps:
        begin = time.perf_counter()
        rng = torch.Generator().manual_seed(recipe.seed * 1_000_003 + training.step)
        rows = torch.randint(len(captions), (recipe.batch,), generator=rng)
        ids, present = tokens.input_ids[rows], tokens.attention_mask[rows]
        share = 0.1 + (recipe.masked - 0.1) * torch.rand(len(rows), 1, generator=rng)
        hidden = (torch.rand(ids.shape, generator=rng) < share) & present.bool()
        seen = stage.encoder(ids.masked_fill(hidden, stage.tokenizer.mask_token_id), present).last_hidden_state
        logits = seen[hidden] @ stage.encoder.get_input_embeddings().weight.T / recipe.width**0.5
        loss = F.cross_entropy(logits, ids[hidden])
        training.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stage.encoder.parameters(), 1.0)
        rate = min(1.0, (training.step + 1) / WARMUP) * (1 - training.step / recipe.num_steps)
        training.optimizer.param_groups[0]["lr"] = recipe.lr * rate
        training.optimizer.step()
        training.update_average(0.0)
        training.seconds += time.perf_counter() - begin
        if training.step % recipe.checkpoint_every == 0 or training.step == recipe.num_steps:
            training.curve.append({"step": training.step, "loss": round(loss.item(), 4)})
            save_training(_checkpoint(recipe), training, asdict(recipe))
        yield loss.item()


def probe(
    stage: TextStage, training: Sequence[Captioned], held_out: Sequence[Captioned], shuffled: bool = False
) -> dict[str, float]:
    """Share of held-out captions whose facts a linear map of the mean token embedding gets right, by fact.

    The map is a ridge solution on the training captions. `shuffled` gives those each other's facts: the control.
    """
    x, unseen = (_means(stage, captions) for captions in (training, held_out))
    centre, scale = x.mean(0), x.std(0) + 1e-6
    x, unseen = (F.pad((features - centre) / scale, (0, 1), value=1.0).double() for features in (x, unseen))
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(0)).tolist()
    order = order if shuffled else list(range(len(training)))
    found = {}
    for name in FACTS:
        classes = sorted({caption.facts[name] for caption in training})
        y = torch.tensor([classes.index(training[i].facts[name]) for i in order])
        gram = x.T @ x + RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
        weights = torch.linalg.solve(gram, x.T @ F.one_hot(y, len(classes)).to(x))
        guesses = (unseen @ weights).argmax(-1).tolist()
        hits = [classes[guess] == caption.facts[name] for guess, caption in zip(guesses, held_out, strict=True)]
        found[name] = round(sum(hits) / len(hits), 4)
    return found


def _means(stage: TextStage, captions: Sequence[Captioned]) -> Float[Tensor, "B channels"]:
    embeddings, mask = encode_prompts(stage, [caption.text for caption in captions], stage.tokenizer.model_max_length)
    return embeddings.sum(1) / mask.sum(1, keepdim=True)


def _checkpoint(recipe: TextRecipe) -> Path:
    return Path(recipe.out) / "checkpoint.safetensors"
