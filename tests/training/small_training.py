"""A real training of a few steps in this process, for tests of what watches it."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.profilers import Profiler
from transformers import PreTrainedModel as Backbone

from full_stack_transformer import machine
from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.datasets.corpus import DatasetDirectory
from full_stack_transformer.modelling.backbones import new_backbone
from full_stack_transformer.modelling.model_directory import OpenedModel
from full_stack_transformer.tasks.causal_lm import CausalLm, CausalLmOptions
from full_stack_transformer.tokenization.document_tokenizer import open_saved_tokenizer
from full_stack_transformer.training.callbacks.control import NEVER, FollowPlan
from full_stack_transformer.training.data.corpus import CorpusDataModule
from full_stack_transformer.training.module import TrainingModule

_FEW = {"limit_val_batches": 2.0, "batch_size": 4, "num_warmup_steps": 0}
_TINY_GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 2}


def causal_data(dataset: DatasetDirectory, arguments: TrainArguments) -> CorpusDataModule:
    """Batches of the next tokens; the dataset may have no tokenizer."""
    data = CorpusDataModule(arguments, dataset, CausalLm)
    data.task = CausalLm(None, CausalLmOptions.of(arguments))
    data.task.dataset = dataset
    return data


class SmallTraining:
    """The tiny model in fp32 on a processor, with `options` as `fst train` takes them.

    Args:
        dataset: what is learned.
        directory: the experiment directory.
        profiler: of Lightning.
        at_step: called with the number of each optimizer step, before its validation.
    """

    def __init__(
        self,
        dataset: DatasetDirectory,
        directory: Path,
        *,
        profiler: Profiler | None = None,
        at_step: Callable[[int], None] | None = None,
        bytes_per_target: float = 1.0,
        **options: Any,
    ) -> None:
        directory.mkdir(exist_ok=True)
        if options.get("model_config") == "gpt2-tiny":  # has dropout everywhere
            options["model_config"] = str(directory / "gpt2.json")
            dropout = {f"{name}_pdrop": options["dropout"] for name in ("resid", "embd", "attn")}
            (directory / "gpt2.json").write_text(json.dumps(_TINY_GPT2 | dropout))
        self.arguments = TrainArguments(
            dataset_dir=dataset.directory,
            **{"model_config": "tiny", "max_epochs": -1, "learning_rate": 5e-3, **_FEW, **options},
        )
        self.directory = directory
        self._dataset = dataset
        self._profiler = profiler
        self._at_step = at_step
        torch.manual_seed(0)
        self.backbone: Backbone = new_backbone(
            self.arguments.model_config,
            vocab_size=dataset.description["vocab_size"],
            max_length=dataset.description["max_sample_length"],
            special_token_ids=dataset.description["special_token_ids"],
        )
        self.data = CorpusDataModule(self.arguments, dataset, CausalLm)
        self.data.begin(lambda: directory)
        assert isinstance(self.data.task, CausalLm)
        self.data.task.bytes_per_target = bytes_per_target
        self.task = TrainingModule(self.backbone, self.arguments, self.data.task)
        self.trainer: pl.Trainer

    def fit(self, *callbacks: pl.Callback, checkpoint: Path | None = None) -> None:
        """Train with `callbacks`, or go on from a checkpoint."""
        self.trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            accumulate_grad_batches=self.arguments.accumulate_grad_batches,
            check_val_every_n_epoch=None,
            val_check_interval=NEVER,
            log_every_n_steps=1,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            logger=TensorBoardLogger(self.directory, name="", version="", default_hp_metric=False),
            profiler=self._profiler,
            callbacks=[FollowPlan(), _AtStep(self._at_step), *callbacks],
        )
        with (
            warnings.catch_warnings(),
            mock.patch.object(machine, "_SECONDS_PER_SIDE", 1e-3),
        ):
            # Lightning's own use of torch, which fst train silences too.
            warnings.filterwarnings("ignore", ".*`isinstance\\(treespec, LeafSpec\\)`.*")
            self.trainer.fit(
                self.task, datamodule=self.data, ckpt_path=checkpoint, weights_only=True
            )

    def opened_model(self) -> OpenedModel:
        """The model at the end, to generate with."""
        tokenizer = open_saved_tokenizer(self._dataset.tokenizer_directory)
        return OpenedModel("small", self.backbone.eval(), tokenizer, {})


class _AtStep(pl.Callback):
    def __init__(self, call: Callable[[int], None] | None) -> None:
        self._call = call

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._call is not None:
            self._call(trainer.global_step)
