"""Opens an engine for a model, on the fastest runner of this machine."""

import logging
from typing import Literal

import torch
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.errors import MachineError, ModelError
from full_stack_transformer.generation.engine import Engine
from full_stack_transformer.generation.runners.native.decoder import (
    NativeRunner,
    WeightsDtype,
    why_not_native,
)
from full_stack_transformer.generation.runners.torch import Runner, SlotWork, TorchRunner
from full_stack_transformer.machine import (
    free_memory_bytes,
    is_out_of_memory,
    memory_for,
    multiplies_bfloat16,
)
from full_stack_transformer.modelling.backbones import context_length, convert, num_parameters

logger = logging.getLogger(__name__)

# Fraction of the free memory that keys and values may take.
_MAX_MEMORY_FRACTION = 0.7
# Shorter slots are of no use.
_MIN_TOKENS = 256
# Of logits read in pieces to those read at once: 1e-6 in fp32, up to 0.25 with weights that came in bfloat16;
# what is computed wrong is about 1 off.
_MAX_CACHE_ERROR, _MAX_ROUNDED_CACHE_ERROR = 0.01, 0.5
_TORCH_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def open_engine(
    backbone: Backbone,
    *,
    num_slots: int,
    weights_dtype: Literal["auto"] | WeightsDtype = "auto",
    max_length: int | None = None,
) -> Engine:
    """An engine for up to `num_slots` requests at once; if memory is short, fewer, with a warning.

    Args:
        backbone: in evaluation mode, where it is to compute.
        num_slots: requests under way at once.
        weights_dtype: auto is bfloat16 where the hardware multiplies it, else float32.
        max_length: tokens of a request at most; none for the model's context.

    Raises:
        ModelError: the weights cannot be had in that type here.
        MachineError: memory is short for a single request.
    """
    if weights_dtype == "auto":
        weights_dtype = "bfloat16" if multiplies_bfloat16(backbone.device) else "float32"
    max_length = min(max_length or context_length(backbone.config), context_length(backbone.config))
    num_slots, max_length = _fitting(backbone, num_slots, max_length, weights_dtype)
    runner = open_runner(
        backbone, num_slots=num_slots, weights_dtype=weights_dtype, max_length=max_length
    )
    logger.info("generating with %s", runner.name)
    return Engine(runner)


def open_runner(
    backbone: Backbone, *, num_slots: int, weights_dtype: WeightsDtype, max_length: int
) -> Runner:
    """The fastest runner of this machine for weights of this type.

    Raises:
        ModelError: the weights cannot be had in that type here.
        MachineError: memory is short.
    """
    problem = why_not_native(backbone)
    if problem is None:
        # PyTorch then only draws tokens; its threads would spin while they wait and slow down the decoder's:
        # 184 tokens/s with one of them, 121 with two.
        torch.set_num_threads(1)
        with memory_for(f"the {weights_dtype} weights of the C++ decoder"):
            return NativeRunner(
                backbone, num_slots=num_slots, weights_dtype=weights_dtype, max_length=max_length
            )
    if weights_dtype in ("int8", "int4"):
        raise ModelError(
            f"--weights_dtype {weights_dtype} needs the C++ decoder, which cannot run this model here: "
            f"{problem}; pass bfloat16 or float32"
        )
    if next(backbone.parameters()).device.type == "cpu":
        logger.warning(
            "generating through PyTorch, which is slower than the C++ decoder: %s", problem
        )
    with memory_for(f"{weights_dtype} weights and a short text"):
        _check_cache(backbone, max_length)
        backbone = convert(backbone, _TORCH_TYPES[weights_dtype])
    return TorchRunner(backbone, num_slots=num_slots, max_length=max_length)


@torch.inference_mode()
def _check_cache(backbone: Backbone, max_length: int) -> None:
    """Compare a short text read in pieces with the same text read at once, without a cache.

    With the weights as they were opened, before they are rounded: then what is computed wrong is far from
    what rounding does.

    Raises:
        ModelError: they differ, as where a model keeps something else than keys and values.
    """
    what, length = backbone.config.model_type, min(9, max_length)
    runner = TorchRunner(backbone, num_slots=1, max_length=length)
    # From the middle of the vocabulary: control tokens are at its ends, and some have never been trained.
    ids = [(runner.vocab_size // 2 + 7 * number) % runner.vocab_size for number in range(length)]
    device = next(backbone.parameters()).device
    try:
        expected = backbone(torch.tensor([ids], device=device), use_cache=False).logits[0, -1]
        runner.run([SlotWork(0, 0, ids[:-3], num_logits=0)])
        runner.run([SlotWork(0, length - 3, ids[-3:-1], num_logits=0)])
        found = runner.run([SlotWork(0, length - 1, ids[-1:])])[0]
    except Exception as error:  # each architecture fails in its own way
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise ModelError(
            f"{what} cannot be generated with here: reading a text in pieces failed with {reason}"
        ) from error
    distance = float((found - expected).float().norm() / expected.float().norm())
    is_exact = backbone.dtype == torch.float32
    if not distance < (_MAX_CACHE_ERROR if is_exact else _MAX_ROUNDED_CACHE_ERROR):
        raise ModelError(
            f"{what} cannot be generated with here: its scores for a text that is read in pieces are "
            f"{distance:.0%} off those for the whole text; it may keep something else than keys and values"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _fitting(
    backbone: Backbone, num_slots: int, max_length: int, weights_dtype: WeightsDtype
) -> tuple[int, int]:
    """Slots and tokens of each, as many as are asked for, or as memory holds if all are full.

    Raises:
        MachineError: memory is short for a single short text.
    """
    config = backbone.config
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    token_bytes = 2 * config.num_hidden_layers * heads * head_size
    token_bytes *= 4 if weights_dtype == "float32" else 2
    free_bytes = free_memory_bytes(backbone.device)
    if free_bytes is None:
        return num_slots, max_length
    free_bytes = max(0, free_bytes - _converted_bytes(backbone, weights_dtype))
    num_tokens = int(free_bytes * _MAX_MEMORY_FRACTION) // token_bytes
    if num_tokens < min(max_length, _MIN_TOKENS):
        raise MachineError(
            f"a text of {min(max_length, _MIN_TOKENS)} tokens needs "
            f"{min(max_length, _MIN_TOKENS) * token_bytes / 1e6:,.0f} MB for its keys and values, "
            f"{free_bytes / 1e6:,.0f} MB are free; free some memory or choose a smaller model"
        )
    fitting_slots, fitting_length = num_tokens // max_length, max_length
    if not fitting_slots:
        fitting_slots, fitting_length = 1, num_tokens
        logger.warning(
            "memory holds one text of %s tokens, not of the model's %s",
            *(f"{num_tokens:,}", f"{max_length:,}"),
        )
    elif fitting_slots < num_slots:
        logger.warning(
            "memory holds %d texts of %s tokens at once, not %d; fst serve --max_length allows shorter ones",
            *(fitting_slots, f"{max_length:,}", num_slots),
        )
    return min(num_slots, fitting_slots), fitting_length


def _converted_bytes(backbone: Backbone, weights_dtype: WeightsDtype) -> int:
    """What the runner's own weights will take beside those of the backbone."""
    is_kept = why_not_native(backbone) is not None and backbone.dtype == _TORCH_TYPES.get(
        weights_dtype
    )
    size = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 1}[weights_dtype]
    return 0 if is_kept else size * num_parameters(backbone)
