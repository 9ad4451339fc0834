"""Language models as LightningModules: what a step computes, readable from top to bottom."""

from torch import Tensor
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.datasets.text_bytes import bits_per_byte
from full_stack_transformer.modelling.acceleration import accelerate
from full_stack_transformer.modelling.losses import (
    LossOptions,
    language_model_loss,
    next_token_loss,
)
from full_stack_transformer.training import metric_names
from full_stack_transformer.training.callbacks.meter import perplexity
from full_stack_transformer.training.callbacks.profiling import FORWARD, LOSS
from full_stack_transformer.training.data.batches import Batch
from full_stack_transformer.training.module import TrainingModule


class CausalLanguageModelling(TrainingModule):
    """Predict the next token.

    Args:
        backbone: a causal language model.
        arguments: the options of the training.
        bytes_per_target: mean bytes of text of a target of the validation samples.
    """

    def __init__(
        self, backbone: Backbone, arguments: TrainArguments, *, bytes_per_target: float = 1.0
    ) -> None:
        super().__init__(backbone, arguments)
        accelerate(backbone)
        self._bytes_per_target = bytes_per_target
        self._loss_options = LossOptions(
            unlikelihood_alpha=arguments.unlikelihood_alpha,
            label_smoothing=arguments.label_smoothing,
            z_loss=arguments.z_loss,
        )

    def mean_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss and its cross entropy alone, in nats."""
        logits = self._logits(batch)
        with self.profiled(LOSS):
            loss_sum, cross_entropy_sum, _ = language_model_loss(
                logits,
                batch["labels"],
                batch["input_ids"],
                self._loss_options,
                batch.get("document_ids"),
            )
        num_targets = batch["num_targets"]
        return loss_sum / num_targets, cross_entropy_sum.detach() / num_targets

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Add up the cross entropies of all targets."""
        logits = self._logits(batch)
        with self.profiled(LOSS):
            loss_sum, num_targets = next_token_loss(logits, batch["labels"])
        self.add_validation_loss(loss_sum, int(num_targets))

    def validation_metrics(self, loss: float) -> dict[str, float]:
        """What follows from the loss."""
        return {
            metric_names.PERPLEXITY: perplexity(loss),
            metric_names.BITS_PER_BYTE: bits_per_byte(loss, self._bytes_per_target),
        }

    def _logits(self, batch: Batch) -> Tensor:
        with self.profiled(FORWARD):
            # Positions that start again at 0 keep the documents of a packed row apart, as long as there
            # is neither a mask nor a cache.
            output = self.backbone(
                input_ids=batch["input_ids"],
                position_ids=batch.get("position_ids"),
                use_cache=False,
            )
        logits: Tensor = output.logits
        return logits
