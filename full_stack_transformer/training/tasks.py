"""One LightningModule per task: what a step computes, readable from top to bottom."""

import math
import time

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.arguments import TrainArguments
from full_stack_transformer.errors import TrainingError
from full_stack_transformer.modelling.losses import next_token_loss
from full_stack_transformer.training import metric_names
from full_stack_transformer.training.data import Batch
from full_stack_transformer.training.optimization import make_optimizer, make_schedule


class CausalLanguageModelling(pl.LightningModule):
    """Predict the next token."""

    def __init__(self, backbone: Backbone, arguments: TrainArguments) -> None:
        super().__init__()
        self.backbone = backbone
        # from_pretrained hands out evaluation mode, and Lightning keeps it.
        self.backbone.train()
        self._arguments = arguments
        self._started = time.monotonic()
        self._valid_sum = torch.zeros((), dtype=torch.float64)
        self._valid_count = 0

    def on_fit_start(self) -> None:
        """The clock of --max_minutes starts with the first step, not with the imports."""
        self._started = time.monotonic()

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Mean cross entropy of the targets of the batch, in nats."""
        loss_sum, num_targets = self._loss(batch)
        loss = loss_sum / num_targets.clamp(min=1)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss became {loss.item()} at step {self.global_step}; the model of the last validation "
                "is intact, lower --learning_rate or use --precision 32"
            )
        self.log(metric_names.TRAIN_LOSS, loss, prog_bar=True)
        self.log(metric_names.TRAIN_PERPLEXITY, loss.detach().exp())
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget the sums of the validation before."""
        self._valid_sum.zero_()
        self._valid_count = 0

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Add up the cross entropies of all targets: independent of the batch size."""
        loss_sum, num_targets = self._loss(batch)
        self._valid_sum += loss_sum.double().cpu()
        self._valid_count += int(num_targets)

    def on_validation_epoch_end(self) -> None:
        """Log the mean over all targets of all processes."""
        totals = torch.tensor([self._valid_sum.item(), self._valid_count], dtype=torch.float64)
        totals = self.trainer.strategy.reduce(totals.to(self.device), reduce_op="sum").cpu()
        loss = totals[0] / totals[1].clamp(min=1)
        self.log(metric_names.VALID_LOSS, loss.float(), rank_zero_only=False)
        self.log(metric_names.VALID_PERPLEXITY, loss.exp().float(), rank_zero_only=False)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer and the cosine schedule, stepped with every optimizer step."""
        options = self._arguments
        optimizer = make_optimizer(
            self,
            name=options.optimizer,
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
        )
        schedule = make_schedule(
            optimizer,
            self.progress,
            num_warmup_steps=options.num_warmup_steps,
            num_cycles=options.num_cycles,
            min_ratio=options.min_learning_rate_ratio,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm of the whole gradient; log it, and the rate that this step takes.

        Lightning's own refuses a fused optimizer with bf16 (Lightning issue #21435).
        """
        limit = self._arguments.gradient_clip_val or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), limit)
        self.log(metric_names.GRADIENT_NORM, norm)
        # AdamW's, which is what --learning_rate means; with Muon its own comes first.
        self.log(metric_names.LEARNING_RATE, optimizer.param_groups[-1]["lr"])

    def progress(self, step: int) -> float:
        """Part of the training that is over after `step` optimizer steps, 0 to 1; by steps or minutes."""
        total_steps = self.trainer.estimated_stepping_batches
        by_steps = step / total_steps if total_steps > 0 else 0.0
        by_time = 0.0
        if self._arguments.max_minutes is not None:
            by_time = (time.monotonic() - self._started) / (60 * self._arguments.max_minutes)
        return min(1.0, max(by_steps, by_time))

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        output = self.backbone(input_ids=batch["input_ids"], use_cache=False)
        return next_token_loss(output.logits, batch["labels"])
