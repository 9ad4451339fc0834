"""Lightning's trainer for `fst train`: one long epoch, with plan, checkpoints and curves of our own."""

import logging
import os
import warnings
from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.loggers import TensorBoardLogger

from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.errors import UsageError
from full_stack_transformer.machine import multiplies_bfloat16
from full_stack_transformer.modelling.backbones import quieten_transformers
from full_stack_transformer.processes import is_main_process, launch
from full_stack_transformer.training.callbacks.control import NEVER
from full_stack_transformer.training.callbacks.profiling import StepProfiler
from full_stack_transformer.training.checkpoints import DurableCheckpointIO
from full_stack_transformer.training.experiments import Experiment
from full_stack_transformer.training.sharding import ShardedStrategy, strategy_of

logger = logging.getLogger(__name__)

_LIGHTNING_PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def make_trainer(
    experiment: Experiment,
    callbacks: Sequence[pl.Callback] = (),
    *,
    measures_start: bool = False,
) -> pl.Trainer:
    """A trainer with one long epoch and no limits: the plan decides when to validate and to end."""
    arguments, launched = experiment.arguments, launch()
    devices, num_nodes = arguments.devices, arguments.num_nodes
    if launched is not None:
        devices = str(launched.num_on_this_machine) if devices == "auto" else devices
        num_nodes = launched.num_machines if num_nodes == 1 else num_nodes
    strategy = strategy_of(arguments.strategy, is_alone=devices == "1" and num_nodes == 1)
    if arguments.histograms and isinstance(strategy, ShardedStrategy):
        raise UsageError(
            f"--histograms needs whole weights on each device, which --strategy {arguments.strategy} does "
            "not keep; use --strategy ddp, or no --histograms"
        )
    try:
        trainer = pl.Trainer(
            accelerator=arguments.accelerator,
            devices=int(devices) if devices.isdecimal() else devices,
            strategy=strategy,
            num_nodes=num_nodes,
            precision=_LIGHTNING_PRECISIONS[_resolve_precision(arguments)],  # type: ignore[arg-type]
            max_epochs=1,
            check_val_every_n_epoch=None,
            val_check_interval=NEVER,
            accumulate_grad_batches=arguments.accumulate_grad_batches,
            gradient_clip_val=arguments.gradient_clip_val,
            log_every_n_steps=arguments.log_every_n_steps,
            deterministic=arguments.deterministic or None,
            # Before the first step, where the model can do the task already.
            num_sanity_val_steps=-1 if measures_start else 0,
            use_distributed_sampler=False,
            callbacks=list(callbacks),
            # Ours is among the callbacks; without callbacks Lightning would add its own.
            enable_checkpointing=bool(callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=_make_tensorboard(experiment),
            profiler=StepProfiler(experiment.directory) if arguments.profile else None,
            plugins=[DurableCheckpointIO(), *_environment()],
        )
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        raise UsageError(
            f"--accelerator {arguments.accelerator} --devices {arguments.devices} --strategy "
            f"{arguments.strategy}: {error}"
        ) from error
    # Reading what was never written would be a bug of ours; filling it with NaN costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return trainer


def _environment() -> list[LightningEnvironment]:
    """For a process in a batch script of SLURM, which Lightning takes for one of those that srun starts."""
    is_alone = launch() is None and "SLURM_NTASKS" in os.environ
    return [LightningEnvironment()] if is_alone else []


def _make_tensorboard(experiment: Experiment) -> TensorBoardLogger:
    return TensorBoardLogger(
        experiment.directory,
        name="",
        version="",
        default_hp_metric=False,
        # Hide what killed runs wrote after the checkpoint.
        purge_step=experiment.first_repeated_step if experiment.is_resumed else None,
    )


def _resolve_precision(arguments: TrainArguments) -> str:
    """The precision for `auto` on this machine."""
    if arguments.precision != "auto":
        _warn_if_emulated(arguments)
        return arguments.precision
    if arguments.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16" if multiplies_bfloat16(torch.device("cuda")) else "32"
    if arguments.accelerator in ("auto", "cpu") and not torch.backends.mps.is_available():
        return "bf16" if multiplies_bfloat16(torch.device("cpu")) else "32"
    return "32"


def _warn_if_emulated(arguments: TrainArguments) -> None:
    on_processor = arguments.accelerator == "cpu" or not torch.cuda.is_available()
    if (
        arguments.precision == "bf16"
        and on_processor
        and is_main_process()
        and not multiplies_bfloat16(torch.device("cpu"))
    ):
        logger.warning(
            "this processor has no bf16 instructions: --precision bf16 takes some ten times as long as 32"
        )


def quieten_libraries() -> None:
    """Silence libraries: their advice on workers is wrong here, and our log lines say the rest."""
    for name in (
        "pytorch_lightning",
        "lightning.pytorch",
        "lightning_fabric",
        "pytorch_lightning.utilities.rank_zero",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    quieten_transformers()
    warnings.filterwarnings("ignore", ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*")
    # Nothing is added in place to what a sharded model returns.
    warnings.filterwarnings("ignore", ".*FSDP2-wrapped module .* returned a view tensor.*")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings(
        "ignore", ".*number of training batches.*smaller than the logging interval.*"
    )
