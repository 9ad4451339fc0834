"""A tiny model directory for commands that run outside pytest."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from full_stack_transformer.modelling.backbones import new_backbone
from full_stack_transformer.modelling.model_directory import save_model_directory
from full_stack_transformer.tokenization.document_tokenizer import TrainedTokenizer


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Inside, models are opened for one core: see `running_service` for why."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def make_tiny_model(
    root: Path,
    *,
    name: str = "tiny-model",
    preset: str = "tiny",
    max_length: int = 128,
    seed: int = 0,
) -> Path:
    """A model directory below `root` with random weights and a byte-level BPE of 300 tokens."""
    words = [f"{one} {two} word" for one in ("the", "a", "small") for two in ("reader", "corpus")]
    tokenizer = TrainedTokenizer.train(words * 20, vocab_size=300)
    tokenizer.save(root / "tokenizer", model_max_length=max_length)
    torch.manual_seed(seed)
    ids = {"begin": tokenizer.begin_id, "end": tokenizer.end_id, "pad": tokenizer.pad_id}
    backbone = new_backbone(
        preset,
        vocab_size=tokenizer.vocab_size,
        max_length=max_length,
        special_token_ids=ids,
    )
    # Fresh weights predict all tokens about alike; sharper ones make generated texts differ.
    with torch.no_grad():
        backbone.get_input_embeddings().weight.mul_(6)
    directory = root / name
    save_model_directory(
        directory,
        backbone,
        tokenizer_directory=root / "tokenizer",
        description={"step": seed, "validation_loss": 5.5},
    )
    return directory
