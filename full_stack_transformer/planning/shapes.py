"""Sizes of a model: from a preset, a JSON file or a number of parameters; weights and FLOPs.

    N parameters, L layers, d width, H heads, V vocabulary, T tokens of context

Never imports torch: the presets are counted, and a test compares the counts with the real models.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from full_stack_transformer.arguments.training import MODEL_PRESETS
from full_stack_transformer.errors import ModelError, UsageError

# Layers, width and heads, as modelling/backbones.py has them.
_PRESETS = {
    "tiny": (2, 64, 2),
    "micro": (2, 128, 2),
    "mini": (4, 192, 3),
    "small": (6, 384, 6),
    "base": (12, 768, 12),
}
_NEEDED_FIELDS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
# A preset is taken for a number of parameters that differs by this part of it at most.
_LIKE_A_PRESET = 0.1
# From this width on heads are 128 wide and eight or fewer of them have keys, as in Llama 3.
_LARGE_WIDTH = 2048
_MOST_KEY_HEADS = 8
# Width / layers. From 50 to 200 the loss hardly depends on it (Kaplan et al. 2020, arXiv 2001.08361, section
# 3.1); the presets have 32 to 64, Llama 7B has 128.
_ASPECT = 90.0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder with rotary positions, RMSNorm, SwiGLU and tied embeddings; gpt2 has GELU and positions."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_key_heads: int
    intermediate_size: int
    vocab_size: int
    option: str
    """What --model_config takes; empty if a file has to be written first."""
    num_positions: int = 0
    """Learned positions."""
    num_mlp_matrices: int = 3
    """SwiGLU has three, GELU two."""
    is_tied: bool = True
    """Whether the output head is the table of embeddings."""
    head_size: int = 0
    """Width of a head; 0 for hidden_size / num_heads."""

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.head_size or self.hidden_size // self.num_heads

    @property
    def key_width(self) -> int:
        """Width of all keys of a token in a layer."""
        return self.head_width * self.num_key_heads

    @property
    def layer_weights(self) -> int:
        """Weights of the matrices of a layer."""
        attention = 2 * self.hidden_size * (self.head_width * self.num_heads + self.key_width)
        return attention + self.num_mlp_matrices * self.hidden_size * self.intermediate_size

    @property
    def num_parameters(self) -> int:
        """Without norms and biases, which are less than a hundredth; tied weights once."""
        tables = (
            self.vocab_size * (1 if self.is_tied else 2) + self.num_positions
        ) * self.hidden_size
        return self.num_layers * self.layer_weights + tables

    def flops_per_token(self, num_context_tokens: float) -> float:
        """FLOPs of forward and backward: 6 N + 12 L H Q T (Chowdhery et al. 2022, PaLM, appendix B).

        N counts the matrices that multiply, with the output head and without tables, as
        `modelling.acceleration.flops_per_token` counts a real model.
        """
        matrices = self.num_layers * self.layer_weights + self.vocab_size * self.hidden_size
        width = self.head_width * self.num_heads
        return 6.0 * matrices + 12.0 * self.num_layers * width * num_context_tokens

    def config(self) -> dict[str, Any]:
        """The fields of a transformers config, for a file that --model_config names."""
        return {
            "model_type": "llama",
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_key_heads,
            "tie_word_embeddings": self.is_tied,
        }

    @property
    def words(self) -> str:
        """Layers, width and heads."""
        return f"{self.num_layers} layers x {self.hidden_size}, {self.num_heads} heads"


def default_vocab_size(num_parameters: float) -> int:
    """A vocabulary for a size; larger models use more (Tao et al. 2024, arXiv 2407.13623), in powers of two.

    Up to 65,536 a token takes two bytes on the disk.
    """
    sizes = ((1e6, 1024), (3e7, 4096), (3e8, 16_384), (3e9, 32_768))
    return next((size for most, size in sizes if num_parameters < most), 65_536)


def shape_of_option(option: str, vocab_size: int, max_length: int) -> Shape:
    """What --model_config names.

    Raises:
        UsageError: there is no such preset or file.
        ModelError: the file does not give the sizes of a decoder.
    """
    name = option.removeprefix("decoder-")
    if name == "gpt2":
        return Shape(
            num_layers=12,
            hidden_size=768,
            num_heads=12,
            num_key_heads=12,
            intermediate_size=3072,
            vocab_size=vocab_size,
            option=option,
            num_positions=max_length,
            num_mlp_matrices=2,
        )
    if name in _PRESETS:
        return _decoder(*_PRESETS[name], vocab_size=vocab_size, option=option)
    path = Path(option)
    if not path.is_file():
        raise UsageError(
            f"--model_config must be one of {', '.join(MODEL_PRESETS)}, or a JSON file; found {option!r}"
        )
    return _shape_of_file(path, vocab_size)


def _shape_of_file(path: Path, vocab_size: int) -> Shape:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        sizes = [int(fields[name]) for name in _NEEDED_FIELDS]
        if min(sizes) < 1:
            raise ValueError(f"{_NEEDED_FIELDS[sizes.index(min(sizes))]} must be above 0")
        layers, width, heads, intermediate = sizes
        return Shape(
            num_layers=layers,
            hidden_size=width,
            num_heads=heads,
            num_key_heads=int(fields.get("num_key_value_heads") or heads),
            intermediate_size=intermediate,
            vocab_size=vocab_size,
            option=str(path),
            is_tied=bool(fields.get("tie_word_embeddings", False)),
            head_size=int(fields.get("head_dim") or 0),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ModelError(
            f"{path} should be a JSON object with model_type, {', '.join(_NEEDED_FIELDS)}: {why}; "
            "or pass --parameters"
        ) from error


def shape_of_size(num_parameters: float, vocab_size: int, *, takes_preset: bool = True) -> Shape:
    """The decoder that is nearest to a number of parameters.

    Args:
        num_parameters: what is wanted.
        vocab_size: of the tokenizer.
        takes_preset: whether a preset of about this size is taken.

    Raises:
        UsageError: the embeddings alone are larger.
    """
    if takes_preset:
        for name in _PRESETS:
            preset = shape_of_option(name, vocab_size, 0)
            if abs(preset.num_parameters / num_parameters - 1) <= _LIKE_A_PRESET:
                return preset
    best = min(_candidates(num_parameters, vocab_size), key=lambda one: one[0], default=None)
    if best is None:
        raise UsageError(
            f"--parameters {num_parameters:.3g} are too few for a vocabulary of {vocab_size:,} tokens; pass "
            "a smaller --vocab_size or more parameters"
        )
    return best[1]


def _candidates(num_parameters: float, vocab_size: int) -> list[tuple[float, Shape]]:
    """Decoders of about this size, with how far they are from it and from the usual proportions."""
    found = []
    step = 32
    width = step
    while width <= 65_536:
        layer = _decoder(1, width, _num_heads(width), vocab_size=vocab_size).layer_weights
        num_layers = round((num_parameters - vocab_size * width) / layer)
        if num_layers >= 1:
            shape = _decoder(num_layers, width, _num_heads(width), vocab_size=vocab_size)
            size_error = abs(math.log(shape.num_parameters / num_parameters))
            found.append((10 * size_error + abs(math.log(width / num_layers / _ASPECT)), shape))
        step = 32 if width < 256 else 64 if width < _LARGE_WIDTH else 256
        width += step
    return found


def _num_heads(width: int) -> int:
    size = 128 if width >= _LARGE_WIDTH else 64 if width % 64 == 0 else 32
    return width // size


def _decoder(
    num_layers: int, hidden_size: int, num_heads: int, *, vocab_size: int, option: str = ""
) -> Shape:
    num_key_heads = num_heads
    if hidden_size >= _LARGE_WIDTH:
        fitting = (count for count in range(_MOST_KEY_HEADS, 0, -1) if num_heads % count == 0)
        num_key_heads = next(fitting)
    return Shape(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_key_heads=num_key_heads,
        # SwiGLU has three matrices where GELU has two: 8/3 of the width, in multiples of 64.
        intermediate_size=-(-hidden_size * 8 // 3 // 64) * 64,
        vocab_size=vocab_size,
        option=option,
    )
