"""Direct preference optimization: like the chosen answer better than the model at the start does.

    -log sigmoid(beta ((log p(chosen) - log r(chosen)) - (log p(rejected) - log r(rejected))))

Rafailov et al. 2023 (arXiv 2305.18290, equation 7). The reference r is the model at the start: a copy of it,
or with an adapter the model without the adapter. Without a reference r is 1.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PretrainedConfig
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.datasets.collators import Batch
from full_stack_transformer.modelling.adapters import has_adapter, without_adapter
from full_stack_transformer.modelling.targets import log_likelihoods
from full_stack_transformer.tasks.preferences import PreferenceOptions, PreferenceTask
from full_stack_transformer.tasks.task import TrainingDefaults


@dataclass(frozen=True, kw_only=True)
class DpoOptions(PreferenceOptions):
    """And against what."""

    reference: Literal["start", "none"] = "start"


class Dpo(PreferenceTask):
    """See the module."""

    name = "dpo"
    options_class = DpoOptions
    # The rates of TRL.
    defaults = TrainingDefaults(
        learning_rate=1e-6,
        adapter_learning_rate=1e-5,
        num_warmup_steps=10,
        max_epochs=1,
        max_length=2048,
    )

    def __init__(self, tokenizer: Any, options: Any) -> None:
        super().__init__(tokenizer, options)
        self._reference: Backbone | None = None

    @classmethod
    def open(cls, config: PretrainedConfig, tokenizer: Any, options: Any) -> Self:
        """A saved model does not know its start."""
        return cls(tokenizer, replace(options, reference="none"))

    def prepare_backbone(self, backbone: Backbone) -> None:
        """Keep the start, before anything is learned."""
        super().prepare_backbone(backbone)
        if self.options.reference == "start" and not has_adapter(backbone):
            self._reference = copy.deepcopy(backbone).eval().requires_grad_(False)

    def forward(self, backbone: Backbone, batch: Batch) -> Tensor:
        """Log-likelihoods (P, 4) of the chosen and the rejected answer, then those of the reference."""
        reference = torch.zeros_like(batch["labels"][:, 0], dtype=torch.float32)
        if self.options.reference == "start":
            with self._at_start(backbone, batch["labels"].device) as start, torch.no_grad():
                reference = log_likelihoods(start, batch["input_ids"], batch["labels"])
        ours = super().forward(backbone, batch)
        return torch.cat([ours, reference.view(2, -1).T.to(ours)], dim=1)

    @contextmanager
    def _at_start(self, backbone: Backbone, device: torch.device) -> Iterator[Backbone]:
        """The model at the start, without dropout and noise."""
        if self._reference is not None:
            self._reference.to(device)
            yield self._reference
            return
        was_training = backbone.training
        backbone.eval()
        try:
            with without_adapter(backbone):
                yield backbone
        finally:
            backbone.train(was_training)

    def losses(self, scores: Tensor, batch: Batch) -> Tensor:
        """(P,) in nats."""
        return -logsigmoid(self.margins(scores, batch))

    def margins(self, scores: Tensor, batch: Batch) -> Tensor:
        """(P,) difference of the two rewards."""
        chosen, rejected, start_chosen, start_rejected = scores.unbind(dim=1)
        ratio = (chosen - start_chosen) - (rejected - start_rejected)
        margins: Tensor = self.options.preference_beta * ratio
        return margins
