"""What one training learns from what: the data, the task and the model that the options name."""

import contextlib
import dataclasses
import logging
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.arguments.training import RunExperimentArguments, TrainArguments
from full_stack_transformer.arguments.typed import given_options
from full_stack_transformer.datasets.corpus import open_dataset
from full_stack_transformer.errors import ModelError, UsageError
from full_stack_transformer.modelling.adapters import add_adapter
from full_stack_transformer.modelling.backbones import context_length, new_backbone
from full_stack_transformer.modelling.pretrained import (
    StartFacts,
    pretrained_backbone,
    read_start,
)
from full_stack_transformer.modelling.vocabulary import exchange_vocabulary
from full_stack_transformer.own_classes import class_of_option, trust_options
from full_stack_transformer.processes import is_main_process
from full_stack_transformer.tasks.catalogue import TASK_OF_KIND, TASKS, TEACHER_TASK
from full_stack_transformer.tasks.opening import (
    is_own,
    path_of,
    row_task_class,
    task_class,
    task_of_head,
)
from full_stack_transformer.tasks.task import CorpusTask, RowTask, Task
from full_stack_transformer.tokenization.document_tokenizer import (
    local_tokenizer,
    open_saved_tokenizer,
)
from full_stack_transformer.training.callbacks.text_samples import SampleParameters, SampleTexts
from full_stack_transformer.training.data.batches import EpochDataModule
from full_stack_transformer.training.data.corpus import CorpusDataModule
from full_stack_transformer.training.data.rows import BaseDataModule, FileRows
from full_stack_transformer.training.experiments import (
    TOKENIZER_DIRECTORY_NAME,
    with_found_run,
    with_saved_options,
)
from full_stack_transformer.training.module import TrainingModule

logger = logging.getLogger(__name__)

_FEW_ROWS = 32
_Arguments = TypeVar("_Arguments", bound=TrainArguments)


@dataclass(frozen=True)
class TrainingSetup:
    """The parts of one training; `begin` comes before the model and the batches."""

    arguments: TrainArguments
    data: EpochDataModule
    model_class: Any = None
    """Another class for the model than the task's own."""

    @property
    def task(self) -> Task:
        """What is learned; known after `begin`."""
        return self.data.task

    def begin(self, experiment_directory: Path | None) -> None:
        """Make tokenizer and task; None in a process that writes no experiment."""
        self.data.begin(lambda: _place_for_tokenizer(experiment_directory))

    def make_backbone(self) -> Backbone:
        """The model at the start: from scratch, or pretrained."""
        backbone = self._new_backbone()
        if isinstance(self.data, CorpusDataModule):
            _check_replayed(self.data, backbone)
        return backbone

    def _new_backbone(self) -> Backbone:
        arguments, task = self.arguments, self.task
        if arguments.model_path is not None:
            exchanges = self._exchanges_vocabulary
            backbone = pretrained_backbone(
                arguments.model_path,
                vocab_size=0 if exchanges else task.vocab_size,
                model_class=self.model_class or task.pretrained_class(arguments.model_path),
                new_head=task.new_head,
                **task.pretrained_fields(),
            )
            if exchanges:
                old = open_saved_tokenizer(local_tokenizer(arguments.model_path))
                exchange_vocabulary(
                    backbone, old, open_saved_tokenizer(self.data.tokenizer_directory)
                )
            self._check_lengths(backbone)
            if arguments.lora_rank:
                add_adapter(backbone, arguments, base=arguments.model_path)
            return backbone
        return new_backbone(
            arguments.model_config,
            vocab_size=task.vocab_size,
            max_length=self.data.max_length,
            special_token_ids=task.special_token_ids,
            dropout=arguments.dropout,
            model_class=self.model_class or task.new_class(arguments.model_config),
            **task.config_fields(),
        )

    def _check_lengths(self, backbone: Backbone) -> None:
        """Refuse conversations that are longer than the context; documents were cut when they were prepared.

        Raises:
            UsageError: one is.
        """
        with contextlib.suppress(ModelError):  # some architectures have no limit
            length = context_length(backbone.config)
            kind = self.data.description.get("kind", "documents")
            if kind != "documents" and self.data.max_length > length:
                raise UsageError(
                    f"{self.data.data_place} has samples of {self.data.max_length:,} tokens, and the context "
                    f"of {self.arguments.model_path} has {length:,}; pass --max_length {length}"
                )

    @property
    def measures_start(self) -> bool:
        """Whether the model to start from can do the task already, so that training must make it better."""
        return self.arguments.model_path is not None and not self.task.new_head

    @property
    def _exchanges_vocabulary(self) -> bool:
        return self.arguments.resize_embeddings == "new" and isinstance(self.task, CorpusTask)

    @cached_property
    def start(self) -> StartFacts | None:
        """What the tuned model keeps of the one that it starts from; None from scratch."""
        if self.arguments.model_path is None:
            return None
        found = read_start(self.arguments.model_path)
        if self._exchanges_vocabulary and found.generation_config is not None:
            ids = self.task.special_token_ids
            named = {"bos_token_id": "begin", "eos_token_id": "end", "pad_token_id": "pad"}
            changed = {key: ids[name] for key, name in named.items()}
            found = dataclasses.replace(
                found, generation_config={**found.generation_config, **changed}
            )
        return found

    def metric_names(self, backbone: Backbone) -> Iterator[list[str]]:
        """Names of the metrics: of a few validation rows, then of all, where rare labels may add some."""
        if isinstance(self.task, CorpusTask):
            yield [*self.task.validation_metrics(1.0, defaultdict(float))]
        elif isinstance(self.task, RowTask) and isinstance(self.data, BaseDataModule):
            rows = self.data.named_rows("valid")
            for part in (rows[:_FEW_ROWS], rows):
                predictions = self.task.predict(part, backbone.eval())
                yield [*self.task.metrics(part, predictions).scalars]

    def make_data(self, arguments: TrainArguments) -> EpochDataModule:
        """The batches, as these options want them."""
        if arguments is self.arguments:
            return self.data
        return self.data.with_arguments(arguments)

    def make_module(self, backbone: Backbone, arguments: TrainArguments) -> TrainingModule:
        """The training step."""
        return TrainingModule(backbone, arguments, self.task)

    def callbacks(self, directory: Path) -> list[pl.Callback]:
        """Text samples of a model that generates."""
        arguments = self.arguments
        if not self.task.generates:
            return []
        sampling = dataclasses.replace(SampleParameters().sampling, seed=arguments.seed)
        samples = SampleParameters(num_samples=arguments.num_generated_samples, sampling=sampling)
        return [SampleTexts(directory, self.task.tokenizer, samples)]

    def description_fields(self) -> dict[str, Any]:
        """What opening the model again needs and its config does not say, for description.json."""
        cls = type(self.task)
        return {
            **({"task_class": path_of(cls)} if is_own(cls) else {}),
            **({"model_class": path_of(self.model_class)} if self.model_class else {}),
            **self.task.description_fields(),
        }


def open_setup(arguments: TrainArguments) -> TrainingSetup:
    """The setup that the options name.

    Raises:
        UsageError: there is no such task or class, or the data are not of the kind that the task reads.
        DatasetError: --dataset_dir is no dataset directory, or has no validation samples.
        RowError: there are no rows to learn from, or to validate on.
    """
    trust_options(arguments)
    given = with_found_run(arguments)
    arguments = with_saved_options(given)
    is_new = arguments is given  # and not resumed
    if isinstance(arguments, RunExperimentArguments):
        return _open_own(_settled(arguments))
    if is_new:
        arguments = with_task(arguments)
    cls = task_class(arguments.task)
    if arguments.lora_rank and not cls.generates:
        raise UsageError(
            f"--lora_rank is for models that continue texts, which --task {arguments.task} does not make; "
            "leave it out"
        )
    if arguments.replay and not (issubclass(cls, CorpusTask) and cls.replays):
        raise UsageError(
            f"--replay is for tasks that learn the next tokens, which --task {arguments.task} does not; "
            "leave it out"
        )
    if is_new:
        arguments = with_defaults(arguments, cls)
    arguments = _settled(arguments)
    arguments.check_data(reads_datasets=issubclass(cls, CorpusTask))
    if issubclass(cls, CorpusTask):
        assert arguments.dataset_dir is not None
        dataset = open_dataset(arguments.dataset_dir, arguments)
        arguments = dataclasses.replace(arguments, dataset_dir=dataset.directory)
        return TrainingSetup(arguments, CorpusDataModule(arguments, dataset, cls))
    return rows_setup(arguments, FileRows(arguments), row_task_class(arguments.task))


def _check_replayed(data: CorpusDataModule, backbone: Backbone) -> None:
    """Refuse documents of --replay that are longer than the context.

    Raises:
        UsageError: one is.
    """
    with contextlib.suppress(ModelError):  # some architectures have no limit
        length = context_length(backbone.config)
        if data.longest_replayed > length:
            raise UsageError(
                f"--replay: a sample may have {data.longest_replayed:,} tokens, and the context of the model "
                f"{length:,}; prepare that dataset with --max_sample_length {length}"
            )


def with_task(arguments: TrainArguments) -> TrainArguments:
    """The options with the task of --teacher, or of the dataset's kind, where nobody chose one.

    Raises:
        UsageError: --teacher is given to another task.
        DatasetError: --dataset_dir is damaged.
    """
    is_chosen = "task" in given_options(arguments)
    task, reason = arguments.task, ""
    if arguments.teacher is not None:
        if is_chosen and task != TEACHER_TASK:
            raise UsageError(f"--teacher is for --task {TEACHER_TASK}, not for --task {task}")
        task, reason = TEACHER_TASK, "--teacher"
    elif not is_chosen and arguments.dataset_dir is not None and arguments.train_file is None:
        kind = open_dataset(arguments.dataset_dir, arguments).kind
        task = TASK_OF_KIND[kind] if kind != "documents" else task
        reason = f"a dataset of {kind}"
    if task != arguments.task and is_main_process():
        logger.info("--task %s, for %s", task, reason)
    return dataclasses.replace(arguments, task=task)


def with_defaults(arguments: TrainArguments, cls: type[Task]) -> TrainArguments:
    """The options with those of the task where nobody chose one; says which."""
    found = cls.defaults.options(has_adapter=bool(arguments.lora_rank))
    chosen = given_options(arguments)
    found = {name: value for name, value in found.items() if name not in chosen}
    if "max_epochs" in found and {"max_steps", "max_minutes"} & chosen:
        found["max_epochs"] = -1
    if found and is_main_process():
        words = " ".join(f"--{name} {value}" for name, value in found.items())
        logger.info(
            "defaults of --task %s%s: %s",
            *(arguments.task, " with an adapter" if arguments.lora_rank else "", words),
        )
    return dataclasses.replace(arguments, **found)


def _settled(arguments: _Arguments) -> _Arguments:
    """With the values that depend on other options, as arguments.json has them."""
    return dataclasses.replace(
        arguments,
        learning_rate=arguments.peak_learning_rate,
        num_warmup_steps=arguments.warmup_steps,
    )


def rows_setup(
    arguments: TrainArguments,
    data: BaseDataModule,
    cls: type[RowTask],
    *,
    model_class: Any = None,
) -> TrainingSetup:
    """The setup of a task on rows that are given as a data module; reads them.

    Raises:
        RowError: there are no rows to learn from, or to validate on.
    """
    data.task_class = cls
    data.read()
    return TrainingSetup(arguments, data, model_class)


def _open_own(arguments: RunExperimentArguments) -> TrainingSetup:
    """The setup of one's own classes for data, task or model."""
    data_class: Any = FileRows
    if arguments.data_class:
        data_class = class_of_option(arguments.data_class, "data_class", "a data set")
        if not (isinstance(data_class, type) and issubclass(data_class, BaseDataModule)):
            raise UsageError(
                f"--data_class {arguments.data_class} should derive from {path_of(BaseDataModule)}"
            )
    task: type[RowTask] | None = None
    model_class: Any = None
    if arguments.model_class:
        found = class_of_option(arguments.model_class, "model_class", "a model or a task")
        if isinstance(found, type) and issubclass(found, RowTask):
            task = found
        elif hasattr(found, "from_pretrained"):
            model_class = found
        else:
            raise UsageError(
                f"--model_class {arguments.model_class} should be a model class of transformers, or derive "
                f"from {path_of(RowTask)}"
            )
    if not arguments.data_class:
        reads_datasets = not issubclass(task or row_task_class(arguments.task), RowTask)
        arguments.check_data(reads_datasets=reads_datasets)
    data = data_class(arguments)
    name = data.task_name if task is None or task.name not in TASKS else task.name
    head = task_of_head(model_class.__name__) if model_class is not None else None
    if head not in (None, name):
        raise UsageError(
            f"--model_class {arguments.model_class} has the head of {head}, but the rows are for {name}"
        )
    arguments = dataclasses.replace(arguments, task=name)
    return rows_setup(arguments, data, task or row_task_class(name), model_class=model_class)


def _place_for_tokenizer(experiment_directory: Path | None) -> Path:
    if experiment_directory is None:  # beside the process that writes
        return Path(tempfile.mkdtemp(prefix="fst-tokenizer-"))
    return experiment_directory / TOKENIZER_DIRECTORY_NAME
