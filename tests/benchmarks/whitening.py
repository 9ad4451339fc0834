"""What whitening does to the embeddings of a small masked language model: Spearman on pairs of sentences.

    python -m tests.benchmarks.whitening --steps 700
    python -m tests.benchmarks.whitening --short

Trains a ModernBERT of 1 M parameters on the docstrings of the training side, in a plain loop; fits the
whitening on the sentences of that side; measures on the pairs of the test side, once with random weights and
once trained. The pairs, the split and the poolings are those of the package.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.document_sources.python_sources import Docstring, library_docstrings
from full_stack_transformer.document_sources.task_rows import TaskRow, sentence_rows, side_of
from full_stack_transformer.machine import processor_name
from full_stack_transformer.metrics.regression import spearman
from full_stack_transformer.modelling.embedding.encoder import SentenceEncoder
from full_stack_transformer.modelling.embedding.head import POOLING_MODES, Head, PoolingMode
from full_stack_transformer.modelling.embedding.whitening import fit_whitening
from full_stack_transformer.tokenization.document_tokenizer import TrainedTokenizer
from tests.benchmarks.machine import commit

MAX_LENGTH = 48
BATCH_SIZE = 32
MASK_SHARE = 0.15
SHORT_STEPS = 100


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=700, help="batches to train on")
    parser.add_argument("--short", action="store_true", help=f"{SHORT_STEPS} batches")
    options = parser.parse_args()
    docstrings = library_docstrings()
    rows = list(sentence_rows(docstrings))
    print(f"{processor_name()}, PyTorch {torch.__version__}, commit {commit()}")
    backbone, tokenizer, texts = new_model(docstrings)
    num_parameters = sum(weight.numel() for weight in backbone.parameters())
    print(f"{num_parameters:,} parameters, {len(texts):,} docstrings to train on")
    if not options.short:
        _print("untrained", backbone, tokenizer, rows, POOLING_MODES)
    num_steps = SHORT_STEPS if options.short else options.steps
    loss = train(backbone, tokenizer, texts, num_steps=num_steps)
    print(f"trained on {num_steps:,} batches, loss of the last 100 {loss:.3f}")
    poolings = POOLING_MODES if not options.short else ("mean",)
    found = _print("trained", backbone, tokenizer, rows, poolings)
    ratios = {pooling: round(cells[None] / cells["plain"], 3) for pooling, cells in found.items()}
    aims = dict.fromkeys(ratios, 1.0)
    print(json.dumps({"benchmark": "whitening", "ratios": ratios, "aims": aims}))


def new_model(
    docstrings: Sequence[Docstring],
) -> tuple[Backbone, PreTrainedTokenizerFast, list[str]]:
    """A masked model with random weights, its tokenizer, and the texts to train on."""
    torch.manual_seed(0)
    texts = [one.text for one in docstrings if side_of(one.module) == "train"]
    with TemporaryDirectory() as directory:
        TrainedTokenizer.train(texts, vocab_size=4096).save(
            Path(directory), model_max_length=MAX_LENGTH
        )
        tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    return _new_backbone(tokenizer), tokenizer, texts


def _new_backbone(tokenizer: PreTrainedTokenizerFast) -> Backbone:
    config = AutoConfig.for_model(
        "modernbert",
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        cls_token_id=tokenizer.bos_token_id,
        sep_token_id=tokenizer.eos_token_id,
    )
    return AutoModelForMaskedLM.from_config(config)


def train(
    backbone: Backbone, tokenizer: PreTrainedTokenizerFast, texts: list[str], *, num_steps: int
) -> float:
    """AdamW with a linear decay; 80/10/10 masking."""
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=2e-3, weight_decay=0.01)
    order = random.Random(0)
    losses: list[float] = []
    backbone.train()
    for step in range(num_steps):
        inputs = tokenizer(
            order.sample(texts, BATCH_SIZE),
            padding=True,
            truncation=True,
            max_length=MAX_LENGTH,
            return_tensors="pt",
        )
        input_ids, mask = inputs["input_ids"], inputs["attention_mask"]
        draw = torch.rand(input_ids.shape)
        is_target = (draw < MASK_SHARE) & mask.bool()
        labels = input_ids.masked_fill(~is_target, -100)
        input_ids = torch.where(
            is_target & (draw < 0.8 * MASK_SHARE), tokenizer.mask_token_id, input_ids
        )
        is_random = is_target & (draw > 0.9 * MASK_SHARE)
        input_ids = torch.where(
            is_random, torch.randint(len(tokenizer), input_ids.shape), input_ids
        )
        loss = backbone(input_ids=input_ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (1 - step / num_steps)
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return float(np.mean(losses[-100:]))


def _print(
    name: str,
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[TaskRow],
    poolings: Sequence[PoolingMode],
) -> dict[PoolingMode, dict[int | str | None, float]]:
    num_rows = sum(row.side == "test" for row in rows)
    print(
        f"{name}: Spearman of cosines on {num_rows:,} pairs; 95 % intervals are some 0.06 to each side"
    )
    found = {pooling: measure(backbone, tokenizer, rows, pooling) for pooling in poolings}
    for pooling, cells in found.items():
        said = "   ".join(f"{cell or 'all'}: {figure:.3f}" for cell, figure in cells.items())
        print(f"  {pooling:<15} {said}")
    sys.stdout.flush()
    return found


def measure(
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[TaskRow],
    pooling: PoolingMode,
) -> dict[int | str | None, float]:
    """Spearman on the test pairs: plain, and by the number of dimensions after whitening, None for all."""
    backbone.eval()
    train = [row.fields for row in rows if row.side == "train" and row.fields["score"] == 1.0]
    test = [row.fields for row in rows if row.side == "test"]
    encoder = SentenceEncoder(backbone.base_model, tokenizer, Head(pooling), max_length=MAX_LENGTH)
    fitted_on = encoder.encode([row["sentence1"] for row in train])
    first, second = (
        encoder.encode([row[key] for row in test]) for key in ("sentence1", "sentence2")
    )
    scores = np.array([row["score"] for row in test])
    found: dict[int | str | None, float] = {"plain": _spearman(first, second, scores)}
    for num_dimensions in (None, 64, 32):
        whitening = fit_whitening(fitted_on, num_dimensions=num_dimensions)
        moved = whitening.transform(first), whitening.transform(second)
        found[num_dimensions] = _spearman(*moved, scores)
    return found


def _spearman(
    first: NDArray[np.floating[Any]],
    second: NDArray[np.floating[Any]],
    scores: NDArray[np.floating[Any]],
) -> float:
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return spearman((first * second).sum(axis=1) / np.maximum(norms, 1e-12), scores)


if __name__ == "__main__":
    main()
