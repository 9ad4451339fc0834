"""What happens beside the steps: the end, the progress line, text samples, the model directory."""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger

from full_stack_transformer.generation.sampling import SamplingParameters
from full_stack_transformer.generation.text_generator import GenerationOptions, TextGenerator
from full_stack_transformer.modelling.model_directory import OpenedModel, save_model_directory
from full_stack_transformer.tokenization import DocumentTokenizer
from full_stack_transformer.training import metric_names
from full_stack_transformer.training.data import Batch
from full_stack_transformer.training.tasks import CausalLanguageModelling

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_BETWEEN_REFRESHES = 0.5
_MAX_SAMPLE_TOKENS = 128


class EndWithValidation(pl.Callback):
    """Ends the training when its steps or minutes are over, with a validation.

    Lightning validates after a stop that was asked for, but not when it runs out of steps by itself.
    """

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Ask for the end after the last optimizer step."""
        assert isinstance(pl_module, CausalLanguageModelling)
        if pl_module.progress(trainer.global_step) >= 1.0:
            trainer.should_stop = True


class Progress(pl.Callback):
    """One calm line: step, loss, tokens per second, time left. Also writes the throughput curve."""

    def __init__(self, *, show: bool) -> None:
        self._on_terminal = show and sys.stderr.isatty()
        self._show = show
        self._num_tokens = 0
        self._started = self._shown = 0.0
        self._validation_started = 0.0
        self._width = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._started = self._shown = time.monotonic()
        self._num_tokens = 0

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        *_: Any,
    ) -> None:
        """Count, and now and then show."""
        self._num_tokens += int((batch["labels"] != -100).sum())
        now = time.monotonic()
        rate = self._num_tokens / max(now - self._started, 1e-9)
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log(metric_names.TOKENS_PER_SECOND, rate)
        interval = _SECONDS_BETWEEN_REFRESHES if self._on_terminal else _SECONDS_BETWEEN_LINES
        if self._show and trainer.is_global_zero and now - self._shown >= interval:
            self._shown = now
            self._write(self._line(trainer, pl_module, rate, now))

    def _line(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, rate: float, now: float
    ) -> str:
        assert isinstance(pl_module, CausalLanguageModelling)
        done = pl_module.progress(trainer.global_step)
        left = (now - self._started) * (1 - done) / max(done, 1e-6)
        loss = trainer.callback_metrics.get(metric_names.TRAIN_LOSS)
        return (
            f"step {trainer.global_step:,}  {done:4.0%}  loss {float(loss or 0):.3f}  "
            f"{rate:,.0f} tokens/s  {left // 60:.0f} min {left % 60:02.0f} s left"
        )

    def _write(self, line: str) -> None:
        if not self._on_terminal:
            logger.info(line)
            return
        padded = line.ljust(self._width)
        self._width = len(line)
        sys.stderr.write(f"\r{padded}")
        sys.stderr.flush()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the line to the log of the validation; its time does not count as training."""
        self._validation_started = time.monotonic()
        if self._on_terminal and self._width:
            sys.stderr.write("\n")
            self._width = 0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the clock back by the validation."""
        self._started += time.monotonic() - self._validation_started


class ExportModel(pl.Callback):
    """Puts the best model so far into the model directory, complete at every moment."""

    def __init__(
        self, target: Path, *, tokenizer_directory: Path, description: dict[str, Any]
    ) -> None:
        self._target = target
        self._tokenizer_directory = tokenizer_directory
        self._description = description
        self.best_loss = float("inf")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export when the validation loss has improved."""
        loss = float(trainer.callback_metrics[metric_names.VALID_LOSS])
        perplexity = float(trainer.callback_metrics[metric_names.VALID_PERPLEXITY])
        if not trainer.is_global_zero:
            return
        is_best = loss < self.best_loss
        logger.info(
            "step %s: validation loss %.4f, perplexity %.2f%s",
            f"{trainer.global_step:,}",
            loss,
            perplexity,
            ", the best so far" if is_best else "",
        )
        if is_best:
            self.best_loss = loss
            assert isinstance(pl_module, CausalLanguageModelling)
            save_model_directory(
                self._target,
                pl_module.backbone,
                tokenizer_directory=self._tokenizer_directory,
                description={
                    "task": "causal_lm",
                    "step": trainer.global_step,
                    "validation_loss": loss,
                    "validation_perplexity": perplexity,
                    **self._description,
                },
            )


class SampleTexts(pl.Callback):
    """Continues the empty document at each validation: into generated.jsonl, TensorBoard and the log."""

    def __init__(
        self, file: Path, tokenizer: DocumentTokenizer, *, num_samples: int, seed: int
    ) -> None:
        self._file = file
        self._tokenizer = tokenizer
        self._num_samples = num_samples
        self._seed = seed

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write samples of the model as it is now."""
        if not trainer.is_global_zero or self._num_samples == 0:
            return
        assert isinstance(pl_module, CausalLanguageModelling)
        model = OpenedModel("training", pl_module.backbone, self._tokenizer, {})
        options = GenerationOptions(
            max_new_tokens=_MAX_SAMPLE_TOKENS,
            sampling=SamplingParameters(temperature=0.7, top_p=0.95, repetition_penalty=1.1),
            seed=self._seed,
            over_length="clip",
        )
        generator = TextGenerator(model, num_slots=self._num_samples)
        texts = generator.generate("", options, num_return_sequences=self._num_samples)
        with self._file.open("a", encoding="utf-8") as file:
            for text in texts:
                line = {"step": trainer.global_step, "text": text}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        if isinstance(trainer.logger, TensorBoardLogger):
            for index, text in enumerate(texts):
                # Four spaces: Markdown shows it as it is.
                quoted = "\n".join(f"    {line}" for line in text.splitlines())
                trainer.logger.experiment.add_text(f"sample/{index}", quoted, trainer.global_step)
        logger.info("sample: %s", " ".join(texts[0].split())[:200])
