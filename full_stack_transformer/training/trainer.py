"""A training from a notebook, with the verbs of the Hugging Face Trainer; each is a few words of Lightning's.

trainer = Trainer(TrainArguments(task="my_module.MyTask", dataset_dir=Path("rows")))
trainer.add_callback(MyLightningCallback())
trainer.train()
trainer.evaluate()
trainer.predict([{"text": "a new text"}])
trainer.save_model(Path("my_model"))
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
from torch import Tensor

from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.datasets.collators import Batch
from full_stack_transformer.errors import UsageError
from full_stack_transformer.modelling.model_files import find_model_directory
from full_stack_transformer.own_classes import trust
from full_stack_transformer.processes import is_main_process
from full_stack_transformer.rows.fields import Row
from full_stack_transformer.rows.splits import Split
from full_stack_transformer.storage import make_directories, replace_directory, write_json
from full_stack_transformer.tasks.opening import OpenedTask, open_task
from full_stack_transformer.tasks.task import Prediction, RowTask
from full_stack_transformer.training.data.batches import BatchLoader, ValidationLoader
from full_stack_transformer.training.data.rows import BaseDataModule
from full_stack_transformer.training.experiments import with_found_run, with_saved_options
from full_stack_transformer.training.module import TrainingModule
from full_stack_transformer.training.run import train_setup
from full_stack_transformer.training.setup import TrainingSetup, open_setup, rows_setup


class Trainer:
    """One training; the verbs but `train` need labelled rows.

    Args:
        arguments: the options of `fst train`, or of `fst run_experiment` for classes of one's own.
        data: a data module that is there already; without it the options name the rows.
        task_class: with `data`: what is learned.
        callbacks: of Lightning.
    """

    def __init__(
        self,
        arguments: TrainArguments,
        *,
        data: BaseDataModule | None = None,
        task_class: type[RowTask] | None = None,
        callbacks: Sequence[pl.Callback] = (),
    ) -> None:
        if task_class is not None:
            trust([task_class.__module__])
        self.arguments = arguments = with_saved_options(with_found_run(arguments))
        self.callbacks = list(callbacks)
        self.setup: TrainingSetup
        if data is None:
            self.setup = open_setup(arguments)
        elif task_class is None:
            raise UsageError("pass task_class beside data, such as SequenceClassification")
        else:
            self.setup = rows_setup(arguments, data, task_class)
        self._experiment: Path | None = None

    def add_callback(self, callback: pl.Callback) -> None:
        """Lightning calls it before our own; `trainer.callbacks.append`."""
        self.callbacks.append(callback)

    def pop_callback(self, kind: type[pl.Callback]) -> pl.Callback | None:
        """Take the first one of a class out, and return it."""
        found = next((one for one in self.callbacks if isinstance(one, kind)), None)
        if found is not None:
            self.callbacks.remove(found)
        return found

    def remove_callback(self, kind: type[pl.Callback]) -> None:
        """The same, without returning it."""
        self.pop_callback(kind)

    def train(self) -> Path:
        """`pl.Trainer.fit`; returns the experiment directory."""
        found = train_setup(self.setup, self.callbacks)
        if not isinstance(found, Path):
            raise KeyboardInterrupt  # a signal ended it, which was said
        self._experiment = found
        return found

    def evaluate(self, rows: Sequence[Row] | None = None) -> dict[str, float]:
        """Metrics of the best model on the validation rows, or on others; `pl.Trainer.validate`."""
        rows = self._data.named_rows("valid") if rows is None else rows
        task = self._opened.row_task
        task.labelled_features(rows)
        return task.metrics(rows, self.predict(rows)).scalars

    def predict(self, rows: Sequence[Row]) -> list[Prediction]:
        """JSON for each row, by the best model; `pl.Trainer.predict`."""
        return self._opened.predict(rows, batch_size=self.arguments.batch_size)

    def save_model(self, directory: Path) -> None:
        """Copy the best model, a plain Hugging Face directory; one that is there already is replaced.

        Raises:
            UsageError: there is something else.
        """
        if directory.exists() and not (directory / "config.json").is_file():
            raise UsageError(f"{directory} exists and is no model directory; name another one")
        make_directories(directory.absolute().parent)
        partial = directory.with_name(f".{directory.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(find_model_directory(self._directory), partial)
        replace_directory(partial, directory)

    def save_metrics(self, split: str, metrics: dict[str, float]) -> None:
        """Write `SPLIT_results.json` into the experiment directory."""
        write_json(self._directory / f"{split}_results.json", metrics)

    def metrics_format(self, metrics: dict[str, float]) -> dict[str, str]:
        """Four digits of each."""
        return {name: f"{value:.4f}" for name, value in metrics.items()}

    def get_train_dataloader(self) -> BatchLoader:
        """All epochs in a chain; `LightningDataModule.train_dataloader`."""
        return self._begun_data.train_dataloader()

    def get_eval_dataloader(self) -> ValidationLoader:
        """`val_dataloader`."""
        return self._begun_data.val_dataloader()

    def get_test_dataloader(self) -> ValidationLoader:
        """`test_dataloader`."""
        return self._begun_data.test_dataloader()

    def num_examples(self, split: Split = "train") -> int:
        """Rows of a split."""
        return len(self._data.named_rows(split))

    def compute_loss(self, module: TrainingModule, batch: Batch) -> Tensor:
        """A batch's part of the mean loss of its optimizer step; in `training_step`."""
        return module.mean_losses(batch)[0]

    def is_world_process_zero(self) -> bool:
        """Whether this process writes; `trainer.is_global_zero`."""
        return is_main_process()

    @property
    def _directory(self) -> Path:
        if self._experiment is None:
            raise UsageError("call train() first: there is no model yet")
        return self._experiment

    @property
    def _opened(self) -> OpenedTask:
        return open_task(self._directory)

    @property
    def _data(self) -> BaseDataModule:
        data = self.setup.data
        if not isinstance(data, BaseDataModule):
            raise UsageError(f"--task {self.arguments.task} has no labelled rows; use fst evaluate")
        return data

    @property
    def _begun_data(self) -> BaseDataModule:
        data = self._data
        if not hasattr(data, "task"):
            self.setup.begin(None)
        return data
