"""The C++ decoder of each instruction set that this machine has: the same bits with all weights but bf16."""

import copy
import ctypes
import shutil
import struct
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.generation.runners.native import decoder, library
from full_stack_transformer.generation.runners.native.decoder import (
    KvDtype,
    NativeRunner,
    WeightsDtype,
)
from full_stack_transformer.generation.runners.torch import SequenceWork
from full_stack_transformer.machine import instruction_sets
from tests.generation.small_adapters import adapter_weights, linear_names
from tests.generation.small_models import varied_backbone

ISAS = tuple(isa for isa in instruction_sets() if isa in library.targets())
# Weights, and keys and values.
SAME_BITS: tuple[tuple[WeightsDtype, KvDtype], ...] = (
    ("float32", "float32"),
    ("int8", "bfloat16"),
    ("int8", "int8"),
    ("int4", "bfloat16"),
)
FORMATS = (*SAME_BITS, ("bfloat16", "bfloat16"))
# Of 16 numbers, tiles and blocks there is always a rest.
LENGTHS = (1, 2, 3, 5, 7, 13, 33, 50)
CONTEXT = 70
# Blocks of a text.
BLOCK_SIZE, NUM_BLOCKS = 16, 5


pytestmark = pytest.mark.usefixtures("decoder")


@cache
def _backbone(kind: str) -> Backbone:
    sizes = {"hidden_size": 96, "intermediate_size": 208, "num_hidden_layers": 2}
    config = {
        "grouped": transformers.LlamaConfig(
            **sizes, vocab_size=77, num_attention_heads=6, num_key_value_heads=2
        ),
        "llama-3": transformers.LlamaConfig(
            **sizes,
            vocab_size=130,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=80,
            attention_bias=True,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        ),
        "gpt2": transformers.GPT2Config(
            vocab_size=77, n_positions=CONTEXT, n_embd=96, n_inner=112, n_layer=2, n_head=2
        ),
        # Windows, caps, norms after, gates of GELU by tanh.
        "gemma2": transformers.Gemma2Config(
            **sizes,
            vocab_size=77,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=48,
            sliding_window=21,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0,
        ),
        # Parallel layers, a part of each head turned, GELU by erf.
        "gpt_neox": transformers.GPTNeoXConfig(**sizes, vocab_size=77, num_attention_heads=3),
    }[kind]
    config.max_position_embeddings = CONTEXT
    return varied_backbone(config)


KINDS = ("grouped", "llama-3", "gpt2", "gemma2", "gpt_neox")


def _runner(
    backbone: Backbone,
    isa: str | None,
    dtype: WeightsDtype,
    kv_dtype: KvDtype,
    *,
    num_texts: int = 1,
    num_threads: int | None = None,
) -> NativeRunner:
    return NativeRunner(
        backbone,
        num_blocks=num_texts * NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        weights_dtype=dtype,
        kv_dtype=kv_dtype,
        isa=isa,
        num_threads=num_threads,
    )


def _table(text: int) -> range:
    return range(text * NUM_BLOCKS, (text + 1) * NUM_BLOCKS)


def _logits(backbone: Backbone, isa: str, dtype: WeightsDtype, kv_dtype: KvDtype) -> Tensor:
    """Logits of texts of all lengths, read at once, and of further tokens, one by one."""
    runner = _runner(backbone, isa, dtype, kv_dtype, num_texts=len(LENGTHS))
    assert runner.isa == isa
    _add_adapters(runner, backbone)
    return _logits_of_texts(runner)


def _add_adapters(runner: NativeRunner, backbone: Backbone) -> None:
    """Two: of some layers and the head, with ranks that fill nothing; of all others."""
    first = linear_names(backbone)[0].rpartition(".")[2]
    head = next(
        name for name, part in backbone.named_modules() if part is backbone.get_output_embeddings()
    )
    runner.add_adapter(1, adapter_weights(backbone, endings=[first, head], rank=5, seed=1))
    runner.add_adapter(2, adapter_weights(backbone, rank=8, seed=2))


def _logits_of_texts(runner: NativeRunner) -> Tensor:
    texts = [[(7 * place + 3 * length) % 70 + 3 for place in range(length)] for length in LENGTHS]
    work = [
        SequenceWork(_table(number), 0, ids, len(ids), number % 3)
        for number, ids in enumerate(texts)
    ]
    rows = [runner.run(work)]
    for step in range(3):
        work = [
            SequenceWork(_table(number), len(ids) + step, [9 + step], adapter=number % 3)
            for number, ids in enumerate(texts)
        ]
        rows.append(runner.run(work))
    return torch.cat(rows)


@pytest.mark.parametrize(("dtype", "kv_dtype"), SAME_BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_have_the_same_bits(kind: str, dtype: WeightsDtype, kv_dtype: KvDtype) -> None:
    expected = _logits(_backbone(kind), "plain", dtype, kv_dtype)
    assert bool(torch.isfinite(expected).all())
    for isa in ISAS:
        assert torch.equal(_logits(_backbone(kind), isa, dtype, kv_dtype), expected), isa


@pytest.mark.parametrize(("dtype", "kv_dtype"), FORMATS)
@pytest.mark.parametrize("isa", ISAS)
def test_logits_are_those_of_transformers(isa: str, dtype: WeightsDtype, kv_dtype: KvDtype) -> None:
    runner = _runner(_backbone("grouped"), isa, dtype, kv_dtype)
    text = [(5 * place) % 70 + 3 for place in range(45)]
    with torch.inference_mode():
        theirs = _backbone("grouped")(torch.tensor([text])).logits[0]
    ours = runner.run([SequenceWork(_table(0), 0, text, len(text))])
    distance = (ours - theirs).norm() / theirs.norm()
    assert float(distance) < {"float32": 1e-5, "bfloat16": 0.03, "int8": 0.1, "int4": 0.6}[dtype]


@pytest.mark.parametrize(("dtype", "kv_dtype"), FORMATS)
def test_what_overflows_is_no_number_everywhere(dtype: WeightsDtype, kv_dtype: KvDtype) -> None:
    backbone = copy.deepcopy(_backbone("grouped"))
    embeddings = backbone.get_input_embeddings().weight
    with torch.no_grad():
        embeddings[5] = 3e38  # its square overflows in the first norm
        embeddings[6, 3] = 1e30
    results = []
    for isa in ISAS:
        runner = _runner(backbone, isa, dtype, kv_dtype)
        broken = runner.run(
            [SequenceWork([0], 0, [5, 6, 7], 3), SequenceWork([1], 0, [8, 6, 9], 3)]
        )
        # What the blocks held does not reach the next text.
        again = runner.run([SequenceWork([0], 0, [8, 9], 2)])
        assert torch.equal(again, runner.run([SequenceWork([1], 0, [8, 9], 2)]))
        assert bool(torch.isfinite(again).all())
        results.append(torch.cat([broken, again]))
    for isa, result in zip(ISAS, results, strict=True):
        assert torch.equal(result.isfinite(), results[-1].isfinite()), isa
        if dtype != "bfloat16":
            assert torch.equal(result.nan_to_num(7.0), results[-1].nan_to_num(7.0)), isa


def test_another_instruction_set_is_refused() -> None:
    other = "neon" if "neon" not in library.targets() else "avx2"
    with pytest.raises(
        Exception, match=f"the C\\+\\+ decoder cannot run here: it knows no {other}"
    ):
        _runner(_backbone("gpt2"), other, "int8", "int8")


# ------------------------------------------------------------------ ARM, under an emulator


class _Tape:
    """Stands in for a library and writes what it is asked for to a file, for replay.cpp."""

    isa = "tape"

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._sizes: dict[tuple[int, int], tuple[int, int]] = {}

    def _write(self, name: str, *values: int | tuple[Any, int]) -> None:
        self._file.write(name.encode())
        for value in values:
            if isinstance(value, int):
                self._file.write(struct.pack("<i", value))
                continue
            pointer, length = value
            self._file.write(struct.pack("<i", length if pointer else -1))
            if pointer:
                self._file.write(ctypes.string_at(pointer, 4 * length))
        self._file.flush()

    def decoder_new(self, shape: Any) -> int:
        self._shape = shape._obj
        self._file.write(bytes(self._shape))
        return 1

    def decoder_set_linear(
        self, _: int, layer: int, name: int, weights: Any, bias: Any, rows: int, columns: int
    ) -> bool:
        self._sizes[layer, name] = columns, rows
        self._write("l", layer, name, (weights, rows * columns), (bias, rows), rows, columns)
        return True

    def decoder_set_codes(self, _: int, layer: int, name: int, *arrays: Any) -> bool:
        codes, group_scales, zeros, scales, bias, rows, columns = arrays
        self._sizes[layer, name] = columns, rows
        num_bytes = rows * columns // (2 if group_scales else 1)
        num_groups = rows * columns // 32
        self._write("c", layer, name, (codes, num_bytes // 4), (group_scales, num_groups // 4))
        self._write("", (zeros, num_groups // 4), (scales, rows), (bias, rows), rows, columns)
        return True

    def decoder_set_norm(
        self, _: int, layer: int, name: int, weight: Any, bias: Any, size: int
    ) -> None:
        self._write("n", layer, name, (weight, size), (bias, size), size)

    def decoder_set_layer(self, _: int, layer: int, window: int, rotary: int) -> None:
        self._write("y", layer, window, rotary)

    def decoder_set_embeddings(self, _: int, tokens: Any, positions: Any) -> bool:
        size = self._shape.hidden_size
        lengths = self._shape.vocab_size * size, self._shape.max_length * size
        self._write("e", (tokens, lengths[0]), (positions, lengths[1]))
        return True

    def decoder_add_rotary(self, _: int, frequencies: Any, half: int, scaling: float) -> None:
        scaling_pointer = ctypes.pointer(ctypes.c_float(scaling))
        self._write("r", (frequencies, half), (scaling_pointer, 1), half)

    def decoder_add_adapter(self, _: int, number: int, num_bytes: int) -> bool:
        self._write("a", number, num_bytes)
        return True

    def decoder_set_low_rank(
        self, _: int, number: int, layer: int, name: int, *arguments: Any
    ) -> bool:
        down, up, first_ranks, ranks, num_ranks, most_ranks = arguments
        num_inputs, num_outputs = self._sizes[layer, name]
        self._write("m", number, layer, name, (down, num_ranks * num_inputs))
        self._write("", (up, num_outputs * most_ranks), (first_ranks, num_outputs))
        self._write("", (ranks, num_outputs), num_ranks, most_ranks)
        return True

    def decoder_forward(
        self,
        *arguments: Any,
    ) -> bool:
        _, num_tokens, *by_token, starts, block_ids, adapters, num_rows, rows, _ = arguments
        arrays = [(array, num_tokens) for array in by_token]
        num_sequences = by_token[1][num_tokens - 1] + 1
        self._write("f", num_tokens, *arrays, (starts, num_sequences + 1))
        self._write("", (block_ids, starts[num_sequences]), (adapters, num_tokens))
        self._write("", num_rows, (rows, num_rows))
        return True

    def decoder_delete(self, _: int) -> None:
        self._file.close()


@pytest.fixture(scope="session", params=["neon", "plain"])
def arm_replay(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """The command that runs replay.cpp as on an ARM processor."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("NOT RUN: ARM needs the Debian packages g++-aarch64-linux-gnu and qemu-user")
    program = tmp_path_factory.mktemp("arm") / "replay"
    flags = [flag for flag in library._FLAGS if flag != "-shared"]
    native = Path(library.__file__).parent
    source = Path(__file__).with_name("replay.cpp")
    flags += [*library._ARM[request.param], "-static", "-I", str(native)]
    subprocess.run([compiler, *flags, source, "-o", program], check=True)
    return [emulator, "-cpu", "max", str(program)]


@pytest.mark.parametrize(("dtype", "kv_dtype"), SAME_BITS)
@pytest.mark.parametrize("kind", ["grouped", "gpt2", "gemma2", "gpt_neox"])
def test_logits_of_an_arm_processor_have_the_same_bits(
    kind: str,
    dtype: WeightsDtype,
    kv_dtype: KvDtype,
    arm_replay: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = _logits(_backbone(kind), "plain", dtype, kv_dtype)
    monkeypatch.setattr(decoder, "load_library", lambda _: _Tape(tmp_path / "tape"))
    runner = _runner(_backbone(kind), None, dtype, kv_dtype, num_texts=len(LENGTHS), num_threads=2)
    _add_adapters(runner, _backbone(kind))
    _logits_of_texts(runner)
    done = subprocess.run([*arm_replay, str(tmp_path / "tape")], capture_output=True, check=True)
    found = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32)
    assert torch.equal(found.view(-1, runner.vocab_size), expected)
