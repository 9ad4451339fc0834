"""An engine takes the memory that it needs, and says what memory is short for."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.arguments.sampling import SamplingParameters
from full_stack_transformer.errors import MachineError, ModelError
from full_stack_transformer.generation import open_engine as opening
from full_stack_transformer.generation.open_engine import open_engine
from full_stack_transformer.generation.token_requests import TokenRequest
from full_stack_transformer.machine import (
    is_out_of_memory,
    memory_for,
    resident_bytes,
)
from full_stack_transformer.modelling.backbones import new_backbone
from tests.generation.small_models import small_backbone
from tests.serving.tiny_model import make_tiny_model

MB = 1_000_000


def test_blocks_take_memory_when_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long context costs nothing before it is used: 32 texts of 30,000 tokens would be 1 GB."""
    monkeypatch.setattr(opening, "free_memory_bytes", lambda device: 8_000 * MB)
    ids = {"begin": 0, "end": 1, "pad": 2}
    backbone = new_backbone("tiny", vocab_size=300, max_length=30_000, special_token_ids=ids).eval()
    before = resident_bytes() or 0
    engine = open_engine(backbone, num_slots=32, weights_dtype="float32")
    for seed in range(32):
        engine.add(TokenRequest([5] * 300, SamplingParameters(max_new_tokens=2, seed=seed)))
    while engine.num_running:
        engine.step()
    assert engine.max_length == 30_000
    assert engine.block_use.num_blocks == 32 * 938
    assert (resident_bytes() or 0) - before < 200 * MB


# Of the small model: 2 layers, 2 heads of 32, in fp32.
BLOCK_BYTES = 32 * 2 * 2 * 64 * 4


def _leave(num_bytes: float, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let so much memory be free beside what the runner's own weights take."""
    weights = opening._converted_bytes(backbone, "float32")
    monkeypatch.setattr(opening, "free_memory_bytes", lambda device: num_bytes + weights)


@pytest.mark.parametrize(("num_blocks", "num_texts"), [(100, 8), (4 * 3 + 1, 3), (4, 1)])
def test_memory_decides_how_many_texts_there_are(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    num_blocks: int,
    num_texts: int,
) -> None:
    caplog.set_level("INFO")
    _leave((num_blocks + 0.1) * BLOCK_BYTES / 0.7, small_backbone("llama"), monkeypatch)
    engine = open_engine(small_backbone("llama"), num_slots=8, weights_dtype="float32")
    assert (engine.num_slots, engine.max_length) == (8, 128)
    assert engine.block_use.num_blocks == min(num_blocks, 8 * 4)
    assert "keys and values in float32: " in caplog.text
    counted = "one text" if num_texts == 1 else f"{num_texts} texts"
    warning = f"memory holds {counted} of 128 tokens at once, not 8"
    assert (warning in caplog.text) == (num_texts < 8)


def test_what_is_asked_for_is_taken_as_far_as_it_is_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = small_backbone("llama")
    _leave(20.1 * BLOCK_BYTES / 0.9, backbone, monkeypatch)

    def num_blocks(kv_memory: int, share: float = 1.0) -> int:
        engine = open_engine(
            backbone,
            num_slots=8,
            weights_dtype="float32",
            kv_memory=kv_memory,
            memory_share=share,
        )
        return engine.block_use.num_blocks

    assert num_blocks(10 * BLOCK_BYTES) == 10
    assert num_blocks(10 * BLOCK_BYTES, share=0.5) == 5
    assert "--kv_memory" not in caplog.text
    assert num_blocks(100 * BLOCK_BYTES) == 20
    assert "--kv_memory is 3 MB" in caplog.text


def test_a_long_context_is_cut_where_memory_holds_no_such_text(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ids = {"begin": 0, "end": 1, "pad": 2}
    backbone = new_backbone("tiny", vocab_size=300, max_length=4096, special_token_ids=ids).eval()
    _leave(31.5 * BLOCK_BYTES / 0.7, backbone, monkeypatch)
    engine = open_engine(backbone, num_slots=8, weights_dtype="float32")
    assert engine.max_length == 31 * 32
    assert "memory holds one text of 992 tokens, not of the model's 4,096" in caplog.text
    _leave(8 * BLOCK_BYTES, backbone, monkeypatch)
    with pytest.raises(MachineError, match="a text of 256 tokens needs"):
        open_engine(backbone, num_slots=8, weights_dtype="float32")


def test_types_that_only_the_decoder_has_are_refused_without_it() -> None:
    backbone = small_backbone("cohere")
    with pytest.raises(ModelError, match="--kv_dtype int8 beside float32 weights needs the C"):
        open_engine(backbone, num_slots=1, weights_dtype="float32", kv_dtype="int8")


def test_a_failed_allocation_is_known_by_its_words() -> None:
    with (
        pytest.raises(MachineError, match="memory is short for the dream"),
        memory_for("the dream"),
    ):
        torch.empty(1 << 60)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes differ"))


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs Linux's proc")
def test_a_limit_of_the_address_space_is_kept_to(tmp_path: Path) -> None:
    """`ulimit -v`: fewer texts at once, said aloud."""
    directory = make_tiny_model(tmp_path, max_length=1_000_000)

    limit = 3_000 * MB
    found = subprocess.run(
        [
            *(sys.executable, "-m", "full_stack_transformer", "generate", str(directory)),
            *("--prompt", "a", "--max_new_tokens", "2", "--device", "cpu"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert "memory holds" in found.stderr
