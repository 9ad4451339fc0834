"""`fst train`: set up -> fit -> model directory, readable in one file.

EXPERIMENTS_ROOT/NAME/VERSION/
    arguments.json     every option, readable again by --config
    model/             the best model so far, always complete
    checkpoints/       last.ckpt and the best one, resumable
    generated.jsonl    text samples of each validation
    summary.json       steps, best loss and seconds; only when the training ended by itself
    events.out.…       curves, for TensorBoard
"""

import dataclasses
import json
import logging
import math
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import transformers
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.arguments import TrainArguments
from full_stack_transformer.datasets.description import DatasetDirectory, open_dataset
from full_stack_transformer.errors import UsageError
from full_stack_transformer.modelling.backbones import (
    new_backbone,
    num_parameters,
    pretrained_backbone,
)
from full_stack_transformer.modelling.model_directory import MODEL_DIRECTORY_NAME
from full_stack_transformer.storage import claim_version, write_json
from full_stack_transformer.tokenization import open_saved_tokenizer
from full_stack_transformer.training import metric_names
from full_stack_transformer.training.callbacks import (
    EndWithValidation,
    ExportModel,
    Progress,
    SampleTexts,
)
from full_stack_transformer.training.checkpoints import DurableCheckpointIO
from full_stack_transformer.training.data import DatasetDataModule
from full_stack_transformer.training.tasks import CausalLanguageModelling

logger = logging.getLogger(__name__)

_LIGHTNING_PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
SUMMARY_FILE_NAME = "summary.json"
EXIT_CODE_INTERRUPTED = 130


def train(arguments: TrainArguments) -> Path | int:
    """Train, and return the experiment directory; or an exit code when interrupted.

    Raises:
        DatasetError: --dataset_dir is no dataset directory.
        ModelError: --model_path cannot be opened.
        TrainingError: the loss is no longer a number.
    """
    started = time.perf_counter()
    _quieten_lightning()
    dataset = open_dataset(arguments.dataset_dir)
    pl.seed_everything(arguments.seed, verbose=False)
    backbone = _make_backbone(arguments, dataset)
    directory = claim_version(arguments.experiments_root, arguments.experiment_name)
    write_json(directory / "arguments.json", _readable_again(arguments))
    task = CausalLanguageModelling(backbone, arguments)
    data = DatasetDataModule(dataset, batch_size=arguments.batch_size, seed=arguments.seed)
    export = _export(dataset, directory)
    trainer = _make_trainer(arguments, dataset, directory, export)
    logger.info(
        "training %s parameters on %s tokens of %s in %s, %s precision, into %s",
        f"{num_parameters(backbone):,}",
        f"{dataset.description['number_of_train_tokens']:,}",
        dataset.description["dataset_name"],
        trainer.strategy.root_device,
        trainer.precision,
        directory,
    )
    trainer.fit(task, datamodule=data, weights_only=True)
    if trainer.interrupted:
        logger.warning(
            "interrupted at step %s; %s holds the last validated state",
            trainer.global_step,
            directory,
        )
        return EXIT_CODE_INTERRUPTED
    summary = {
        "num_steps": trainer.global_step,
        "best_validation_loss": export.best_loss,
        "seconds_taken": round(time.perf_counter() - started, 1),
    }
    write_json(directory / SUMMARY_FILE_NAME, summary)
    logger.info("trained %s; serve it: fst serve %s", json.dumps(summary), directory)
    return directory


def _make_backbone(arguments: TrainArguments, dataset: DatasetDirectory) -> Backbone:
    vocab_size = dataset.description["vocab_size"]
    if arguments.model_path is not None:
        return pretrained_backbone(arguments.model_path, vocab_size=vocab_size)
    return new_backbone(
        arguments.model_config,
        vocab_size=vocab_size,
        max_length=dataset.description["max_sample_length"],
        special_token_ids=dataset.description["special_token_ids"],
        dropout=arguments.dropout,
    )


def _export(dataset: DatasetDirectory, directory: Path) -> ExportModel:
    return ExportModel(
        directory / MODEL_DIRECTORY_NAME,
        tokenizer_directory=dataset.tokenizer_directory,
        description={
            "experiment": f"{directory.parent.name}/{directory.name}",
            "dataset": dataset.description,
        },
    )


def _make_trainer(
    arguments: TrainArguments, dataset: DatasetDirectory, directory: Path, export: ExportModel
) -> pl.Trainer:
    tensorboard = TensorBoardLogger(directory, name="", version="", default_hp_metric=False)
    tensorboard.experiment.add_text("arguments", _as_markdown(_readable_again(arguments)))
    tensorboard.experiment.add_text("dataset", _as_markdown(dataset.description))
    tokenizer = open_saved_tokenizer(dataset.tokenizer_directory)
    try:
        return pl.Trainer(
            accelerator=arguments.accelerator,
            devices=int(arguments.devices) if arguments.devices.isdecimal() else arguments.devices,
            strategy=arguments.strategy,
            num_nodes=arguments.num_nodes,
            precision=_LIGHTNING_PRECISIONS[_resolve_precision(arguments)],  # type: ignore[arg-type]
            max_epochs=arguments.max_epochs,
            max_steps=arguments.max_steps,
            val_check_interval=_part_or_number(arguments.val_check_interval),
            check_val_every_n_epoch=1 if arguments.val_check_interval <= 1 else None,
            limit_train_batches=_part_or_number(arguments.limit_train_batches),
            limit_val_batches=_part_or_number(arguments.limit_val_batches),
            accumulate_grad_batches=arguments.accumulate_grad_batches,
            gradient_clip_val=arguments.gradient_clip_val,
            log_every_n_steps=arguments.log_every_n_steps,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=tensorboard,
            plugins=[DurableCheckpointIO()],
            callbacks=[
                EndWithValidation(),
                Progress(show=arguments.enable_progress_bar),
                export,
                SampleTexts(
                    directory / "generated.jsonl",
                    tokenizer,
                    num_samples=arguments.num_generated_samples,
                    seed=arguments.seed,
                ),
                ModelCheckpoint(
                    directory / "checkpoints",
                    filename="best",
                    monitor=metric_names.VALID_LOSS,
                    save_last=True,
                    enable_version_counter=False,
                ),
            ],
        )
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"--accelerator {arguments.accelerator} --devices {arguments.devices} --strategy "
            f"{arguments.strategy}: {error}"
        ) from error


def _resolve_precision(arguments: TrainArguments) -> str:
    """The arithmetic that `auto` means on this machine."""
    if arguments.precision != "auto":
        return arguments.precision
    if arguments.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "32"
    if arguments.accelerator in ("auto", "cpu") and not torch.backends.mps.is_available():
        return "bf16" if torch.cpu._is_avx512_bf16_supported() else "32"
    return "32"


def _part_or_number(limit: float) -> int | float:
    """Lightning tells a part of an epoch from a number of batches by the type."""
    return int(limit) if limit > 1 else limit


def _readable_again(arguments: TrainArguments) -> dict[str, Any]:
    """The options as JSON holds them, so that --config reads them; unset ones are left out."""
    options = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(arguments).items()
        if value is not None
    }
    assert all(not isinstance(value, float) or math.isfinite(value) for value in options.values())
    return options


def _as_markdown(content: dict[str, Any]) -> str:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    return "\n".join(f"    {line}" for line in text.splitlines())


def _quieten_lightning() -> None:
    """Keep the log ours: the advice on workers is wrong here, the rest is said by our own lines."""
    for name in (
        "pytorch_lightning",
        "lightning.pytorch",
        "lightning_fabric",
        "pytorch_lightning.utilities.rank_zero",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings(
        "ignore", ".*number of training batches.*smaller than the logging interval.*"
    )
