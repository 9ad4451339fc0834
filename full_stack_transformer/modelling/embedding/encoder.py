"""Texts to vectors: a transformer, its tokenizer, and the head that pools token vectors into one.

Opens the format of sentence-transformers. A directory without modules.json, such as that of a masked
language model, uses the mean over tokens, as that library does.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.errors import ModelError
from full_stack_transformer.modelling.backbones import context_length
from full_stack_transformer.modelling.embedding.head import Head, needs_first_layer, read_head
from full_stack_transformer.modelling.model_directory import moved, resolve_device
from full_stack_transformer.modelling.model_files import find_model_directory
from full_stack_transformer.modelling.pretrained import load_backbone


class SentenceEncoder:
    """A transformer, its tokenizer and a head, ready to use.

    Args:
        backbone: without a task head, in evaluation mode.
        tokenizer: of the model.
        head: makes one vector from token vectors.
        max_length: maximum tokens of a text; the rest is cut off.
    """

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: PreTrainedTokenizerFast,
        head: Head,
        *,
        max_length: int,
    ) -> None:
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.head = head
        self.max_length = max_length
        # Outputs of the tokenizer that the model takes.
        self._inputs = inspect.signature(backbone.forward).parameters.keys()

    @property
    def dimension(self) -> int:
        """Width of an embedding."""
        denses = self.head.denses
        return len(denses[-1].weight) if denses else int(self.backbone.config.hidden_size)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], *, batch_size: int = 32) -> NDArray[np.float32]:
        """A vector for each text, in order: (texts, D)."""
        found = np.zeros((len(texts), self.dimension), np.float32)
        # Texts of similar length share a batch: less padding.
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        for start in range(0, len(order), batch_size):
            indexes = order[start : start + batch_size]
            found[indexes] = self._encode_batch([texts[index] for index in indexes])
        return found

    def _encode_batch(self, texts: list[str]) -> NDArray[np.float32]:
        encoding = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.backbone.device)
        inputs = {name: tensor for name, tensor in encoding.items() if name in self._inputs}
        uses_first = needs_first_layer(self.head.pooling)
        outputs = self.backbone(**inputs, output_hidden_states=uses_first)
        vectors = self.head(
            outputs.last_hidden_state,
            inputs["attention_mask"],
            first=outputs.hidden_states[1] if uses_first else None,
        )
        array: NDArray[np.float32] = vectors.float().cpu().numpy()
        return array


def open_sentence_encoder(path: Path, *, device: str = "auto") -> SentenceEncoder:
    """Open a model directory, or that of an experiment, to embed texts.

    Raises:
        ModelError: there is no model, weights are missing, or modules.json has an unknown module.
    """
    directory = find_model_directory(path)
    backbone = load_backbone(str(directory), dtype=torch.float32, model_class=AutoModel)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"no tokenizer at {directory}: {reason}") from error
    torch_device = resolve_device(device)
    head, max_length = read_head(directory, device=torch_device)
    longest = min(context_length(backbone.config), tokenizer.model_max_length)
    return SentenceEncoder(
        moved(backbone, torch_device).eval(),
        tokenizer,
        head,
        max_length=min(max_length or longest, longest),
    )
