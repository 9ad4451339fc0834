"""What tasks on pairs of a preferred and a rejected answer share: batches, log-likelihoods, metrics.

    pairs ──> chosen and rejected rows ──forward──> log-likelihood of each answer ──loss──> what is minimized

Legend: P pairs, T tokens.
"""

import logging
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.datasets.batches import Samples
from full_stack_transformer.datasets.collators import Batch, Collator
from full_stack_transformer.datasets.conversations import PairCollator, PreferencePairs
from full_stack_transformer.datasets.corpus import Corpus, DatasetDirectory
from full_stack_transformer.modelling.targets import log_likelihoods
from full_stack_transformer.tasks.causal_lm import CausalLm
from full_stack_transformer.tasks.supervised_fine_tuning import sample_limit
from full_stack_transformer.tasks.task import CorpusTask, TaskOptions
from full_stack_transformer.tokenization.document_tokenizer import IGNORED_LABEL

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PreferenceOptions(TaskOptions):
    """How much a preference counts."""

    preference_beta: float = 0.1


class PreferenceTask(CausalLm):
    """A task on a dataset directory of preferences; the mean of the loss is over pairs."""

    saved_as = CausalLm.name
    options_class: ClassVar[type[TaskOptions]] = PreferenceOptions
    batchings = ("length",)
    replays = False
    kinds = ("preferences",)

    @classmethod
    def row_length(cls, dataset: DatasetDirectory, options: Any) -> int:
        """--max_length, or less where the dataset says so or all samples are shorter."""
        return sample_limit(dataset, options)

    def samples(self, corpus: Corpus) -> Samples:
        """Pairs, both of which fit."""
        found = PreferencePairs(corpus, self.row_length(self.dataset, self.options))
        if found.num_left_out and corpus.directory not in self._told:
            self._told.add(corpus.directory)
            logger.warning(
                "%s: %s pairs have an answer that does not fit, and are left out",
                *(corpus.directory.name, f"{found.num_left_out:,}"),
            )
        return found

    @cached_property
    def _told(self) -> set[Path]:
        return set()

    def collator(self, corpus: Corpus, *, seed: int) -> Collator:
        """The chosen samples, then the rejected ones."""
        pad_id = self.dataset.description["special_token_ids"]["pad"]
        return PairCollator(corpus, pad_id=pad_id)

    def forward(self, backbone: Backbone, batch: Batch) -> Tensor:
        """Log-likelihoods (P, 2) of the chosen and the rejected answer."""
        found = log_likelihoods(backbone, batch["input_ids"], batch["labels"])
        return found.view(2, -1).T

    @abstractmethod
    def losses(self, scores: Tensor, batch: Batch) -> Tensor:
        """(P,) of each pair."""

    @abstractmethod
    def margins(self, scores: Tensor, batch: Batch) -> Tensor:
        """(P,) by how much the chosen answer is liked better."""

    def loss_sum(self, scores: Tensor, batch: Batch) -> Tensor:
        """Summed over the pairs, without a filler."""
        return (self.losses(scores, batch) * is_pair(batch)).sum()

    def training_losses(self, scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss, which curves show too."""
        loss_sum = self.loss_sum(scores, batch)
        return loss_sum, loss_sum

    def validation_sums(self, scores: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The loss, the pairs, and how many of them are ordered as they should be."""
        pairs, margins = is_pair(batch), self.margins(scores, batch)
        return {
            "loss": self.loss_sum(scores, batch),
            "targets": pairs.sum(),
            "right": (pairs & (margins > 0)).sum(),
            "margins": (margins * pairs).sum(),
        }

    def validation_metrics(self, loss: float, sums: Mapping[str, float]) -> dict[str, float]:
        """The part of the pairs whose chosen answer is liked better than before, and by how much."""
        num_pairs = max(1.0, sums["targets"])
        return {"accuracy": sums["right"] / num_pairs, "margin": sums["margins"] / num_pairs}

    def evaluation(self, loss: float, sums: Mapping[str, float]) -> dict[str, Any]:
        """The same of all validation samples."""
        return CorpusTask.evaluation(self, loss, sums)


def num_answer_tokens(labels: Tensor) -> Tensor:
    """(rows,) learned tokens of each; at least 1."""
    return (labels[:, 1:] != IGNORED_LABEL).sum(dim=1).clamp(min=1)


def is_pair(batch: Batch) -> Tensor:
    """(P,) bool: False for what fills up a batch of a process that has no pair left."""
    has_answer = (batch["labels"] != IGNORED_LABEL).any(dim=1)
    return has_answer[: len(has_answer) // 2]
