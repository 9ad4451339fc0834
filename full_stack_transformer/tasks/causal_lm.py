"""Predict the next token of a text.

Trained on a dataset directory; a model of this task generates, and is served by the engine.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.datasets.collators import Batch
from full_stack_transformer.datasets.corpus import Corpus, DatasetDirectory
from full_stack_transformer.modelling.acceleration import accelerate
from full_stack_transformer.modelling.losses import (
    LossOptions,
    language_model_loss,
    next_token_loss,
)
from full_stack_transformer.modelling.model_card import TaskWords
from full_stack_transformer.modelling.model_files import CAUSAL_HEADS
from full_stack_transformer.tasks.task import CorpusTask, TaskOptions, TrainingDefaults
from full_stack_transformer.tokenization.document_tokenizer import (
    DocumentTokenizer,
    open_saved_tokenizer,
)

# Decoded in 0.4 s. A larger corpus is measured on evenly spread samples.
_MAX_MEASURED_TOKENS = 2_000_000
_SAMPLES_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class CausalLmOptions(TaskOptions):
    """What is added to the cross entropy."""

    unlikelihood_alpha: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0


class CausalLm(CorpusTask):
    """See the module."""

    name = "causal_lm"
    model_class = AutoModelForCausalLM
    heads = CAUSAL_HEADS
    options_class: ClassVar[type[TaskOptions]] = CausalLmOptions
    generates = True
    batchings: ClassVar[tuple[str, ...]] = ("length", "packed", "concatenated")
    replays = True
    card = TaskWords()
    defaults = TrainingDefaults(adapter_learning_rate=2e-4)
    tokenizer: DocumentTokenizer

    @classmethod
    def open_tokenizer(cls, directory: Path) -> DocumentTokenizer:
        """The one that prepared the dataset."""
        return open_saved_tokenizer(directory)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    def prepare_backbone(self, backbone: Backbone) -> None:
        """Faster attention and activation, with the same results."""
        accelerate(backbone)

    def read_dataset(self, dataset: DatasetDirectory) -> None:
        """Refuse a dataset of another vocabulary."""
        theirs = open_saved_tokenizer(dataset.tokenizer_directory)
        if theirs.backend.get_vocab() != self.tokenizer.backend.get_vocab():
            raise self.other_vocabulary(dataset, theirs.vocab_size)
        super().read_dataset(dataset)

    def forward(self, backbone: Backbone, batch: Batch) -> Tensor:
        """Logits (B, T, vocabulary).

        Positions that start again at 0 keep the documents of a packed row apart, as long as there is
        neither a mask nor a cache.
        """
        output = backbone(
            input_ids=batch["input_ids"], position_ids=batch.get("position_ids"), use_cache=False
        )
        logits: Tensor = output.logits
        return logits

    def loss_sum(self, scores: Tensor, batch: Batch) -> Tensor:
        """Cross entropy of the next tokens, in nats."""
        return next_token_loss(scores, batch["labels"])[0]

    def training_losses(self, scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The cross entropy with what the options add to it; and the cross entropy alone."""
        loss_sum, cross_entropy_sum, _ = language_model_loss(
            scores,
            batch["labels"],
            batch["input_ids"],
            self._loss_options,
            batch.get("document_ids"),
        )
        return loss_sum, cross_entropy_sum

    def validation_sums(self, scores: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Cross entropy and number of the next tokens."""
        loss_sum, num_targets = next_token_loss(scores, batch["labels"])
        return {"loss": loss_sum, "targets": num_targets}

    def validation_metrics(self, loss: float, sums: Mapping[str, float]) -> dict[str, float]:
        """Perplexity, and bits per byte of text by the mean bytes of a target."""
        metrics = super().validation_metrics(loss, sums)
        return {**metrics, "bits_per_byte": bits_per_byte(loss, self.bytes_per_target)}

    def evaluation(self, loss: float, sums: Mapping[str, float]) -> dict[str, Any]:
        """The same over the exact bytes of the validation samples."""
        corpus = self.dataset.valid
        samples = (corpus[index].tolist() for index in range(len(corpus)))
        num_bytes = num_target_bytes(samples, self.tokenizer)
        return {
            "loss": loss,
            **super().validation_metrics(loss, sums),
            "bits_per_byte": sums["loss"] / math.log(2) / max(1, num_bytes),
            "num_samples": len(corpus),
            "num_target_tokens": int(sums["targets"]),
            "num_target_bytes": num_bytes,
        }

    @cached_property
    def bytes_per_target(self) -> float:
        """Mean bytes of text of a target of the validation samples."""
        return bytes_per_target(self.dataset.valid, self.tokenizer)

    @cached_property
    def _loss_options(self) -> LossOptions:
        options = self.options
        return LossOptions(
            unlikelihood_alpha=options.unlikelihood_alpha,
            label_smoothing=options.label_smoothing,
            z_loss=options.z_loss,
        )


def num_target_bytes(samples: Iterable[Sequence[int]], tokenizer: DocumentTokenizer) -> int:
    """UTF-8 bytes of the decoded targets of `samples`: all tokens but the first of each."""
    return sum(len(tokenizer.decode(sample[1:]).encode()) for sample in samples)


def bytes_per_target(
    corpus: Corpus, tokenizer: DocumentTokenizer, *, max_tokens: int = _MAX_MEASURED_TOKENS
) -> float:
    """Mean bytes of a target, over all samples, or over some of a corpus of more than `max_tokens`."""
    stride = max(1, math.ceil(len(corpus.tokens) / max_tokens))
    chosen = range(0, len(corpus), stride)
    num_bytes = num_targets = 0
    for first in range(0, len(chosen), _SAMPLES_AT_ONCE):
        samples = corpus.gather(chosen[first : first + _SAMPLES_AT_ONCE])
        num_bytes += num_target_bytes((sample.tolist() for sample in samples), tokenizer)
        num_targets += sum(len(sample) - 1 for sample in samples)
    return num_bytes / max(1, num_targets)


def bits_per_byte(loss: float, bytes_of_target: float) -> float:
    """Bits per byte of text, from the mean loss per target in nats."""
    return loss / math.log(2) / max(bytes_of_target, 1e-9)
