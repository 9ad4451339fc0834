"""How well a causal language model predicts samples: loss, perplexity, bits per byte."""

import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.datasets.batches import SortedBatches
from full_stack_transformer.datasets.collators import PaddedCollator
from full_stack_transformer.datasets.corpus import Corpus
from full_stack_transformer.datasets.text_bytes import num_target_bytes
from full_stack_transformer.modelling.losses import next_token_loss
from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer


@dataclass(frozen=True)
class Perplexity:
    """Figures over all targets of all samples, whatever the batch size."""

    loss: float
    """Mean cross entropy per token, in nats."""
    perplexity: float
    """exp(loss); comparable between models of one tokenizer only."""
    bits_per_byte: float
    """Bits per byte of UTF-8 text; comparable between tokenizers."""
    num_samples: int
    num_target_tokens: int
    num_target_bytes: int


@torch.inference_mode()
def measure_perplexity(
    backbone: Backbone, tokenizer: DocumentTokenizer, corpus: Corpus, *, batch_size: int
) -> Perplexity:
    """Predict every token of every sample but its first from those before it.

    Args:
        backbone: in evaluation mode.
        tokenizer: the one that the corpus was made with.
        corpus: samples of token ids.
        batch_size: samples in a batch.
    """
    device = next(backbone.parameters()).device
    plan = SortedBatches(corpus, batch_size=batch_size)
    collate = PaddedCollator(corpus, pad_id=tokenizer.pad_id)
    loss_sum, num_targets, num_bytes = 0.0, 0, 0
    for position in range(plan.num_batches_per_epoch):
        spans = plan.batch(0, position)
        batch = collate(spans)
        logits = backbone(input_ids=batch["input_ids"].to(device), use_cache=False).logits
        loss, count = next_token_loss(logits.float(), batch["labels"].to(device))
        loss_sum += float(loss)
        num_targets += int(count)
        rows = zip(batch["input_ids"].tolist(), spans.lengths.tolist(), strict=True)
        num_bytes += num_target_bytes((row[:length] for row, length in rows), tokenizer)
    mean = loss_sum / max(1, num_targets)
    return Perplexity(
        loss=mean,
        perplexity=math.exp(min(mean, 700.0)),
        bits_per_byte=loss_sum / math.log(2) / max(1, num_bytes),
        num_samples=len(corpus),
        num_target_tokens=num_targets,
        num_target_bytes=num_bytes,
    )
