"""Learn what a larger model thinks of each next token: distillation from a teacher with the same tokenizer.

    (1 - w) cross entropy + w t^2 KL(teacher^(1/t) || student^(1/t))

Hinton et al. 2015 (arXiv 1503.02531, section 2). Trained on a dataset directory of documents or of
conversations, of which the answers are learned. Curves and validations show the cross entropy, which compares
with that of other trainings.

Legend: N targets of a batch, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.datasets.batches import Samples
from full_stack_transformer.datasets.collators import Batch
from full_stack_transformer.datasets.corpus import Corpus, DatasetDirectory
from full_stack_transformer.errors import ModelError, UsageError
from full_stack_transformer.modelling.acceleration import accelerate
from full_stack_transformer.modelling.pretrained import load_backbone
from full_stack_transformer.modelling.targets import is_predicting, logits_where
from full_stack_transformer.tasks.causal_lm import CausalLm
from full_stack_transformer.tasks.supervised_fine_tuning import (
    SupervisedFineTuning,
    SupervisedFineTuningOptions,
    targets_of,
)
from full_stack_transformer.tasks.task import TrainingDefaults
from full_stack_transformer.tokenization.document_tokenizer import (
    local_tokenizer,
    open_saved_tokenizer,
)

# Numbers of the logits of a part: 8 copies of 8 MB.
_NUMBERS_AT_ONCE = 1 << 21


@dataclass(frozen=True, kw_only=True)
class DistillationOptions(SupervisedFineTuningOptions):
    """Whom to learn from, and how much."""

    teacher: str | None = None
    teacher_weight: float = 0.5
    teacher_temperature: float = 1.0


class Distillation(SupervisedFineTuning):
    """See the module."""

    name = "distillation"
    options_class = DistillationOptions
    kinds = ("documents", "conversations")
    defaults = TrainingDefaults(adapter_learning_rate=2e-4, max_length=2048)

    def __init__(self, tokenizer: Any, options: Any) -> None:
        super().__init__(tokenizer, options)
        self._teacher: Backbone | None = None

    @classmethod
    def row_length(cls, dataset: DatasetDirectory, options: Any) -> int:
        """That of the kind of samples."""
        if dataset.kind == "documents":
            return CausalLm.row_length(dataset, options)
        return super().row_length(dataset, options)

    def samples(self, corpus: Corpus) -> Samples:
        """Documents, or conversations that end after an answer."""
        return corpus if self.dataset.kind == "documents" else super().samples(corpus)

    def read_dataset(self, dataset: DatasetDirectory) -> None:
        """Open the teacher too.

        Raises:
            UsageError: there is none.
            ModelError: it has another vocabulary.
        """
        super().read_dataset(dataset)
        path = self.options.teacher
        if path is None:
            raise UsageError(f"--task {self.name} needs --teacher with the model to learn from")
        theirs = open_saved_tokenizer(local_tokenizer(path))
        if theirs.backend.get_vocab() != self.tokenizer.backend.get_vocab():
            raise ModelError(
                f"--teacher {path} has another tokenizer ({theirs.vocab_size:,} tokens) than the dataset "
                f"({self.tokenizer.vocab_size:,}), so that their predictions do not compare; choose a "
                "teacher of the same family, or prepare the dataset with its tokenizer"
            )
        teacher = load_backbone(path, dtype=torch.float32)
        accelerate(teacher)
        self._teacher = teacher.eval().requires_grad_(False)

    def training_losses(self, scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the options say; and the cross entropy alone."""
        cross_entropy, added = super().training_losses(scores, batch)
        weight = self.options.teacher_weight
        divergence = divergence_sum(
            scores, self._teacher_logits(batch), self.options.teacher_temperature
        )
        divergence = divergence * (targets_of(batch) >= 0).any()
        return (1 - weight) * cross_entropy + weight * divergence, added

    @torch.no_grad()
    def _teacher_logits(self, batch: Batch) -> Tensor:
        assert self._teacher is not None, "read_dataset comes first"
        return logits_where(
            self._teacher.to(batch["labels"].device),
            is_predicting(batch["labels"]),
            input_ids=batch["input_ids"],
            position_ids=batch.get("position_ids"),
        )


def divergence_sum(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """t^2 KL(teacher || student), summed over targets, in fp32.

    Args:
        logits: (1, N, V).
        teacher_logits: (1, N, V or more): a vocabulary may be filled up to a round number.
        temperature: t, by which both are divided.
    """
    num_ids = min(logits.shape[2], teacher_logits.shape[2])
    size = max(1, _NUMBERS_AT_ONCE // num_ids)
    total = logits.new_zeros((), dtype=torch.float32)
    for start in range(0, logits.shape[1], size):
        parts = (one[0, start : start + size, :num_ids] for one in (logits, teacher_logits))
        ours, theirs = ((part.float() / temperature).log_softmax(-1) for part in parts)
        total = total + (theirs.exp() * (theirs - ours)).sum()
    return total * temperature**2
