"""Language models from a dataset directory: causal ones and masked ones."""

import dataclasses
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.datasets.description import DatasetDirectory, open_dataset
from full_stack_transformer.datasets.masking import Masking, make_masking
from full_stack_transformer.datasets.text_bytes import bytes_per_target
from full_stack_transformer.errors import DatasetError
from full_stack_transformer.modelling.backbones import new_backbone, pretrained_backbone
from full_stack_transformer.tokenization.document_tokenizer import open_saved_tokenizer
from full_stack_transformer.tokenization.transformers_tokenizer import (
    open_tokenizer,
    save_tokenizer,
)
from full_stack_transformer.training.callbacks.text_samples import SampleParameters, SampleTexts
from full_stack_transformer.training.data.batches import DatasetDataModule
from full_stack_transformer.training.masked import MaskedLanguageModelling
from full_stack_transformer.training.module import TrainingModule
from full_stack_transformer.training.tasks import CausalLanguageModelling
from full_stack_transformer.training.work import Work, place_for_tokenizer


class LanguageModelWork(Work):
    """A language model from a dataset directory.

    Raises:
        DatasetError: --dataset_dir is no dataset directory, or has no validation samples.
    """

    def __init__(self, arguments: TrainArguments) -> None:
        assert arguments.dataset_dir is not None
        self.dataset: DatasetDirectory = open_dataset(arguments.dataset_dir)
        if len(self.dataset.valid) == 0:
            raise DatasetError(
                f"{self.dataset.directory} has no validation samples; prepare it with some"
            )
        self.arguments = dataclasses.replace(arguments, dataset_dir=self.dataset.directory)
        self.description = self.dataset.description
        self._tokenizer = open_saved_tokenizer(self.dataset.tokenizer_directory)
        self._bytes_per_target = bytes_per_target(self.dataset.valid, self._tokenizer)
        self._vocab_size: int = self.description["vocab_size"]
        self._is_masked = arguments.task == "masked_lm"

    @property
    def data_place(self) -> str:
        """The dataset directory."""
        return self.dataset.data_place

    @property
    def amount(self) -> str:
        """Tokens, and the name of the dataset."""
        number = self.description["number_of_train_tokens"]
        return f"{number:,} tokens of {self.description['dataset_name']}"

    def begin(self, experiment_directory: Path | None) -> None:
        """A masked language model gets a tokenizer with a mask token, a causal one that of the dataset."""
        self.tokenizer_directory = self.dataset.tokenizer_directory
        if self._is_masked:
            self.tokenizer_directory = place_for_tokenizer(experiment_directory)
            self._vocab_size = save_tokenizer(
                self._tokenizer,
                self.tokenizer_directory,
                max_length=self.description["max_sample_length"],
                can_mask=True,
            )

    def make_backbone(self) -> Backbone:
        """From scratch, or pretrained and resized."""
        arguments = self.arguments
        model_class = AutoModelForMaskedLM if self._is_masked else AutoModelForCausalLM
        if arguments.model_path is not None:
            return pretrained_backbone(
                arguments.model_path, vocab_size=self._vocab_size, model_class=model_class
            )
        return new_backbone(
            arguments.model_config,
            vocab_size=self._vocab_size,
            max_length=self.description["max_sample_length"],
            special_token_ids=self.description["special_token_ids"],
            dropout=arguments.dropout,
            model_class=model_class,
        )

    def make_data(self, arguments: TrainArguments) -> DatasetDataModule:
        """Out of the memory-mapped corpora."""
        return DatasetDataModule(
            self.dataset,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            batching=arguments.batching,
            masking=self._masking() if self._is_masked else None,
            accumulate_grad_batches=arguments.accumulate_grad_batches,
            max_epochs=arguments.max_epochs,
            limit_train_batches=arguments.limit_train_batches,
            limit_val_batches=arguments.limit_val_batches,
        )

    def make_module(self, backbone: Backbone, arguments: TrainArguments) -> TrainingModule:
        """Predict the next token, or the hidden ones."""
        if self._is_masked:
            return MaskedLanguageModelling(backbone, arguments)
        return CausalLanguageModelling(backbone, arguments, bytes_per_target=self._bytes_per_target)

    @property
    def num_context_tokens(self) -> int:
        """Of a mean sample, or of a row that is cut from all samples."""
        if self.arguments.batching == "concatenated":
            return int(self.description["max_sample_length"])
        num_samples = max(1, self.description["number_of_train_samples"])
        return int(self.description["number_of_train_tokens"] / num_samples)

    @property
    def num_row_tokens(self) -> int:
        """Filled rows have the greatest length."""
        if self.arguments.batching != "length":
            return int(self.description["max_sample_length"])
        return self.num_context_tokens

    def callbacks(self, directory: Path) -> list[pl.Callback]:
        """A causal language model shows texts."""
        if self._is_masked:
            return []
        arguments = self.arguments
        samples = SampleParameters(num_samples=arguments.num_generated_samples, seed=arguments.seed)
        return [SampleTexts(directory, self._tokenizer, samples)]

    def export_fields(self) -> dict[str, Any]:
        """How tokens were hidden, so that an evaluation hides them alike."""
        arguments = self.arguments
        if not self._is_masked:
            return {}
        options = {
            "probability": arguments.mask_probability,
            "whole_words": arguments.whole_word_masking,
        }
        return {"masking": options}

    def _masking(self) -> Masking:
        arguments = self.arguments
        mask_id: int = open_tokenizer(self.tokenizer_directory).mask_token_id
        return make_masking(
            self._tokenizer,
            mask_id=mask_id,
            vocab_size=self._vocab_size,
            probability=arguments.mask_probability,
            whole_words=arguments.whole_word_masking,
            seed=arguments.seed,
        )
