"""Memory and disk of a training and of serving, by formulas.

    memory of a device = weights + gradients + optimizer + activations + logits + libraries
    disk               = documents + dataset + checkpoints + model directories

All in bytes. Weights, gradients and optimizer states are fp32, as `fst train` keeps them in every precision.
"""

from dataclasses import dataclass
from typing import Literal

from full_stack_transformer.planning.shapes import Shape

Strategy = Literal["one device", "ddp", "fsdp"]

_FP32 = 4
# CUDA's context, kernels and what the allocator cannot use; on a processor the libraries.
LIBRARY_BYTES = 1.0e9
# Bytes of activations for a token, a layer and a unit of width: 34 in 16 bit by equation 1 of Korthikanti et
# al. 2022 (arXiv 2205.05198), without the 5 a s / h of attention scores, which fused attention never stores.
_ACTIVATION_BYTES = 34.0
# With activation checkpointing the input of each layer alone, in 16 bit (section 5).
_CHECKPOINTED_BYTES = 2.0
# Logits in the training's type, and their gradient in fp32 (modelling/losses.py).
_LOGIT_BYTES = 6.0
# A checkpoint may exist as last.ckpt, previous.ckpt and best.ckpt, and one more while it is written.
NUM_CHECKPOINTS = 4
# Of what a GPU has: the rest is left for fragments and for what no formula knows.
USABLE_FRACTION = 0.92
_POSITION_BYTES = 8


def optimizer_bytes(shape: Shape, optimizer: str) -> float:
    """AdamW keeps two moments of each weight; Muon one of each matrix, and AdamW does the tables."""
    matrices = shape.num_layers * shape.layer_weights
    if optimizer == "muon":
        return _FP32 * (matrices + 2 * (shape.num_parameters - matrices))
    return 2 * _FP32 * shape.num_parameters


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Of one device, in bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    libraries: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.libraries


def training_memory(
    shape: Shape,
    *,
    optimizer: str,
    strategy: Strategy,
    num_devices: int,
    tokens_per_batch: float,
    checkpointed: bool,
    bfloat16: bool,
) -> TrainingMemory:
    """What one device needs.

    DDP copies everything to each device, and keeps gradients a second time in the buckets that it sends. FSDP
    divides weights, gradients and optimizer by the devices (Rajbhandari et al. 2020, ZeRO-3, section 5), and
    gathers two layers at a time.

    Args:
        shape: the model.
        optimizer: adamw or muon.
        strategy: how devices share the work.
        num_devices: of all machines.
        tokens_per_batch: of a device.
        checkpointed: whether activations are recomputed.
        bfloat16: whether activations are 16 bit.
    """
    parts = num_devices if strategy == "fsdp" else 1
    weights = _FP32 * shape.num_parameters
    gathered = 2 * _FP32 * max(shape.layer_weights, shape.vocab_size * shape.hidden_size)
    width = 1.0 if bfloat16 else 2.0
    per_unit = tokens_per_batch * shape.hidden_size * width
    activations = per_unit * shape.num_layers * _ACTIVATION_BYTES
    if checkpointed:
        activations = per_unit * (shape.num_layers * _CHECKPOINTED_BYTES + _ACTIVATION_BYTES)
    return TrainingMemory(
        weights=weights / parts + (gathered if parts > 1 else 0),
        gradients=weights / parts * (2 if strategy == "ddp" else 1),
        optimizer=optimizer_bytes(shape, optimizer) / parts,
        activations=activations + tokens_per_batch * shape.vocab_size * _LOGIT_BYTES * width,
        libraries=LIBRARY_BYTES,
    )


def checkpoint_bytes(shape: Shape, optimizer: str) -> float:
    """One checkpoint: weights and the optimizer's state."""
    return _FP32 * shape.num_parameters + optimizer_bytes(shape, optimizer)


def model_bytes(shape: Shape) -> float:
    """A model directory, fp32."""
    return _FP32 * shape.num_parameters


def token_bytes(vocab_size: int) -> int:
    """Bytes of a token in a dataset, as datasets/corpus.py writes it."""
    return 2 if vocab_size <= 1 << 16 else 4


def dataset_bytes(num_tokens: float, vocab_size: int, tokens_per_sample: float) -> float:
    """A dataset directory: tokens, and where each sample starts."""
    return num_tokens * (token_bytes(vocab_size) + _POSITION_BYTES / tokens_per_sample)


def cache_bytes_per_token(shape: Shape, *, value_bytes: int = 2) -> float:
    """Keys and values of one token in all layers: 2 L K bytes, K the width of the keys."""
    return 2.0 * shape.num_layers * shape.key_width * value_bytes


@dataclass(frozen=True, kw_only=True)
class ServingMemory:
    """What serving needs, in bytes."""

    weights: float
    cache_per_text: float
    """Keys and values of one text of full length."""
    num_texts: int
    """Texts of full length that fit at once; 0 where the weights do not fit."""


def serving_memory(
    shape: Shape, *, max_length: int, memory_bytes: float, weight_bytes: float
) -> ServingMemory:
    """Weights, and how many texts fit beside them on one device."""
    weights = weight_bytes * shape.num_parameters
    cache = cache_bytes_per_token(shape) * max_length
    room = USABLE_FRACTION * memory_bytes - LIBRARY_BYTES - weights
    return ServingMemory(
        weights=weights, cache_per_text=cache, num_texts=max(0, int(room // cache))
    )
