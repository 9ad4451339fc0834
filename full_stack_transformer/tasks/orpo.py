"""Odds ratio preference optimization: learn the chosen answer, and make it more likely than the rejected one.

    -log p(chosen) - beta log sigmoid(log odds(chosen) - log odds(rejected)),   odds(y) = P / (1 - P)

P is the geometric mean of the probabilities of an answer's tokens: Hong et al. 2024 (arXiv 2403.07691,
equations 4 and 6). Needs no reference. As in TRL the first term is the mean over the tokens of a batch; there
it has those of the prompt too, here with --train_on all.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.datasets.batches import BatchSpans
from full_stack_transformer.datasets.collators import Batch, Collator
from full_stack_transformer.datasets.conversations import PairCollator
from full_stack_transformer.datasets.corpus import Corpus
from full_stack_transformer.modelling.targets import log_likelihoods
from full_stack_transformer.tasks.preferences import (
    PreferenceOptions,
    PreferenceTask,
    is_pair,
    num_answer_tokens,
)
from full_stack_transformer.tasks.task import TrainingDefaults
from full_stack_transformer.tasks.together import summed

# exp(-1e-6) is the largest mean probability whose odds are still exact in fp32.
_MAX_LOG = -1e-6


@dataclass(frozen=True, kw_only=True)
class OrpoOptions(PreferenceOptions):
    """And what is learned of a chosen conversation."""

    train_on: Literal["answers", "all"] = "answers"


class Orpo(PreferenceTask):
    """See the module."""

    name = "orpo"
    options_class = OrpoOptions
    # The paper's rate for full training.
    defaults = TrainingDefaults(
        learning_rate=8e-6,
        adapter_learning_rate=8e-5,
        num_warmup_steps=10,
        max_epochs=1,
        max_length=2048,
    )

    def collator(self, corpus: Corpus, *, seed: int) -> Collator:
        """With `all_labels` where the whole conversation is learned."""
        answers = super().collator(corpus, seed=seed)
        if self.options.train_on == "answers":
            return answers
        pad_id = self.dataset.description["special_token_ids"]["pad"]
        whole = PairCollator(corpus.learning_all(), pad_id=pad_id)

        def collate(spans: BatchSpans) -> Batch:
            return {**answers(spans), "all_labels": whole(spans)["labels"]}

        return collate

    def forward(self, backbone: Backbone, batch: Batch) -> Tensor:
        """Log-likelihoods (P, 3) of the chosen and the rejected answer, and of what is learned."""
        if "all_labels" not in batch:
            answers = super().forward(backbone, batch)
            return torch.cat([answers, answers[:, :1]], dim=1)
        found = log_likelihoods(
            backbone, batch["input_ids"], batch["labels"], batch["all_labels"]
        ).view(2, -1, 2)
        return torch.stack([found[0, :, 0], found[1, :, 0], found[0, :, 1]], dim=1)

    def losses(self, scores: Tensor, batch: Batch) -> Tensor:
        """(P,) in nats; of what is learned each has its part of the mean over tokens."""
        learned = batch.get("all_labels", batch["labels"])[: len(scores)]
        is_counted = is_pair(batch) * ("is_filler" not in batch)
        counts = torch.stack([(num_answer_tokens(learned) * is_counted).sum(), is_counted.sum()])
        if self.num_processes > 1:
            counts = summed(counts)
        num_learned, num_pairs = counts[0].clamp(min=1), counts[1]
        likelihood = scores[:, 2] * num_pairs / num_learned
        odds: Tensor = self.options.preference_beta * logsigmoid(self.margins(scores, batch))
        return -likelihood - odds

    def margins(self, scores: Tensor, batch: Batch) -> Tensor:
        """(P,) log of the ratio of the odds."""
        num_tokens = num_answer_tokens(batch["labels"]).view(2, -1).T
        means = (scores[:, :2] / num_tokens).clamp(max=_MAX_LOG)
        odds = means - torch.log(-torch.expm1(means))
        return odds[:, 0] - odds[:, 1]
