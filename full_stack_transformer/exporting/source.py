"""The model that is exported: weights with adapters added, tokenizer, chat template, settings."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.arguments.exporting import ExportArguments
from full_stack_transformer.modelling.model_directory import open_model
from full_stack_transformer.modelling.other_files import json_of
from full_stack_transformer.modelling.places import ModelPlace, find_model
from full_stack_transformer.modelling.pretrained import GENERATION_CONFIG_FILE_NAME, read_start
from full_stack_transformer.tokenization.chat import ChatTemplate, load_chat_template
from full_stack_transformer.tokenization.document_tokenizer import DocumentTokenizer


@dataclass(frozen=True)
class Source:
    """A causal language model, opened."""

    name: str
    backbone: Backbone
    """With fp32 weights."""
    tokenizer: DocumentTokenizer
    template: ChatTemplate
    settings: dict[str, Any]
    """The content of generation_config.json."""
    dtype: str
    """In which the weights were saved."""
    place: ModelPlace = field(repr=False)

    @cached_property
    def num_embeddings(self) -> int:
        """Rows of the embedding matrix: at least one per token."""
        return int(self.backbone.get_input_embeddings().num_embeddings)

    @cached_property
    def end_ids(self) -> list[int]:
        """Tokens that end a text or an answer, without repetitions."""
        named = self.settings.get("eos_token_id")
        listed = named if isinstance(named, list) else [named]
        found = [*listed, self.tokenizer.end_id, *sorted(self.template.stop_ids(self.tokenizer))]
        return list(dict.fromkeys(int(one) for one in found if one is not None))


def open_source(arguments: ExportArguments) -> Source:
    """Open what is exported; an adapter is added to its base.

    Raises:
        ModelError: there is no causal language model, or it is damaged.
    """
    opened = open_model(arguments.model, base=arguments.base, device="cpu", dtype=torch.float32)
    place = find_model(arguments.model, arguments.base)
    return Source(
        name=opened.name,
        backbone=opened.backbone,
        tokenizer=opened.tokenizer,
        template=load_chat_template(place.tokenizer),
        settings=json_of(place.directory / GENERATION_CONFIG_FILE_NAME),
        dtype=read_start(str(place.directory)).dtype or "float32",
        place=place,
    )
