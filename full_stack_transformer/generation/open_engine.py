"""Opens an engine for a model, on the fastest runner of this machine, with as much memory as may be used."""

import logging
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.errors import MachineError, ModelError
from full_stack_transformer.generation.blocks import KeyValueMemory
from full_stack_transformer.generation.draft import Draft
from full_stack_transformer.generation.engine import Engine
from full_stack_transformer.generation.open_draft import OpenedDraft
from full_stack_transformer.generation.runners.native.decoder import (
    KvDtype,
    NativeRunner,
    WeightsDtype,
    why_not_native,
)
from full_stack_transformer.generation.runners.torch import Runner, SequenceWork, TorchRunner
from full_stack_transformer.machine import (
    free_memory_bytes,
    free_page_bytes,
    is_out_of_memory,
    memory_for,
    multiplies_bfloat16,
)
from full_stack_transformer.modelling.backbones import context_length, convert, num_parameters
from full_stack_transformer.quantization.files import codes_dtype_of

logger = logging.getLogger(__name__)

# Tokens of a block. Smaller ones waste less at the end of a text, larger ones need less bookkeeping.
BLOCK_SIZE = 32
# Fraction of the free memory that keys and values may take: by default, and at most.
_MEMORY_FRACTION, _MAX_MEMORY_FRACTION = 0.7, 0.9
# What of that a draft model may take, and the texts of full length that it has room for at most.
_DRAFT_FRACTION, _MAX_DRAFTED_TEXTS = 0.25, 4
# Memory that is left for the rest before a block is used that has never been written: the logits of 256
# tokens over a vocabulary of 50,000, for log-probabilities, take 50 MB, twice.
_LEFT_BYTES = 100_000_000
# Shorter texts are of no use.
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
    kv_dtype: Literal["auto"] | KvDtype = "auto",
    kv_memory: int | None = None,
    memory_share: float = 1.0,
    max_length: int | None = None,
    draft: OpenedDraft | None = None,
) -> Engine:
    """An engine for up to `num_slots` requests at once, which share memory for keys and values.

    The memory is taken as texts need it. What it will be at most is logged, with a warning where it is less
    than all texts of full length need.

    Args:
        backbone: in evaluation mode, where it is to compute.
        num_slots: requests under way at once.
        weights_dtype: auto is bfloat16 where the hardware multiplies it, else float32.
        kv_dtype: of keys and values; auto is float32 beside float32 weights, else bfloat16.
        kv_memory: bytes of keys and values at most; none for a share of what is free now.
        memory_share: of the free memory or of `kv_memory` that this engine may have.
        max_length: tokens of a request at most; none for the model's context.
        draft: guesses what comes next.

    Raises:
        ModelError: weights, or keys and values, cannot be had in that type here.
        MachineError: memory is short for a single request.
    """
    rounded = codes_dtype_of(backbone)
    if weights_dtype == "auto":
        usual: WeightsDtype = "bfloat16" if multiplies_bfloat16(backbone.device) else "float32"
        weights_dtype = rounded or usual
    if weights_dtype == "int4" and rounded is None:
        logger.info(
            "rounding to the nearest of 4 bits; fst quantize finds better ones, once, to start from"
        )
    if kv_dtype == "auto":
        kv_dtype = default_kv_dtype(weights_dtype)
    context = context_length(backbone.config)
    max_length = min(max_length or context, context)
    guesser = None
    if draft is not None:
        allowed_bytes = _allowed_bytes(
            _free_bytes(backbone, weights_dtype), kv_memory, memory_share
        )
        guesser = _start_draft(draft, backbone, weights_dtype, allowed_bytes, num_slots, max_length)
    allowed_bytes = _allowed_bytes(_free_bytes(backbone, weights_dtype), kv_memory, memory_share)
    if allowed_bytes is not None and guesser is not None:
        allowed_bytes -= guesser.memory.num_bytes
    memory = _fitting(
        KeyValueMemory(kv_dtype, kv_token_bytes(backbone.config, kv_dtype), BLOCK_SIZE),
        num_slots * blocks_for(max_length),
        min(max_length, _MIN_TOKENS),
        allowed_bytes,
    )
    wanted_length, max_length = max_length, min(max_length, memory.num_tokens)
    runner = open_runner(
        backbone,
        num_blocks=memory.num_blocks,
        weights_dtype=weights_dtype,
        kv_dtype=kv_dtype,
        max_length=max_length,
    )
    logger.info("generating with %s", runner.name)
    _announce(memory, num_slots, max_length, wanted_length)
    # Through PyTorch a row among others has other last bits: there only who asks for guesses has some.
    guesses = isinstance(runner, NativeRunner) or guesser is not None
    return Engine(
        runner,
        num_slots=num_slots,
        guesses=guesses,
        draft=guesser,
        memory=memory,
        find_room=partial(_find_room, memory) if backbone.device.type == "cpu" else None,
    )


def _find_room(memory: KeyValueMemory) -> int:
    """Blocks that the machine has memory for now: others may have taken what was free at the start."""
    free_bytes = free_page_bytes()
    return (
        memory.num_blocks
        if free_bytes is None
        else (free_bytes - _LEFT_BYTES) // memory.block_bytes
    )


def open_runner(
    backbone: Backbone,
    *,
    num_blocks: int,
    weights_dtype: WeightsDtype,
    kv_dtype: KvDtype,
    max_length: int,
) -> Runner:
    """The fastest runner of this machine for weights, and keys and values, of these types.

    Raises:
        ModelError: these types cannot be had here.
        MachineError: memory is short.
    """
    problem = why_not_native(backbone)
    if problem is None:
        # PyTorch then only draws tokens; its threads would spin while they wait and slow down the decoder's:
        # 184 tokens/s with one of them, 121 with two.
        torch.set_num_threads(1)
        with memory_for(f"the {weights_dtype} weights of the C++ decoder"):
            return NativeRunner(
                backbone,
                num_blocks=num_blocks,
                block_size=BLOCK_SIZE,
                weights_dtype=weights_dtype,
                kv_dtype=kv_dtype,
                max_length=max_length,
            )
    if weights_dtype not in _TORCH_TYPES:
        raise ModelError(
            f"--weights_dtype {weights_dtype} needs the C++ decoder, which cannot run this model here: "
            f"{problem}; pass bfloat16 or float32"
        )
    if kv_dtype != weights_dtype:
        raise ModelError(
            f"--kv_dtype {kv_dtype} beside {weights_dtype} weights needs the C++ decoder, which cannot run "
            f"this model here: {problem}; omit it"
        )
    if next(backbone.parameters()).device.type == "cpu":
        logger.warning(
            "generating through PyTorch, which is slower than the C++ decoder: %s", problem
        )
    with memory_for(f"{weights_dtype} weights and a short text"):
        _check_cache(backbone, max_length)
        backbone = convert(backbone, _TORCH_TYPES[weights_dtype])
    return TorchRunner(
        backbone, num_blocks=num_blocks, block_size=BLOCK_SIZE, max_length=max_length
    )


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-num_tokens // BLOCK_SIZE)


def default_kv_dtype(weights_dtype: WeightsDtype) -> KvDtype:
    """What keys and values are beside such weights: no worse."""
    return "float32" if weights_dtype == "float32" else "bfloat16"


def kv_token_bytes(config: PretrainedConfig, kv_dtype: KvDtype) -> int:
    """What keys and values of a token take."""
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size: int = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    # int8 has a scale for each head of each token.
    of_head = {"float32": 4 * head_size, "bfloat16": 2 * head_size, "int8": head_size + 4}
    return int(2 * config.num_hidden_layers * heads * of_head[kv_dtype])


@torch.inference_mode()
def _check_cache(backbone: Backbone, max_length: int) -> None:
    """Compare a short text read in pieces with the same text read at once, without a cache.

    With the weights as they were opened, before they are rounded: then what is computed wrong is far from
    what rounding does.

    Raises:
        ModelError: they differ, as where a model keeps something else than keys and values.
    """
    what, length = backbone.config.model_type, min(9, max_length)
    runner = TorchRunner(backbone, num_blocks=3, block_size=4, max_length=length)
    # From the middle of the vocabulary: control tokens are at its ends, and some have never been trained.
    ids = [(runner.vocab_size // 2 + 7 * number) % runner.vocab_size for number in range(length)]
    device = next(backbone.parameters()).device
    try:
        expected = backbone(torch.tensor([ids], device=device), use_cache=False).logits[0, -1]
        runner.run([SequenceWork(range(3), 0, ids[:-3], num_logits=0)])
        runner.run([SequenceWork(range(3), length - 3, ids[-3:-1], num_logits=0)])
        found = runner.run([SequenceWork(range(3), length - 1, ids[-1:])])[0]
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


def _free_bytes(backbone: Backbone, weights_dtype: WeightsDtype) -> int | None:
    """Memory that is free once the runner has its weights; none if that cannot be known."""
    free_bytes = free_memory_bytes(backbone.device)
    if free_bytes is None:
        return None
    return max(0, free_bytes - _converted_bytes(backbone, weights_dtype))


def _allowed_bytes(
    free_bytes: int | None, kv_memory: int | None, memory_share: float
) -> int | None:
    """Memory that keys and values may take; none for as much as they can need."""
    if free_bytes is None:
        return None if kv_memory is None else int(kv_memory * memory_share)
    if kv_memory is None:
        return int(free_bytes * _MEMORY_FRACTION * memory_share)
    if kv_memory > free_bytes * _MAX_MEMORY_FRACTION:
        logger.warning(
            "--kv_memory is %s MB, but %s MB are free; taking %.0f %% of them",
            *(f"{kv_memory / 1e6:,.0f}", f"{free_bytes / 1e6:,.0f}", 100 * _MAX_MEMORY_FRACTION),
        )
        kv_memory = int(free_bytes * _MAX_MEMORY_FRACTION)
    return int(kv_memory * memory_share)


def _fitting(
    format_: KeyValueMemory, num_wanted: int, min_tokens: int, allowed_bytes: int | None
) -> KeyValueMemory:
    """Blocks, as many as are wanted, or as memory holds.

    Raises:
        MachineError: memory is short for a single short text.
    """
    num_blocks = num_wanted
    if allowed_bytes is not None:
        num_blocks = min(num_blocks, allowed_bytes // format_.block_bytes)
        if num_blocks * BLOCK_SIZE < min_tokens:
            raise MachineError(
                f"a text of {min_tokens} tokens needs "
                f"{blocks_for(min_tokens) * format_.block_bytes / 1e6:,.0f} MB for its keys and values, "
                f"{allowed_bytes / 1e6:,.0f} MB are left for them; free some memory, raise --kv_memory or "
                "choose a smaller model"
            )
    return replace(format_, num_blocks=num_blocks)


def _start_draft(
    draft: OpenedDraft,
    checker: Backbone,
    checker_dtype: WeightsDtype,
    allowed_bytes: int | None,
    num_slots: int,
    max_length: int,
) -> Draft:
    """What guesses for a model, with blocks for some of the texts under way: with many, guesses hardly pay.

    Raises:
        ModelError: its weights cannot be had in that type here.
        MachineError: memory is short for it.
    """
    backbone, weights_dtype = draft.model.backbone, draft.weights_dtype
    is_native = why_not_native(backbone) is None
    if weights_dtype == "auto":
        weights_dtype = "int8" if is_native else checker_dtype
    kv_dtype = default_kv_dtype(weights_dtype)
    length = min(max_length, context_length(backbone.config))
    try:
        memory = _fitting(
            KeyValueMemory(kv_dtype, kv_token_bytes(backbone.config, kv_dtype), BLOCK_SIZE),
            min(num_slots, _MAX_DRAFTED_TEXTS) * blocks_for(length),
            min(length, _MIN_TOKENS),
            None if allowed_bytes is None else int(_DRAFT_FRACTION * allowed_bytes),
        )
        runner = open_runner(
            backbone,
            num_blocks=memory.num_blocks,
            weights_dtype=weights_dtype,
            kv_dtype=kv_dtype,
            max_length=min(length, memory.num_tokens),
        )
    except (ModelError, MachineError) as error:
        raise type(error)(f"the draft model {draft.model.name} cannot be used: {error}") from error
    logger.info("guessing with %s, %s", draft.model.name, runner.name)
    if why_not_native(checker) is not None:
        logger.warning(
            "with a draft model a text may differ where two tokens are almost equally likely: through "
            "PyTorch guesses change the last bits of scores"
        )
    vocab_size = checker.get_input_embeddings().num_embeddings
    return Draft(runner, name=draft.model.name, vocab_size=vocab_size, memory=memory)


def _announce(memory: KeyValueMemory, num_slots: int, max_length: int, wanted_length: int) -> None:
    """Log how much text fits, and warn where that is less than was asked for."""
    num_whole = memory.num_blocks // blocks_for(max_length)
    logger.info(
        "keys and values in %s: %s blocks of %d tokens, together %s tokens, %s MB when all are used",
        memory.dtype,
        f"{memory.num_blocks:,}",
        memory.block_size,
        f"{memory.num_tokens:,}",
        f"{memory.num_bytes / 1e6:,.0f}",
    )
    if max_length < wanted_length:
        logger.warning(
            "memory holds one text of %s tokens, not of the model's %s",
            *(f"{max_length:,}", f"{wanted_length:,}"),
        )
    elif num_whole < num_slots:
        logger.warning(
            "memory holds %s of %s tokens at once, not %d; texts that do not fit wait for others",
            "one text" if num_whole == 1 else f"{num_whole} texts",
            *(f"{max_length:,}", num_slots),
        )


def _converted_bytes(backbone: Backbone, weights_dtype: WeightsDtype) -> int:
    """What the runner's own weights will take beside those of the backbone."""
    size = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 1}[weights_dtype]
    if why_not_native(backbone) is not None:
        return (
            0
            if backbone.dtype == _TORCH_TYPES.get(weights_dtype)
            else size * num_parameters(backbone)
        )
    # The decoder looks tokens up in a table of its own, even where the head is the same weights.
    embeddings: Tensor = backbone.get_input_embeddings().weight
    is_tied = embeddings.data_ptr() == backbone.get_output_embeddings().weight.data_ptr()
    num_others = num_parameters(backbone) - (0 if is_tied else embeddings.numel())
    return size * num_others + (4 if weights_dtype == "float32" else 2) * embeddings.numel()
