"""The models of the benchmark of generation in numbers, and what they ask of a processor.

Knows nothing of who generates.
"""

from dataclasses import dataclass

WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.5625}
"""Classes of subjects, and bytes of a weight; 32 of 4 bits share a scale of 16."""
AIMS = {"float32": 1.0, "bfloat16": 1.0, "int8": 1.15, "int4": 1.0}
"""What ours is to be at least, relative to the best peer of the class."""
_MANY_STREAMS = 32


@dataclass(frozen=True)
class Cell:
    """A column of the table: how many generate at once, and how much."""

    label: str
    num_streams: int
    num_prompt: int
    num_new: int

    @property
    def is_decoding(self) -> bool:
        """Not only reading a prompt."""
        return self.num_new > 1


@dataclass(frozen=True)
class Shape:
    """A model."""

    name: str
    vocab_size: int
    num_layers: int
    hidden_size: int
    layer_weights: int
    """In the matrices of a layer."""

    @property
    def num_layer_weights(self) -> int:
        """Each multiplies every token."""
        return self.num_layers * self.layer_weights

    @property
    def num_weights(self) -> int:
        """With the matrix that makes logits, which only the last token of a prompt needs."""
        return self.num_layer_weights + self.hidden_size * self.vocab_size


SHAPES = (
    Shape("gpt2", 50_257, 12, 768, 12 * 768**2),
    Shape("llama", 32_000, 12, 768, 4 * 768**2 + 3 * 768 * 2048),
    Shape("smollm2", 49_152, 30, 576, 2 * 576 * (576 + 192) + 3 * 576 * 1536),
)


def share_of_limit(
    shape: Shape, weights: str, cell: Cell, rate: float, limits: dict[str, float]
) -> float | None:
    """What part of the processor's best a rate takes; attention is not counted.

    With one stream all weights are read for each token; with many, and in a prompt, they are multiplied.
    In between both are far away, and there is none.

    Args:
        rate: tokens per second.
        limits: bytes read per second, and operations per second of each class.
    """
    if not cell.is_decoding:
        return rate * 2 * shape.num_layer_weights / limits[weights]
    if cell.num_streams == 1:
        return rate * WEIGHT_BYTES[weights] * shape.num_weights / limits["read"]
    if cell.num_streams >= _MANY_STREAMS:
        return rate * 2 * shape.num_weights / limits[weights]
    return None
