"""`fst train`: set up -> fit -> model directory, readable in one file."""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import SingleDeviceStrategy
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.arguments.training import ARGUMENTS_FILE_NAME, TrainArguments
from full_stack_transformer.arguments.typed import command_started
from full_stack_transformer.errors import LostPeerError, MachineError
from full_stack_transformer.machine import (
    check_free_memory,
    is_out_of_memory,
)
from full_stack_transformer.modelling.acceleration import (
    compile_layers,
    flops_per_token,
    pays_to_compile,
)
from full_stack_transformer.modelling.adapters import has_adapter
from full_stack_transformer.modelling.backbones import num_parameters
from full_stack_transformer.modelling.other_files import (
    ADAPTER_DIRECTORY_NAME,
    MODEL_DIRECTORY_NAME,
)
from full_stack_transformer.processes import is_lost_peer, is_main_process
from full_stack_transformer.storage import read_json, readable, write_json
from full_stack_transformer.training import metric_names
from full_stack_transformer.training.callbacks.control import (
    CatchSignals,
    FollowPlan,
    InterruptedBySignalError,
    SaveCheckpoints,
    StopWithoutImprovement,
)
from full_stack_transformer.training.callbacks.export import ExportModel
from full_stack_transformer.training.callbacks.meter import Meter
from full_stack_transformer.training.callbacks.moving_average import AveragedWeights
from full_stack_transformer.training.callbacks.progress import (
    SUMMARY_FILE_NAME,
    Progress,
    RecordCurves,
    summarize,
)
from full_stack_transformer.training.data.rows import BaseDataModule
from full_stack_transformer.training.experiments import (
    CHECKPOINTS_DIRECTORY_NAME,
    Experiment,
    open_experiment,
    with_same_batches,
    write_arguments,
)
from full_stack_transformer.training.lightning_trainer import make_trainer, quieten_libraries
from full_stack_transformer.training.module import unknown_metric
from full_stack_transformer.training.optimization import Plan
from full_stack_transformer.training.results import write_results
from full_stack_transformer.training.setup import TrainingSetup, open_setup
from full_stack_transformer.training.tuning import tune

logger = logging.getLogger(__name__)

# A shell reports this plus the number of the signal that ended a process.
_EXIT_CODE_OF_SIGNAL = 128


def main(arguments: TrainArguments) -> Path | int:
    """`fst train` and `fst run_experiment`: the experiment directory, or an exit code after a signal.

    Raises:
        UsageError: the options contradict each other, the machine or the training to resume, or name a class
            that cannot be imported or is not of the expected kind.
        DatasetError: --dataset_dir is not a dataset directory, or has no validation samples.
        ModelError: --model_path cannot be opened.
        TrainingError: the loss is no longer a number.
        MachineError: a checkpoint cannot be written.
    """
    return train_setup(open_setup(arguments))


def train_setup(setup: TrainingSetup, callbacks: Sequence[pl.Callback] = ()) -> Path | int:
    """The same for a complete setup.

    Args:
        setup: what is learned from what.
        callbacks: of Lightning, in addition to ours.
    """
    started = command_started()
    quieten_libraries()
    with open_experiment(setup.arguments, setup.data) as experiment:
        if experiment.is_finished:
            logger.info("%s is already finished", experiment.directory)
            return _after(setup, experiment) if is_main_process() else 0
        if not setup.arguments.trains:
            return _after(setup, experiment) if is_main_process() else 0
        training = _set_up(experiment, setup, callbacks)
        try:
            training.fit(started)
        except InterruptedBySignalError as interruption:
            # Lightning kills the main process if another process exits with an error.
            return training.log_resume_command(interruption) if is_main_process() else 0
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise training.memory_is_short() from error
            if is_lost_peer(error):
                raise training.peer_is_lost(error) from error
            raise
        if not is_main_process():
            return 0
        training.finish(time.monotonic() - started)
        return _after(setup, experiment)


def _after(setup: TrainingSetup, experiment: Experiment) -> Path:
    """--do_eval and --do_predict, with the best model."""
    arguments, data = setup.arguments, setup.data
    if isinstance(data, BaseDataModule):
        if arguments.do_eval:
            write_results(experiment.directory, data, "valid")
        if arguments.do_predict:
            write_results(experiment.directory, data, "test")
    return experiment.directory


def _set_up(
    experiment: Experiment, setup: TrainingSetup, callbacks: Sequence[pl.Callback]
) -> "_Training":
    if experiment.checkpoint is not None:
        experiment = with_same_batches(experiment, make_trainer(experiment).world_size)
    arguments = experiment.arguments
    torch.manual_seed(arguments.seed)
    setup.begin(experiment.directory if is_main_process() else None)
    backbone = setup.make_backbone()
    _check_metric(arguments.metric_for_best_model, setup, backbone)
    if arguments.find_batch_size or arguments.find_learning_rate:
        arguments = tune(arguments, setup, backbone, make_trainer(experiment))
        experiment = dataclasses.replace(experiment, arguments=arguments)
        write_arguments(experiment)
    return _Training(experiment, setup, backbone, callbacks)


def _check_metric(chosen: str, setup: TrainingSetup, backbone: Backbone) -> None:
    """Refuse an unknown metric now, and not after the first epoch.

    Raises:
        UsageError: --metric_for_best_model is none of the task's.
    """
    found = [metric_names.LOSS]
    if chosen not in found:
        for names in setup.metric_names(backbone):
            found = [metric_names.LOSS, *names]
            if chosen in found:
                break
        else:
            raise unknown_metric(chosen, found)


class _Training:
    """The parts of a training."""

    def __init__(
        self,
        experiment: Experiment,
        setup: TrainingSetup,
        backbone: Backbone,
        callbacks: Sequence[pl.Callback],
    ) -> None:
        self._experiment = experiment
        self._setup = setup
        self._backbone = backbone
        self._signals = CatchSignals()
        self._meter = Meter(num_context_tokens=setup.data.num_context_tokens)
        self._export = _make_export(experiment, setup)
        self._data = setup.make_data(experiment.arguments)
        self._trainer = make_trainer(
            experiment,
            [*callbacks, *self._callbacks()],
            measures_start=setup.measures_start and experiment.checkpoint is None,
        )

    def fit(self, started: float) -> None:
        """Train to the end; the time of --max_minutes began at `started`, by time.monotonic().

        Raises:
            InterruptedBySignalError: a signal ended it early; a checkpoint was written.
        """
        experiment, checkpoint = self._experiment, self._experiment.checkpoint
        self._check_memory()
        if is_main_process():
            logger.info(
                "training %s parameters on %s in %s, %s precision, into %s%s",
                _described_size(self._backbone),
                self._data.amount,
                self._trainer.strategy.root_device,
                self._trainer.precision,
                experiment.directory,
                f", resuming after step {checkpoint.step:,}" if checkpoint else "",
            )
            for remark in self._data.remarks(self._trainer.world_size):
                logger.info("%s", remark)
            if checkpoint is None:
                self._log_start()
                _write_texts(self._trainer, experiment, self._setup)
            elif self._trainer.strategy.root_device.type == "cuda" and not (
                self._experiment.arguments.deterministic
            ):
                logger.warning(
                    "without --deterministic a GPU adds up in changing order: the result equals that of a "
                    "training without an interruption up to rounding, not in each bit"
                )
        module = self._setup.make_module(self._backbone, experiment.arguments)
        module.count_time_from(started)
        if self._should_compile():
            compile_layers(self._backbone)
        with self._signals:
            self._trainer.fit(
                module,
                datamodule=self._data,
                ckpt_path=checkpoint.path if checkpoint else None,
                weights_only=True,
            )

    def _log_start(self) -> None:
        """Say what a pretrained model is started with."""
        arguments = self._experiment.arguments
        if arguments.model_path is not None:
            logger.info(
                "starting from %s with learning rate %g after %s steps of warm-up",
                arguments.model_path,
                arguments.peak_learning_rate,
                f"{arguments.warmup_steps:,}",
            )

    def _check_memory(self) -> None:
        """Refuse a model that cannot be trained whole: a container would kill the process in mid-step.

        Raises:
            MachineError: gradients and the optimizer's state do not fit, whatever the batches are.
        """
        strategy = self._trainer.strategy
        if isinstance(strategy, SingleDeviceStrategy):
            trained = [one for one in self._backbone.parameters() if one.requires_grad]
            num_values = sum(one.numel() for one in trained)
            is_moved = strategy.root_device.type != "cpu"
            # fp32: gradients and Muon's momentum, AdamW has two; weights too where they are not yet.
            check_free_memory(
                4 * num_values * (3 if is_moved else 2),
                f"training {num_values:,} parameters",
                strategy.root_device,
            )

    def _should_compile(self) -> bool:
        arguments, trainer = self._experiment.arguments, self._trainer
        device = trainer.strategy.root_device
        if arguments.compile != "auto":
            return arguments.compile == "always"
        if arguments.deterministic and device.type == "cuda" and arguments.batching == "length":
            # The code for a batch depends on the lengths that came before it, and a resumed training starts
            # with others.
            return False
        num_batches = self._data.count_batches_per_epoch(trainer.world_size)
        num_steps = Plan.of(arguments, num_batches_per_epoch=num_batches).num_steps
        num_rows = arguments.batch_size * arguments.accumulate_grad_batches
        num_rows_in_all = math.inf if num_steps is None else num_rows * num_steps
        return pays_to_compile(
            device,
            flops=flops_per_token(self._backbone, self._data.num_context_tokens)
            * self._data.num_row_tokens
            * num_rows_in_all,
            minutes=arguments.max_minutes,
        )

    def log_resume_command(self, interruption: InterruptedBySignalError) -> int:
        """Log how to resume; returns the exit code of an interrupted training."""
        logger.warning(
            "%s: stopped after step %s; resume with: %s",
            interruption,
            f"{self._trainer.global_step:,}",
            self._experiment.resume_command(),
        )
        return _EXIT_CODE_OF_SIGNAL + interruption.number

    def memory_is_short(self) -> MachineError:
        """The error for a step that does not fit into the memory of the device."""
        size = self._experiment.arguments.batch_size
        return MachineError(
            f"{self._trainer.strategy.root_device} has too little memory for --batch_size {size}: halve it "
            "and double --accumulate_grad_batches for the same result, use --activation_checkpointing, "
            "--precision bf16 or a smaller model; --find_batch_size finds a size that fits"
        )

    def peer_is_lost(self, error: BaseException) -> MachineError:
        """The error where another process has ended, so that this one cannot go on."""
        first_line = str(error).partition("\n")[0]
        return LostPeerError(
            f"another process of this training has ended, or cannot be reached ({first_line}): what is saved "
            f"is intact; resume with: {self._experiment.resume_command()}"
        )

    def finish(self, seconds_taken: float) -> Path:
        """Write the summary, and return the experiment directory."""
        summary = summarize(
            self._meter,
            self._export.best,
            num_steps=self._trainer.global_step,
            seconds_taken=seconds_taken,
        )
        directory = self._experiment.directory
        write_json(directory / SUMMARY_FILE_NAME, summary.as_json())
        for line in summary.lines(directory, has_adapter=has_adapter(self._backbone)):
            logger.info("%s", line)
        return directory

    def _callbacks(self) -> list[pl.Callback]:
        """The callbacks; their order does not matter, but for FollowPlan, which measures the others."""
        arguments, directory = self._experiment.arguments, self._experiment.directory
        return [
            self._signals,
            self._meter,
            RecordCurves(
                self._meter,
                log_every_n_steps=arguments.log_every_n_steps,
                histograms=arguments.histograms,
            ),
            Progress(self._meter, show=arguments.enable_progress_bar),
            self._export,
            *self._setup.callbacks(directory),
            *([AveragedWeights(decay=arguments.ema_decay)] if arguments.ema_decay else []),
            StopWithoutImprovement(patience=arguments.early_stopping_patience),
            FollowPlan(num_evaluations=1 + bool(arguments.do_eval) + bool(arguments.do_predict)),
            SaveCheckpoints(
                directory / CHECKPOINTS_DIRECTORY_NAME,
                minutes_between=arguments.checkpoint_every_n_minutes,
                signals=self._signals,
                batch_size=arguments.batch_size,
                experiment_id=self._experiment.id,
                form=arguments.checkpoints,
            ),
        ]


def _described_size(backbone: Backbone) -> str:
    """Parameters, or with an adapter its own and all."""
    num_trained = sum(one.numel() for one in backbone.parameters() if one.requires_grad)
    num_all = num_parameters(backbone)
    return f"{num_trained:,}" + (f" of {num_all:,}" if num_trained < num_all else "")


def _make_export(experiment: Experiment, setup: TrainingSetup) -> ExportModel:
    return ExportModel(
        experiment.directory
        / (ADAPTER_DIRECTORY_NAME if experiment.arguments.lora_rank else MODEL_DIRECTORY_NAME),
        task=setup.task,
        tokenizer_directory=setup.data.tokenizer_directory,
        experiment=experiment.name,
        dataset_description=setup.data.description,
        arguments={**dataclasses.asdict(experiment.arguments), "allow_code_from": ()},
        fields=setup.description_fields(),
        start=setup.start,
    )


def _write_texts(trainer: pl.Trainer, experiment: Experiment, setup: TrainingSetup) -> None:
    """Write the options and the description of the dataset for TensorBoard."""
    assert isinstance(trainer.logger, TensorBoardLogger)
    writer = trainer.logger.experiment
    arguments = read_json(experiment.directory / ARGUMENTS_FILE_NAME)
    writer.add_text(metric_names.ARGUMENTS_TEXT, _as_markdown(arguments))
    writer.add_text(metric_names.DATASET_TEXT, _as_markdown(setup.data.description))


def _as_markdown(content: dict[str, Any]) -> str:
    text = readable(json.dumps(content, indent=2, ensure_ascii=False))
    return "\n".join(f"    {line}" for line in text.splitlines())
