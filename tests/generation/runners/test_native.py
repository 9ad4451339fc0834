"""The C++ decoder: transformers' numbers, always the same bits, and a fall-back where it cannot be had."""

import copy
import logging
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel as Backbone

from full_stack_transformer import machine
from full_stack_transformer.errors import ModelError
from full_stack_transformer.generation.engine import Engine
from full_stack_transformer.generation.open_engine import open_engine
from full_stack_transformer.generation.runners.native import library
from full_stack_transformer.generation.runners.native.decoder import (
    KvDtype,
    NativeRunner,
    WeightsDtype,
    why_not_native,
)
from full_stack_transformer.generation.runners.torch import SequenceWork
from tests.generation.small_models import (
    CONTEXT,
    GREEDY,
    SHAPES,
    make_runner,
    random_prompts,
    run_requests,
    small_backbone,
    token_request,
    varied_backbone,
)

DTYPES: tuple[WeightsDtype, ...] = ("float32", "bfloat16", "int8", "int4")
# Root mean square of the difference to transformers' fp32 logits, relative to that of the logits.
TOLERANCES: dict[WeightsDtype, float] = {
    "float32": 1e-4,
    "bfloat16": 0.03,
    "int8": 0.06,
    "int4": 0.5,
}
BLOCK_SIZES = (16, 32, 64)


@pytest.fixture(autouse=True)
def _decoder_is_here() -> None:
    problem = why_not_native(small_backbone("llama"))
    if problem is not None:
        pytest.skip(f"no C++ decoder here: {problem}")


def _runner(
    dtype: WeightsDtype,
    shape: str = "llama",
    *,
    kv_dtype: KvDtype | None = None,
    num_blocks: int = CONTEXT // 16,
    block_size: int = 16,
    num_threads: int | None = None,
) -> NativeRunner:
    """The blocks are enough for one text."""
    return NativeRunner(
        small_backbone(shape),
        num_blocks=num_blocks,
        block_size=block_size,
        weights_dtype=dtype,
        kv_dtype=kv_dtype or ("float32" if dtype == "float32" else "bfloat16"),
        num_threads=num_threads,
    )


def _read(
    runner: NativeRunner,
    token_ids: Sequence[int],
    table: Sequence[int] | None = None,
    start: int = 0,
) -> Tensor:
    """Logits (tokens, vocabulary) after each token from `start` on."""
    ids = token_ids[start:]
    return runner.run([SequenceWork(table or range(runner.num_blocks), start, ids, len(ids))])


def _theirs(backbone: Backbone, token_ids: Sequence[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = backbone(torch.tensor([list(token_ids)])).logits[0]
    return logits


def _distance(ours: Tensor, theirs: Tensor) -> float:
    difference = (ours - theirs).square().mean().sqrt()
    return float(difference / theirs.square().mean().sqrt())


# ------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_transformers(shape: str, dtype: WeightsDtype) -> None:
    runner = _runner(dtype, shape)
    for prompt in random_prompts(12, max_tokens=CONTEXT):
        theirs = _theirs(small_backbone(shape), prompt)
        assert _distance(_read(runner, prompt), theirs) < TOLERANCES[dtype]


LLAMA = {
    "vocab_size": 77,
    "hidden_size": 96,
    "intermediate_size": 208,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 70,
}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(**LLAMA, num_key_value_heads=2),
        transformers.LlamaConfig(**LLAMA, num_key_value_heads=1, tie_word_embeddings=True),
        transformers.LlamaConfig(**LLAMA, head_dim=80, attention_bias=True, mlp_bias=True),
        transformers.LlamaConfig(**LLAMA, head_dim=48, rope_parameters=LLAMA_3_ROPE),
        transformers.LlamaConfig(
            **LLAMA, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
        ),
        transformers.GPT2Config(
            vocab_size=77, n_positions=70, n_embd=96, n_inner=112, n_layer=2, n_head=2
        ),
    ],
    ids=["grouped", "one-key-head", "biases", "llama-3", "stretched", "gpt2-odd"],
)
def test_variants_of_the_two_families_are_computed_right(
    config: transformers.PretrainedConfig,
) -> None:
    backbone = varied_backbone(config)
    runner = NativeRunner(backbone, num_blocks=3, weights_dtype="float32", kv_dtype="float32")
    for prompt in random_prompts(6, vocab_size=77, max_tokens=70):
        assert _distance(_read(runner, prompt), _theirs(backbone, prompt)) < 1e-4


def _trained_backbone() -> Backbone:
    """A model that has learned something: that a token's successor is mostly a fixed one."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    backbone = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=3e-3)
    for step in range(80):
        ids = _successors(16, seed=step)
        loss = backbone(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return backbone.eval()


def _successors(rows: int, seed: int) -> Tensor:
    """(rows, 32) tokens, each mostly 7 times the one before and 3."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(64, (rows, 32), generator=generator)
    is_fixed = torch.rand(rows, 32, generator=generator) < 0.8
    for place in range(1, 32):
        following = (7 * ids[:, place - 1] + 3) % 64
        ids[:, place] = torch.where(is_fixed[:, place], following, ids[:, place])
    return ids


def test_rounding_the_weights_of_a_trained_model_costs_less_than_one_percent() -> None:
    backbone = _trained_backbone()
    samples = _successors(64, seed=1000)
    losses = {}
    for dtype in DTYPES:
        runner = NativeRunner(backbone, num_blocks=1, weights_dtype=dtype, kv_dtype="float32")
        rows = [_read(runner, sample[:-1].tolist()) for sample in samples]
        losses[dtype] = torch.nn.functional.cross_entropy(
            torch.cat(rows), samples[:, 1:].flatten()
        ).item()
    assert losses["float32"] < 2.0  # ln 64 is 4.2
    for dtype in DTYPES:
        change = torch.tensor(losses[dtype] - losses["float32"]).expm1().item()
        assert abs(change) < 0.01, f"{dtype}: {change:+.3%}"


# ------------------------------------------------------------------ the same bits


# Weights, and keys and values.
FORMATS: tuple[tuple[WeightsDtype, KvDtype], ...] = (
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("int8", "bfloat16"),
    ("int8", "int8"),
)


@pytest.mark.parametrize(("dtype", "kv_dtype"), FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bits_depend_on_nothing_but_the_tokens(
    shape: str, dtype: WeightsDtype, kv_dtype: KvDtype
) -> None:
    """Not on company, on the blocks and what they held, nor on how the prompt was cut."""
    prompts = random_prompts(32, max_tokens=90)
    alone_runner = _runner(dtype, shape, kv_dtype=kv_dtype)
    alone = [_read(alone_runner, prompt) for prompt in prompts]
    for block_size in BLOCK_SIZES:
        numbers = random.Random(block_size)
        per_text = -(-90 // block_size)
        num_blocks = 32 * per_text
        runner = _runner(
            dtype, shape, kv_dtype=kv_dtype, num_blocks=num_blocks, block_size=block_size
        )
        shuffled = numbers.sample(range(num_blocks), num_blocks)
        tables = [shuffled[at : at + per_text] for at in range(0, num_blocks, per_text)]
        for prompt_length in (90, 17):  # what the blocks held before is of no account
            runner.run(
                [SequenceWork(table, 0, [7] * prompt_length, 0) for table in reversed(tables)]
            )
        assert all(
            torch.equal(one, other)
            for one, other in zip(
                _read_in_pieces(runner, prompts, tables, numbers), alone, strict=True
            )
        )


def _read_in_pieces(
    runner: NativeRunner,
    prompts: Sequence[Sequence[int]],
    tables: Sequence[Sequence[int]],
    numbers: random.Random,
) -> list[Tensor]:
    """Logits of each prompt; all are read at once, each in pieces of random lengths."""
    done = [0] * len(prompts)
    rows: list[list[Tensor]] = [[] for _ in prompts]
    while any(done[number] < len(prompt) for number, prompt in enumerate(prompts)):
        work, chosen = [], []
        for number, prompt in enumerate(prompts):
            piece = prompt[done[number] : done[number] + numbers.choice((0, 1, 1, 2, 13, 40))]
            if piece:
                work.append(SequenceWork(tables[number], done[number], piece, len(piece)))
                chosen.append(number)
                done[number] += len(piece)
        if work:
            lengths = [len(one.token_ids) for one in work]
            for number, part in zip(chosen, torch.split(runner.run(work), lengths), strict=True):
                rows[number].append(part)
    return [torch.cat(one) for one in rows]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_do_not_depend_on_the_number_of_threads(dtype: WeightsDtype) -> None:
    prompts = random_prompts(2)
    expected = [_read(_runner(dtype), prompt) for prompt in prompts]
    for num_threads in (2, 5):
        runner = _runner(dtype, num_threads=num_threads)
        assert f"{num_threads} threads" in runner.name
        for prompt, logits in zip(prompts, expected, strict=True):
            assert torch.equal(_read(runner, prompt), logits)


@pytest.mark.parametrize(("dtype", "kv_dtype"), FORMATS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_sequences_share_full_blocks(
    block_size: int, dtype: WeightsDtype, kv_dtype: KvDtype
) -> None:
    """What two texts begin with is read once; each goes on in its own blocks."""
    runner = _runner(dtype, kv_dtype=kv_dtype, num_blocks=12, block_size=block_size)
    first = [(7 * place) % 290 + 3 for place in range(100)]
    second = [*first[:70], *((5 * place) % 290 + 3 for place in range(30))]
    alone = [_read(runner, text, [0, 2, 4, 6, 8, 10, 11]) for text in (first, second)]
    num_shared = 70 // block_size
    tables = [[9, 3, 7, 1, 5, 8, 2], [9, 3, 7, 1, 5, 8, 2]]
    tables[1][num_shared:] = [
        block for block in (0, 4, 6, 10, 11, *range(12)) if block not in tables[0]
    ]
    start = num_shared * block_size
    assert torch.equal(_read(runner, first, tables[0]), alone[0])
    assert torch.equal(_read(runner, second, tables[1], start), alone[1][start:])
    # The first one's blocks hold what they held.
    both = [
        SequenceWork(table, 99, text[99:], 1)
        for table, text in zip(tables, (first, second), strict=True)
    ]
    assert torch.equal(runner.run(both), torch.stack([alone[0][-1], alone[1][-1]]))
    if (dtype, kv_dtype) == ("float32", "float32"):
        assert _distance(alone[1], _theirs(small_backbone("llama"), second)) < TOLERANCES[dtype]


@pytest.mark.parametrize(("dtype", "kv_dtype"), FORMATS)
def test_guessed_tokens_that_are_taken_back_leave_no_trace(
    dtype: WeightsDtype, kv_dtype: KvDtype
) -> None:
    runner = _runner(dtype, kv_dtype=kv_dtype)
    prompt = list(range(3, 40))
    whole = _read(runner, prompt)
    _read(runner, [*prompt[:20], 200, 201, 202, 203, 204, 205, 206], start=20)
    assert torch.equal(_read(runner, prompt, start=20), whole[20:])


@pytest.mark.parametrize(
    "work",
    [
        SequenceWork([0, 1], 0, [300]),
        SequenceWork([0, 1], 0, [-1]),
        SequenceWork([0, 1], 31, [5, 6]),
        SequenceWork([0, 8], 15, [5, 6]),
        SequenceWork([-1], 0, [5]),
        SequenceWork([0], -1, [5]),
        SequenceWork(range(8), CONTEXT, [5]),
        SequenceWork([0], 0, [5], 2),
    ],
    ids=["id", "negative-id", "table", "block", "negative-block", "start", "context", "logits"],
)
def test_work_outside_of_its_blocks_never_reaches_the_decoder(work: SequenceWork) -> None:
    runner = _runner("int8")
    with pytest.raises(AssertionError):
        runner.run([work])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_last_norm_gives_makes_the_logits(dtype: WeightsDtype) -> None:
    runner = _runner(dtype, "gpt2", num_blocks=2)
    prompts = [[5, 6, 7, 8, 9], [40]]
    states = runner.hidden_states(
        [SequenceWork([block], 0, ids, 0) for block, ids in enumerate(prompts)]
    )
    assert states.shape == (6, 64)
    with torch.inference_mode():
        logits = small_backbone("gpt2").get_output_embeddings()(states)
    expected = torch.cat([_read(runner, ids) for ids in prompts])
    assert _distance(logits, expected) < (1e-5 if dtype == "float32" else 0.03)


# ------------------------------------------------------------------ what it cannot do


def test_broken_weights_are_refused() -> None:
    layer = "model.layers.1.mlp.up_proj.weight"
    for name in (layer, "model.embed_tokens.weight", "model.norm.weight"):
        backbone = copy.deepcopy(small_backbone("llama"))
        with torch.no_grad():
            backbone.get_parameter(name).flatten()[3] = float("nan")
        with pytest.raises(ModelError, match="NaN or infinite"):
            NativeRunner(backbone, num_blocks=1, weights_dtype="bfloat16", kv_dtype="bfloat16")


def test_another_architecture_goes_through_pytorch_aloud(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        open_engine(small_backbone("cohere"), num_slots=1, weights_dtype="float32")
    assert "generating through PyTorch, which is slower" in caplog.text
    with pytest.raises(ModelError, match=r"--weights_dtype int8 .* cohere"):
        open_engine(small_backbone("cohere"), num_slots=1, weights_dtype="int8")


# ------------------------------------------------------------------ its library


def test_the_library_beside_the_source_is_taken(tmp_path: Path) -> None:
    if not (library._PREBUILT / library.file_name(machine.instruction_sets()[0])).is_file():
        pytest.skip("the package was installed without a C++ compiler")
    environment = {"CXX": "/bin/false", "XDG_CACHE_HOME": str(tmp_path)}
    assert _why_not_in_another_process(environment, prebuilt=library._PREBUILT) == "None"
    assert not list(tmp_path.rglob("*.so"))


def test_it_is_compiled_once_and_kept(tmp_path: Path) -> None:
    """Another process finds what the first one compiled; a source that does not compile takes no place."""
    compiler = tmp_path / "c++"
    # Copies the library that is there instead of compiling for ten seconds.
    compiled = Path(library.load_library()._name)
    compiler.write_text(
        f'#!/bin/sh\necho compiled >> "{tmp_path}/log"\n'
        f'for last; do true; done\nhead -c -32 "{compiled}" > "$last"\n'
    )
    compiler.chmod(0o755)
    environment = {"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for _ in range(2):
        assert _why_not_in_another_process(environment) == "None"
    assert (tmp_path / "log").read_text() == "compiled\n"
    kept = list((tmp_path / "cache" / "full_stack_transformer").iterdir())
    assert [path.suffix for path in kept] == [".so"]


def test_a_library_for_a_lesser_processor_is_for_those_without_a_compiler(tmp_path: Path) -> None:
    sets = machine.instruction_sets()
    if len(sets) < 2:
        pytest.skip("this processor has one instruction set only")
    kept = tmp_path / "full_stack_transformer"
    kept.mkdir()
    name = library.file_name(sets[1])
    shutil.copy(library.load_library(sets[1])._name, kept / name)
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\nfor last; do true; done\n"
        f'head -c -32 "{library.load_library(sets[0])._name}" > "$last"\n'
    )
    compiler.chmod(0o755)
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    for program, used in {"/none": sets[1], "/bin/false": sets[1], str(compiler): sets[0]}.items():
        path = "/none" if program == "/none" else environment["PATH"]
        given = {**environment, "CXX": program, "PATH": path}
        assert _in_another_process(given, "library.load_library().isa") == used


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "/bin/false"}, "/bin/false could not compile decoder.cpp for "),
        ({"XDG_CACHE_HOME": "/dev/null"}, "cannot be kept at /dev/null"),
        ({"CXX": "/none", "PATH": "/none"}, "there is no C++ compiler; install g++, or a wheel"),
    ],
    ids=["compiler", "cache", "no compiler"],
)
def test_a_machine_without_it_says_why(
    environment: dict[str, str], reason: str, tmp_path: Path
) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path), **environment}
    assert reason in _why_not_in_another_process(environment)
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_library_is_an_error(damage: str, tmp_path: Path) -> None:
    good = Path(library.load_library()._name).read_bytes()
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    bad = {"cut": good[:middle], "flipped": flipped, "empty": b""}[damage]
    for isa in machine.instruction_sets():
        (tmp_path / library.file_name(isa)).write_bytes(bad)
    message = _why_not_in_another_process({}, prebuilt=tmp_path)
    assert message.startswith(
        f"MachineError: the library of the C++ decoder at {tmp_path}/decoder-"
    )
    assert message.endswith("is damaged; install the package again")


@pytest.fixture
def _failing_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    remembering = (library._compiler, library._found)
    for function in remembering:
        function.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(library, "_PREBUILT", tmp_path)
        patch.setenv("CXX", "/bin/false")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path))
        yield
    for function in remembering:
        function.cache_clear()


_WITHOUT_MEMORY = """
import resource, torch
from full_stack_transformer.generation.engine import Engine
from full_stack_transformer.generation.runners.native.decoder import NativeRunner
from full_stack_transformer.generation.runners.torch import SequenceWork
from full_stack_transformer.modelling.backbones import new_backbone

ids = {"begin": 0, "end": 1, "pad": 2}
backbone = new_backbone("tiny", vocab_size=300, max_length=4000, special_token_ids=ids).eval()
runner = NativeRunner(
    backbone, num_blocks=120, weights_dtype="int8", kv_dtype="float32", num_threads=1
)
short, long = ([number % 290 + 3 for number in range(length)] for length in (9, 3000))
before = runner.run([SequenceWork(range(119, 120), 0, short)])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 18), hard))
try:
    runner.run([SequenceWork(range(100), 0, long)])
except MemoryError:
    print("short of memory")
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
assert torch.equal(runner.run([SequenceWork(range(119, 120), 0, short)]), before)
assert runner.run([SequenceWork(range(100), 0, long)]).isfinite().all()
print("goes on")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of the address space")
@pytest.mark.skipif(
    "sanitize" in os.environ.get("FST_CXXFLAGS", ""), reason="a sanitizer needs all addresses"
)
def test_a_lack_of_memory_is_an_error_and_not_the_end() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_MEMORY], capture_output=True, text=True, check=False
    )
    assert done.stdout.split("\n")[:2] == ["short of memory", "goes on"], done.stderr


@pytest.mark.usefixtures("_failing_compiler")
def test_where_it_cannot_be_compiled_pytorch_generates_aloud(
    caplog: pytest.LogCaptureFixture,
) -> None:
    request = token_request([5, 6, 7], 9, GREEDY, seed=0)
    expected = run_requests(Engine(make_runner("torch"), num_slots=1), [request])
    with caplog.at_level(logging.INFO):
        engine = open_engine(small_backbone("llama"), num_slots=1, weights_dtype="float32")
    assert "generating through PyTorch, which is slower" in caplog.text
    assert "/bin/false could not compile decoder.cpp" in caplog.text
    assert run_requests(engine, [request]) == expected
    with pytest.raises(ModelError, match=r"--weights_dtype int8 .* could not compile"):
        open_engine(small_backbone("llama"), num_slots=1, weights_dtype="int8")


def _why_not_in_another_process(
    environment: dict[str, str], *, prebuilt: Path = Path("/none")
) -> str:
    return _in_another_process(environment, "library.why_not()", prebuilt)


def _in_another_process(
    environment: dict[str, str], asked: str, prebuilt: Path = Path("/none")
) -> str:
    code = (
        "import pathlib, sys\n"
        "from full_stack_transformer.errors import MachineError\n"
        "from full_stack_transformer.generation.runners.native import library\n"
        f"library._PREBUILT = pathlib.Path({str(prebuilt)!r})\n"
        f"try:\n    print({asked})\n"
        "except MachineError as error:\n    print(f'MachineError: {error}')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()
