"""Masked language models as a LightningModule: guess the tokens that a collator has hidden."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.datasets.collators import IGNORED_LABEL
from full_stack_transformer.training import metric_names
from full_stack_transformer.training.callbacks.meter import perplexity
from full_stack_transformer.training.callbacks.profiling import FORWARD, LOSS
from full_stack_transformer.training.data.batches import Batch
from full_stack_transformer.training.module import TrainingModule


class MaskedLanguageModelling(TrainingModule):
    """Guess the hidden tokens."""

    def __init__(self, backbone: Backbone, arguments: TrainArguments) -> None:
        super().__init__(backbone, arguments)
        self._num_right = torch.zeros((), dtype=torch.float64)

    def mean_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The cross entropy, twice."""
        logits, labels = self._hidden(batch)
        with self.profiled(LOSS):
            loss = cross_entropy(logits.float(), labels, reduction="sum") / batch["num_targets"]
        return loss, loss.detach()

    def on_validation_epoch_start(self) -> None:
        """Forget the validation before."""
        super().on_validation_epoch_start()
        self._num_right.zero_()

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Add up cross entropies and right guesses of all hidden tokens."""
        logits, labels = self._hidden(batch)
        with self.profiled(LOSS):
            loss_sum = cross_entropy(logits.float(), labels, reduction="sum")
        self.add_validation_loss(loss_sum, len(labels))
        self._num_right += (logits.argmax(-1) == labels).sum().double().cpu()

    def validation_metrics(self, loss: float) -> dict[str, float]:
        """Accuracy of the guesses, and exp(loss)."""
        counts = torch.stack(
            [self._num_right, torch.tensor(float(self._valid_count), dtype=torch.float64)]
        )
        right, number = self.trainer.strategy.reduce(counts.to(self.device), reduce_op="sum").cpu()
        return {
            metric_names.ACCURACY: float(right / number.clamp(min=1)),
            metric_names.PERPLEXITY: perplexity(loss),
        }

    def _hidden(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (hidden, vocabulary) and tokens (hidden,) of the positions to be guessed."""
        with self.profiled(FORWARD):
            logits = self.backbone(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits
        is_hidden = batch["labels"] != IGNORED_LABEL
        return logits[is_hidden], batch["labels"][is_hidden]
