"""Options of fst export."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

from full_stack_transformer.arguments.checks import OwnClassesOptions, at_least
from full_stack_transformer.arguments.models import AdapterArguments, ModelArguments
from full_stack_transformer.errors import UsageError

ExportFormat = Literal["huggingface", "gguf", "onnx", "ollama"]
ExportDtype = Literal["auto", "float32", "float16", "bfloat16", "q8_0", "q4_0"]
# What each format can hold.
_FULL = ("auto", "float32", "float16", "bfloat16")
_DTYPES = {
    "huggingface": _FULL,
    "gguf": (*_FULL, "q8_0", "q4_0"),
    "ollama": (*_FULL, "q8_0", "q4_0"),
    "onnx": ("auto", "float32"),
}


@dataclass(frozen=True)
class ExportArguments(OwnClassesOptions, AdapterArguments, ModelArguments):
    """Write a model in the format of another engine, after a check that the engine computes the same; print
    the path."""

    _: KW_ONLY
    format: ExportFormat
    """huggingface: model directory for transformers, vLLM and SGLang. gguf: one file for llama.cpp. ollama:
    a directory with a GGUF file and a Modelfile. onnx: a directory for ONNX Runtime, without key-value
    cache."""
    output: Path
    """File (gguf) or directory to write; must not exist."""
    dtype: ExportDtype = "auto"
    """Type of the weights. auto: as they are saved. q8_0 and q4_0: rounded to 8 and 4 bits (gguf, ollama)."""
    check: bool = True
    """Ask the engine for token ids, greedy tokens and the chat template, and write nothing if they differ.
    Skipped with a warning where the engine is not installed."""
    check_python: Path | None = None
    """Python interpreter that has llama-cpp-python. Default: this one."""
    num_check_texts: int = 10000
    """Texts whose token ids are compared."""
    num_check_prompts: int = 100
    """Prompts whose greedy continuations are compared."""

    def __post_init__(self) -> None:
        """Raise UsageError for values that can never work."""
        at_least(self, 1, "num_check_texts", "num_check_prompts")
        if self.dtype not in _DTYPES[self.format]:
            raise UsageError(
                f"--format {self.format} has no weights of type {self.dtype}; choose one of "
                f"{', '.join(_DTYPES[self.format])}"
            )
        if self.output.exists():
            raise UsageError(f"{self.output} exists; remove it, or name another path with --output")
        if self.format == "gguf" and self.output.suffix != ".gguf":
            raise UsageError(f"--output must be a file that ends in .gguf, found {self.output}")
        if self.check_python is not None and self.format not in ("gguf", "ollama"):
            raise UsageError("--check_python is for --format gguf and ollama; omit it")
