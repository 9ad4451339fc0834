"""Answer as the assistant of conversations does: the next tokens of its answers are learned.

Trained on a dataset directory of conversations, mostly from a pretrained model. What is saved is a causal
model that answers.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.datasets.batches import Samples
from full_stack_transformer.datasets.collators import Batch, Collator, PaddedCollator
from full_stack_transformer.datasets.conversations import Conversations
from full_stack_transformer.datasets.corpus import Corpus, DatasetDirectory, Kind
from full_stack_transformer.modelling.losses import LossOptions, next_tokens, target_loss
from full_stack_transformer.modelling.targets import is_predicting, logits_where
from full_stack_transformer.tasks.causal_lm import CausalLm
from full_stack_transformer.tasks.task import CorpusTask, TaskOptions, TrainingDefaults

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SupervisedFineTuningOptions(TaskOptions):
    """What is learned of a conversation, and what is added to the cross entropy."""

    train_on: Literal["answers", "all"] = "answers"
    label_smoothing: float = 0.0
    z_loss: float = 0.0


class SupervisedFineTuning(CausalLm):
    """See the module."""

    name = "supervised_fine_tuning"
    saved_as = CausalLm.name
    options_class = SupervisedFineTuningOptions
    batchings = ("length", "packed")
    kinds: ClassVar[tuple[Kind, ...]] = ("conversations",)
    # Full: TRL's. Adapters: ten times as much, as Schulman et al. 2025 ("LoRA Without Regret") found.
    defaults = TrainingDefaults(
        learning_rate=2e-5,
        adapter_learning_rate=2e-4,
        num_warmup_steps=10,
        max_epochs=3,
        max_length=2048,
    )

    @classmethod
    def row_length(cls, dataset: DatasetDirectory, options: Any) -> int:
        """--max_length, or less where the dataset says so or all conversations are shorter."""
        return sample_limit(dataset, options)

    def samples(self, corpus: Corpus) -> Samples:
        """Conversations that end after an answer."""
        if corpus.directory not in self._samples:  # read once: a plan is made several times
            found = Conversations(corpus, self.row_length(self.dataset, self.options))
            if left_out := str(found.left_out):
                logger.warning("%s: %s", corpus.directory.name, left_out)
            self._samples[corpus.directory] = found
        found = self._samples[corpus.directory]
        return _WholeConversations(found) if self.options.train_on == "all" else found

    @cached_property
    def _samples(self) -> dict[Path, Conversations]:
        return {}

    def learned(self, corpus: Corpus) -> Corpus:
        """Answers, or everything."""
        return corpus.learning_all() if self.options.train_on == "all" else corpus

    def collator(self, corpus: Corpus, *, seed: int) -> Collator:
        """A conversation a row."""
        pad_id = self.dataset.description["special_token_ids"]["pad"]
        return PaddedCollator(self.learned(corpus), pad_id=pad_id)

    def forward(self, backbone: Backbone, batch: Batch) -> Tensor:
        """Logits (1, targets, vocabulary) at the positions before the tokens that are learned."""
        return logits_where(
            backbone,
            is_predicting(batch["labels"]),
            input_ids=batch["input_ids"],
            position_ids=batch.get("position_ids"),
        )

    def loss_sum(self, scores: Tensor, batch: Batch) -> Tensor:
        """Cross entropy of the learned tokens, in nats."""
        return target_loss(scores, targets_of(batch))[0]

    def training_losses(self, scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The cross entropy with what the options add to it; and the cross entropy alone."""
        options = LossOptions(
            label_smoothing=self.options.label_smoothing, z_loss=self.options.z_loss
        )
        return target_loss(scores, targets_of(batch), options)

    def validation_sums(self, scores: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Cross entropy and number of the learned tokens."""
        return CorpusTask.validation_sums(self, scores, batch)

    def validation_metrics(self, loss: float, sums: Mapping[str, float]) -> dict[str, float]:
        """Perplexity of the learned tokens."""
        return CorpusTask.validation_metrics(self, loss, sums)

    def evaluation(self, loss: float, sums: Mapping[str, float]) -> dict[str, Any]:
        """The same of all validation samples."""
        return CorpusTask.evaluation(self, loss, sums)


def sample_limit(dataset: DatasetDirectory, options: Any) -> int:
    """Tokens of the longest sample to learn from: the least of three limits."""
    longest = max(int(one.lengths().max(initial=1)) for one in (dataset.train, dataset.valid))
    limits = (dataset.description["max_sample_length"], options.max_length)
    return min(longest, *map(int, limits))


def targets_of(batch: Batch) -> Tensor:
    """(1, targets) in the order of `logits_where`."""
    labels = batch["labels"]
    return next_tokens(labels)[is_predicting(labels)][None]


class _WholeConversations:
    """Conversations of which all tokens but the first are learned."""

    def __init__(self, conversations: Conversations) -> None:
        self._conversations = conversations
        self.num_tokens = conversations.num_tokens
        self.spans = conversations.spans
        self.layout = conversations.layout

    def __len__(self) -> int:
        return len(self._conversations)

    def num_targets(
        self, starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """All but the first of each."""
        return lengths - 1
