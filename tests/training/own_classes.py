"""A data set, a model and a task of one's own, as `fst run_experiment` finds them by dotted path."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from full_stack_transformer.tasks.sequence_classification import SequenceClassification
from full_stack_transformer.training.data.rows import BaseDataModule
from tests.tasks.small_tasks import small_rows


class OwnRows(BaseDataModule):
    """Sentences on animals and plants; the splits are made by a hash."""

    def all_rows(self) -> Iterable[dict[str, Any]]:
        """Made here."""
        return small_rows("sequence_classification", 100)


class OwnTask(SequenceClassification):
    """The same task, that reads texts backwards."""

    def encode_pair(self, text: str, text_pair: str | None) -> dict[str, Any]:
        """Words from the last to the first."""
        return super().encode_pair(" ".join(reversed(text.split())), text_pair)


class BagOfTokensConfig(PretrainedConfig):
    """A table of vectors."""

    model_type = "bag_of_tokens"

    def __init__(self, hidden_size: int = 16, vocab_size: int = 300, **fields: Any) -> None:
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.num_hidden_layers = self.num_attention_heads = 1
        super().__init__(**fields)


class BagOfTokensForSequenceClassification(PreTrainedModel):
    """The mean of the tokens' vectors, and a linear layer."""

    config_class = BagOfTokensConfig
    base_model_prefix = "bag"

    def __init__(self, config: BagOfTokensConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The table."""
        return self.embeddings

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        """Logits (B, L)."""
        weights = attention_mask[..., None].to(torch.float32)
        mean = (self.embeddings(input_ids) * weights).sum(1) / weights.sum(1)
        return SequenceClassifierOutput(logits=self.classifier(mean))
