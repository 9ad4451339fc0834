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
from full_stack_transformer.machine import free_memory_bytes, multiplies_bfloat16
from full_stack_transformer.modelling.backbones import context_length

logger = logging.getLogger(__name__)

# Fraction of the free memory that keys and values may take.
_MAX_MEMORY_FRACTION = 0.7
# Of logits read in pieces to those read at once, in bfloat16; what is computed wrong is about 1 off.
_MAX_CACHE_ERROR = 0.1
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
    num_slots = _fitting_slots(backbone, num_slots, max_length, weights_dtype)
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
        return NativeRunner(
            backbone, num_slots=num_slots, weights_dtype=weights_dtype, max_length=max_length
        )
    if weights_dtype == "int8":
        raise ModelError(
            f"--weights_dtype int8 needs the C++ decoder, which cannot run this model here: {problem}; "
            "pass bfloat16 or float32"
        )
    if next(backbone.parameters()).device.type == "cpu":
        logger.warning(
            "generating through PyTorch, which is slower than the C++ decoder: %s", problem
        )
    backbone = backbone.to(_TORCH_TYPES[weights_dtype])
    runner = TorchRunner(backbone, num_slots=num_slots, max_length=max_length)
    _check_cache(backbone, runner)
    return runner


@torch.inference_mode()
def _check_cache(backbone: Backbone, runner: Runner) -> None:
    """Compare a short text read in pieces with the same text read at once, without a cache.

    Raises:
        ModelError: they differ, as where a model keeps something else than keys and values.
    """
    length = min(9, runner.max_length)
    ids = [number % runner.vocab_size for number in range(3, 3 + length)]
    device = next(backbone.parameters()).device
    try:
        expected = backbone(torch.tensor([ids], device=device), use_cache=False).logits[0, -1]
        runner.run([SlotWork(0, 0, ids[:-3], num_logits=0)])
        runner.run([SlotWork(0, length - 3, ids[-3:-1], num_logits=0)])
        found = runner.run([SlotWork(0, length - 1, ids[-1:])])[0]
    except Exception as error:  # each architecture fails in its own way
        raise _no_cache(backbone, f"{type(error).__name__}: {error}") from error
    distance = float((found - expected).float().norm() / expected.float().norm())
    if not distance < _MAX_CACHE_ERROR:
        raise _no_cache(backbone, f"its cached logits are {distance:.0%} off")


def _no_cache(backbone: Backbone, reason: str) -> ModelError:
    return ModelError(
        f"{backbone.config.model_type} cannot be generated with here, as it does not keep plain keys and "
        f"values of the tokens before: {reason.splitlines()[0]}"
    )


def _fitting_slots(
    backbone: Backbone, num_slots: int, max_length: int, weights_dtype: WeightsDtype
) -> int:
    """As many slots as are asked for, or as memory holds."""
    config = backbone.config
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    num_values = 2 * config.num_hidden_layers * heads * head_size * max_length
    slot_bytes = num_values * (4 if weights_dtype == "float32" else 2)
    free_bytes = free_memory_bytes(backbone.device)
    if free_bytes is None:
        return num_slots
    fitting = int(free_bytes * _MAX_MEMORY_FRACTION) // slot_bytes
    if fitting < 1:
        raise MachineError(
            f"a request of {max_length:,} tokens needs {slot_bytes / 1e6:,.0f} MB for its keys and values, "
            f"{free_bytes / 1e6:,.0f} MB are free; choose a smaller model"
        )
    if fitting < num_slots:
        logger.warning("memory holds %d requests at once, not %d", fitting, num_slots)
    return min(num_slots, int(fitting))
