"""Tasks from labelled rows: tokenizer, features, model and results."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.errors import RowError, UsageError
from full_stack_transformer.modelling.backbones import new_backbone, pretrained_backbone
from full_stack_transformer.modelling.model_directory import MODEL_DIRECTORY_NAME
from full_stack_transformer.rows.splits import Split
from full_stack_transformer.tasks.catalogue import open_task
from full_stack_transformer.tasks.task import Task, TaskOptions
from full_stack_transformer.tokenization.transformers_tokenizer import (
    copy_tokenizer,
    open_tokenizer,
    special_token_ids,
    train_tokenizer,
)
from full_stack_transformer.training.data.rows import BaseDataModule
from full_stack_transformer.training.labelled import LabelledRows
from full_stack_transformer.training.module import TrainingModule
from full_stack_transformer.training.results import write_results
from full_stack_transformer.training.work import Work, place_for_tokenizer


class RowsWork(Work):
    """A task from labelled rows.

    Args:
        arguments: the options.
        data: the rows; its `prepare` is called.
        task_class: how they are read and what is learned.
        model_class: another class for the model than the task's own.

    Raises:
        RowError: there are no rows to learn from or to validate on.
    """

    def __init__(
        self,
        arguments: TrainArguments,
        data: BaseDataModule,
        task_class: type[Task],
        *,
        model_class: Any = None,
    ) -> None:
        self.arguments = arguments
        self.data = data
        self._task_class = task_class
        self._model_class = model_class
        data.prepare()
        self._train_rows = data.named_rows("train")
        if not self._train_rows:
            raise RowError(f"{data.data_name} has no rows to learn from")
        if not data.named_rows("valid"):
            raise RowError(
                f"{data.data_name} has no validation rows; pass --validation_file, or a greater "
                "--validation_fraction"
            )
        self.description = {
            "task": task_class.name,
            **data.describe(),
            "number_of_train_rows": len(self._train_rows),
            "number_of_valid_rows": len(data.named_rows("valid")),
        }
        self.options = TaskOptions(
            max_length=arguments.max_length,
            doc_stride=arguments.doc_stride,
            problem_type=arguments.problem_type,
            pooling=arguments.pooling,
            embedding_loss=arguments.embedding_loss,
            temperature=arguments.simcse_temperature,
        )
        self.task: Task

    @property
    def data_place(self) -> str:
        """The directory, the training file or the class."""
        return str(self.arguments.dataset_dir or self.arguments.train_file or self.data.data_name)

    @property
    def amount(self) -> str:
        """Rows, and where they are from."""
        return f"{len(self._train_rows):,} rows of {self.data.data_name}"

    def begin(self, experiment_directory: Path | None) -> None:
        """Make the tokenizer, and features of the rows."""
        self.tokenizer_directory = place_for_tokenizer(experiment_directory)
        arguments, directory = self.arguments, self.tokenizer_directory
        origin = arguments.tokenizer_path or arguments.model_path
        if not (directory / "tokenizer_config.json").is_file():
            if origin is not None:
                copy_tokenizer(origin, directory, max_length=arguments.max_length)
            else:
                train_tokenizer(
                    _texts_of(self._train_rows),
                    directory,
                    vocab_size=arguments.vocab_size,
                    max_length=arguments.max_length,
                )
        tokenizer = open_tokenizer(directory)
        self.task = self._task_class.learn(self._train_rows, tokenizer, self.options)
        self.data.open(self.task)

    def make_backbone(self) -> Backbone:
        """From scratch, or pretrained with a new head where it has none."""
        arguments, task = self.arguments, self.task
        tokenizer = task.tokenizer
        fields = task.config_fields()
        if arguments.model_path is not None:
            return pretrained_backbone(
                arguments.model_path,
                vocab_size=len(tokenizer),
                model_class=self._model_class or task.pretrained_class(arguments.model_path),
                new_head=True,
                **fields,
                pad_token_id=tokenizer.pad_token_id,
            )
        return new_backbone(
            arguments.model_config,
            vocab_size=len(tokenizer),
            max_length=arguments.max_length,
            special_token_ids=special_token_ids(tokenizer),
            dropout=arguments.dropout,
            model_class=self._model_class or task.new_class(arguments.model_config),
            **fields,
        )

    def make_data(self, arguments: TrainArguments) -> BaseDataModule:
        """The rows' features in batches."""
        if arguments is self.arguments:
            return self.data
        return self.data.with_arguments(arguments)

    def make_module(self, backbone: Backbone, arguments: TrainArguments) -> TrainingModule:
        """One for all tasks."""
        return LabelledRows(backbone, arguments, self.data)

    @property
    def num_context_tokens(self) -> int:
        """Of a mean feature."""
        features = self.data.features("train")
        return max(1, sum(map(self.task.length, features)) // len(features))

    @property
    def num_row_tokens(self) -> int:
        """The same."""
        return self.num_context_tokens

    def apply(self, experiment_directory: Path, split: Split) -> dict[str, float]:
        """Into eval_results.json, or test_predictions.jsonl and test_results.json."""
        rows = self.data.named_rows(split)
        if not rows:
            raise RowError(f"{self.data.data_name} has no {split} rows; pass --test_file")
        opened = open_task(self._model_to_apply(experiment_directory))
        predictions = opened.task.predict(
            rows, opened.backbone, batch_size=self.arguments.batch_size
        )
        return write_results(experiment_directory, opened.task, split, rows, predictions)

    def _model_to_apply(self, experiment_directory: Path) -> Path:
        if (experiment_directory / MODEL_DIRECTORY_NAME).is_dir():
            return experiment_directory
        if self.arguments.model_path is None:
            raise UsageError(
                "--do_eval and --do_predict without --do_train need a trained model: pass --model_path, or "
                "--resume last"
            )
        return Path(self.arguments.model_path)

    def finish_directory(self, directory: Path, config: PretrainedConfig) -> None:
        """What the task adds."""
        self.task.finish_directory(directory, config)

    def export_fields(self) -> dict[str, Any]:
        """What opening the task again needs and the config does not say."""
        name = _path_of(self._task_class)
        is_ours = name.startswith("full_stack_transformer.")
        return {
            **({} if is_ours else {"task_class": name}),
            **({} if self._model_class is None else {"model_class": _path_of(self._model_class)}),
            "task_options": self.task.saved_options(),
        }


def _path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _texts_of(value: Any) -> Iterator[str]:
    """All strings of rows that are text, and not names of labels or places."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key not in ("label", "labels", "id", "group", "_place"):
                yield from _texts_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts_of(inner)
