"""Fuzz of the C++ decoder: whatever it reads together, a text's logits follow from its tokens, bit for bit.

python -m tests.generation.runners.fuzz --minutes 10

    random model, types, instruction sets, texts, adapters ──> each text alone, at once ──┐
    tables that share beginnings, pieces, guesses that are taken back ────────────────────┴─> the same bits

A case follows from its number, which a failure names. `make test-sanitizers` runs it with a decoder that
watches its addresses and arithmetic.
"""

import argparse
import itertools
import random
import time
from collections.abc import Iterable, Sequence

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.generation.runners.native import library
from full_stack_transformer.generation.runners.native.decoder import NativeRunner
from full_stack_transformer.generation.runners.torch import SequenceWork
from full_stack_transformer.machine import instruction_sets
from tests.generation.small_adapters import adapter_weights, linear_names
from tests.generation.small_models import varied_backbone

BLOCK_SIZES = (16, 32, 64)
FORMATS = (
    *(("float32", "float32"), ("float32", "bfloat16"), ("float32", "int8")),
    *(("int8", "float32"), ("int8", "bfloat16"), ("int8", "int8"), ("int4", "int8")),
    *(("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "int8")),
)


def check_case(seed: int, isas: Sequence[str] = ()) -> None:
    """Read some random texts in two ways.

    Args:
        seed: number of the case.
        isas: instruction sets to choose from; all of this machine if there are none.

    Raises:
        AssertionError: they differ.
    """
    numbers = random.Random(seed)
    backbone = _backbone(numbers)
    weights_dtype, kv_dtype = numbers.choice(FORMATS)
    isas = isas or [isa for isa in instruction_sets() if isa in library.targets()]
    isa = numbers.choice(isas)
    # bf16 is computed by its own instructions where there are any.
    other_isa = isa if weights_dtype == "bfloat16" else numbers.choice(isas)
    texts = _texts(numbers, backbone.config.max_position_embeddings)
    block_size = numbers.choice(BLOCK_SIZES)
    per_text = -(-backbone.config.max_position_embeddings // block_size)

    names = linear_names(backbone)
    weights = [
        adapter_weights(
            backbone,
            rank=numbers.choice((1, 4, 5, 16, 23)),
            seed=number,
            endings={numbers.choice(names).rpartition(".")[2] for _ in range(3)},
        )
        for number in range(numbers.choice((0, 0, 1, 3)))
    ]
    adapters = [numbers.randint(0, len(weights)) for _ in texts]

    def runner(num_texts: int, isa: str, adapters: Iterable[int]) -> NativeRunner:
        made = NativeRunner(
            backbone,
            num_blocks=num_texts * per_text,
            block_size=block_size,
            weights_dtype=weights_dtype,  # type: ignore[arg-type]
            kv_dtype=kv_dtype,  # type: ignore[arg-type]
            num_threads=numbers.choice((1, 1, 2, 3)),
            isa=isa,
        )
        for number in set(adapters) - {0}:
            made.add_adapter(number, weights[number - 1])
        return made

    alone = {adapter: runner(1, isa, [adapter]) for adapter in set(adapters)}
    expected = [
        alone[adapter].run([SequenceWork(range(per_text), 0, text, len(text), adapter)])
        for text, adapter in zip(texts, adapters, strict=True)
    ]
    together = runner(len(texts), other_isa, range(len(weights) + 1))
    found_rows = _read_in_pieces(together, texts, adapters, numbers)
    for found, rows in zip(found_rows, expected, strict=True):
        assert torch.equal(found.isnan(), rows[-len(found) :].isnan())
        assert torch.equal(found.nan_to_num(7.0), rows[-len(found) :].nan_to_num(7.0))


def _backbone(numbers: random.Random) -> Backbone:
    """A model of one or two layers; in some, numbers overflow."""
    group, num_groups = numbers.choice(
        ((1, 1), (1, 3), (2, 1), (2, 2), (3, 1), (3, 3), (4, 2), (7, 2), (13, 1), (30, 1))
    )
    head_size = 16 * numbers.choice((1, 2, 4, 5))
    sizes = {
        "vocab_size": numbers.randint(20, 90),
        "num_hidden_layers": numbers.choice((1, 2)),
        "num_attention_heads": group * num_groups,
        "num_key_value_heads": num_groups,
        "head_dim": head_size,
        "hidden_size": 16 * group * num_groups,
        "intermediate_size": 16 * numbers.randint(1, 9),
        "max_position_embeddings": numbers.randint(8, 300),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    window = numbers.randint(1, 80)
    kind = numbers.choice(("llama", "mistral", "gemma2", "gpt2"))
    config: transformers.PretrainedConfig
    if kind == "llama":
        config = transformers.LlamaConfig(**sizes, attention_bias=numbers.random() < 0.5)
    elif kind == "mistral":
        config = transformers.MistralConfig(**sizes, sliding_window=window)
    elif kind == "gemma2":
        config = transformers.Gemma2Config(**sizes, sliding_window=window)
    else:
        num_heads = numbers.randint(1, 4)
        config = transformers.GPT2Config(
            vocab_size=sizes["vocab_size"],
            n_embd=num_heads * head_size,
            n_inner=sizes["intermediate_size"],
            n_layer=sizes["num_hidden_layers"],
            n_head=num_heads,
            n_positions=sizes["max_position_embeddings"],
            bos_token_id=0,
            eos_token_id=1,
        )
    backbone = varied_backbone(config)
    if numbers.random() < 0.3:
        weights = [one for one in backbone.parameters() if one.dim() > 1]
        with torch.no_grad():
            for _ in range(numbers.randint(1, 3)):
                chosen = numbers.choice(weights)
                value = numbers.choice((3e38, -3e38, 1e30, 1e-40, 1e20))
                chosen[numbers.randrange(len(chosen)), numbers.randrange(chosen.shape[1])] = value
    return backbone


def _texts(numbers: random.Random, max_length: int) -> list[list[int]]:
    """Of 1 to `max_length` tokens; some begin with what one before begins with."""
    texts: list[list[int]] = []
    for _ in range(numbers.choice((1, 2, 3, 5, 9))):
        length = min(max_length, numbers.choice((max_length, numbers.randint(1, max_length), 5)))
        text = [numbers.randrange(20) for _ in range(length)]
        if texts and numbers.random() < 0.6:
            shared = numbers.choice(texts)[: numbers.randint(0, length)]
            text[: len(shared)] = shared
        texts.append(text)
    return texts


def _read_in_pieces(
    runner: NativeRunner,
    texts: Sequence[Sequence[int]],
    adapters: Sequence[int],
    numbers: random.Random,
) -> list[Tensor]:
    """Logits of the texts, all after another or at once, without those of the blocks that one shares."""
    tables, starts = _tables(runner, texts, adapters, numbers)
    done, rows = list(starts), [[torch.empty(0, runner.vocab_size)] for _ in texts]
    # Who shares blocks waits until they have been written.
    running = [number for number, start in enumerate(starts) if not start]
    waiting = [number for number, start in enumerate(starts) if start]
    while running or waiting:
        work, chosen = [], []
        for number in running:
            text, start = texts[number], done[number]
            end = min(len(text), start + numbers.choice((0, 1, 1, 2, 7, 40, 200)))
            if end == start:
                continue
            if numbers.random() < 0.1:  # guesses that are taken back
                room = min(runner.max_length - start, 5)
                guess = [numbers.randrange(20) for _ in range(numbers.randint(1, room))]
                num_logits, adapter = numbers.randint(0, 1), numbers.choice(adapters)
                runner.run([SequenceWork(tables[number], start, guess, num_logits, adapter)])
            ids = text[start:end]
            work.append(SequenceWork(tables[number], start, ids, len(ids), adapters[number]))
            chosen.append(number)
            done[number] = end
        if work:
            parts = torch.split(runner.run(work), [len(one.token_ids) for one in work])
            for number, part in zip(chosen, parts, strict=True):
                rows[number].append(part)
        running = [number for number in running if done[number] < len(texts[number])]
        if not running and waiting:
            running.append(waiting.pop(0))
    return [torch.cat(one) for one in rows]


def _tables(
    runner: NativeRunner,
    texts: Sequence[Sequence[int]],
    adapters: Sequence[int],
    numbers: random.Random,
) -> tuple[list[list[int]], list[int]]:
    """A table for each text, and the position from which on it does not share the blocks of one before."""
    size = runner.block_size
    per_text = runner.num_blocks // len(texts)
    shuffled = numbers.sample(range(runner.num_blocks), runner.num_blocks)
    tables: list[list[int]] = []
    starts: list[int] = []
    for number, text in enumerate(texts):
        table, start = shuffled[number * per_text : (number + 1) * per_text], 0
        for other in range(number):
            pairs = zip(text[:-1], texts[other], strict=False)
            equal = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
            num_shared = equal // size
            if num_shared and adapters[number] == adapters[other] and numbers.random() < 0.8:
                table[:num_shared], start = tables[other][:num_shared], num_shared * size
                break
        tables.append(table)
        starts.append(start)
    return tables, starts


def main() -> None:
    """Check cases for some minutes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--isas", nargs="*", default=(), help="instruction sets; all by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * arguments.minutes
    seed = arguments.seed
    while time.monotonic() < end:
        try:
            check_case(seed, arguments.isas)
        except BaseException:
            print(f"case {seed} fails: --seed {seed} begins with it", flush=True)
            raise
        seed += 1
    print(f"{seed - arguments.seed:,} cases, no failure")


if __name__ == "__main__":
    main()
