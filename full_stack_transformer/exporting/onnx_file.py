"""ONNX files: token ids -> logits, without a key-value cache, by PyTorch's own exporter."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from full_stack_transformer.arguments.exporting import ExportArguments
from full_stack_transformer.errors import ModelError
from full_stack_transformer.exporting.checking import (
    NUM_NEW_TOKENS,
    compare_continuations,
    questions_for,
)
from full_stack_transformer.exporting.source import Source
from full_stack_transformer.modelling.backbones import context_length

logger = logging.getLogger(__name__)

ONNX_FILE_NAME = "model.onnx"
# One file of ONNX's own format holds at most 2 GB.
_MAX_BYTES_WITHIN = 1 << 30


class _Logits(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, tokens) -> (batch, tokens, vocabulary)"""
        logits: Tensor = self.backbone(input_ids=input_ids, use_cache=False).logits
        return logits


def write_onnx(source: Source, directory: Path) -> None:
    """Write model.onnx, and model.onnx.data with the weights of large models.

    Raises:
        ModelError: PyTorch cannot export this architecture.
    """
    longest = context_length(source.backbone.config)
    dynamic = {
        "input_ids": {
            0: torch.export.Dim("batch"),
            1: torch.export.Dim("tokens", min=1, max=longest),
        }
    }
    num_bytes = sum(weight.nbytes for weight in source.backbone.parameters())
    try:
        with warnings.catch_warnings():  # of its own parts
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Logits(source.backbone).eval(),
                (torch.zeros(2, 3, dtype=torch.long),),
                directory / ONNX_FILE_NAME,
                input_names=["input_ids"],
                output_names=["logits"],
                dynamic_shapes=dynamic,
                external_data=num_bytes > _MAX_BYTES_WITHIN,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"PyTorch cannot export {source.backbone.config.model_type} to ONNX: {reason}"
        ) from error


def check_onnx(source: Source, directory: Path, arguments: ExportArguments) -> None:
    """Compare greedy tokens of ONNX Runtime with ours; logs a line.

    Raises:
        ModelError: they differ.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(
        str(directory / ONNX_FILE_NAME), providers=["CPUExecutionProvider"]
    )

    def next_tokens(prompt: Sequence[int]) -> list[int]:
        ids = list(prompt)
        for _ in range(NUM_NEW_TOKENS):
            (logits,) = session.run(["logits"], {"input_ids": np.array([ids], dtype=np.int64)})
            ids.append(int(logits[0, -1].argmax()))
        return ids[len(prompt) :]

    prompts = questions_for(source, arguments).prompts
    engine = f"ONNX Runtime {onnxruntime.__version__}"
    found = [next_tokens(prompt) for prompt in prompts]
    line = compare_continuations(source.backbone, prompts, found, "float32", engine)
    logger.info("checked with %s: %s", engine, line)
