"""What differs on a GPU, in under five minutes on one device: `pytest -m gpu -s tests/test_gpu.py`.

Skipped without CUDA. `FST_TEST_DEVICE=cpu` runs what a processor can do of it, to try the tests themselves.
The last test prints one line of JSON: tokens/s and MFU of a model of 124 M parameters beside nanoGPT's way.
"""

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file

from full_stack_transformer.command_line import COMMANDS
from full_stack_transformer.errors import MachineError
from full_stack_transformer.generation.open_engine import open_engine
from full_stack_transformer.generation.text_generator import TextGenerator
from full_stack_transformer.machine import free_memory_bytes
from full_stack_transformer.modelling.backbones import new_backbone
from full_stack_transformer.modelling.model_directory import moved, open_model, resolve_device
from tests.conftest import RunFst

DEVICE = os.environ.get("FST_TEST_DEVICE", "cuda")
IS_CUDA = DEVICE.startswith("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        IS_CUDA and not torch.cuda.is_available(), reason="NOT RUN: there is no CUDA device"
    ),
]
_LEFT_BYTES = 64 * 2**20
needs_cuda = pytest.mark.skipif(not IS_CUDA, reason="a processor cannot do that")

_ACCELERATOR = ("--accelerator", "gpu" if IS_CUDA else "cpu", "--devices", "1")
_TRAINING = (
    *("train", "--model_config", "mini", "--batch_size", "16", "--dropout", "0.1", *_ACCELERATOR),
    *("--precision", "bf16", "--optimizer", "muon", "--compile", "always", "--deterministic"),
    *("--num_warmup_steps", "5", "--learning_rate", "4e-3", "--val_check_interval", "20"),
    *("--max_epochs", "-1", "--checkpoint_every_n_minutes", "0"),
)


def test_bf16_muon_and_compile_resume_with_the_same_bits(
    dataset_dir: Path, tmp_path: Path, run_fst: RunFst
) -> None:
    """Dropout included; `--deterministic`, since backward passes of attention add in any order else."""
    words = (
        *(*_TRAINING, "--max_steps", "40", "--dataset_dir", dataset_dir),
        *("--experiments_root", tmp_path),
    )
    whole = run_fst(*words, "--experiment_name", "whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert "bf16-mixed precision" in whole.stderr
    assert "compiling failed" not in whole.stderr
    if IS_CUDA:
        assert "in cuda:0" in whole.stderr
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "full_stack_transformer", *map(str, words)),
            *("--experiment_name", "killed"),
        ],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    checkpoint = tmp_path / "killed" / "0" / "checkpoints" / "previous.ckpt"
    deadline = time.monotonic() + 240
    while not checkpoint.exists():  # the second step is saved
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    resumed = run_fst(
        *("train", "--resume", "last", "--experiments_root", tmp_path),
        *("--experiment_name", "killed"),
    )
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    left, right = (
        load_file(tmp_path / name / "0" / "model" / "model.safetensors")
        for name in ("whole", "killed")
    )
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    summary = json.loads((tmp_path / "whole" / "0" / "summary.json").read_text())
    assert summary["best_validation_loss"] < 5.0, "it learns: 300 tokens, 5.7 at the start"


@needs_cuda
def test_fp16_clips_the_gradients_themselves(
    dataset_dir: Path, tmp_path: Path, run_fst: RunFst
) -> None:
    """And not those that are multiplied by 65,536 for fp16, which would leave nothing of them."""
    losses = []
    for precision in ("16", "32"):
        words = ("--dataset_dir", dataset_dir, "--experiments_root", tmp_path / precision)
        done = run_fst(
            *("train", *words, "--precision", precision, "--model_config", "tiny", *_ACCELERATOR),
            *("--max_steps", "60", "--max_epochs", "-1", "--num_warmup_steps", "5"),
            *("--learning_rate", "5e-3", "--compile", "never"),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        summary = tmp_path / precision / "experiment" / "0" / "summary.json"
        losses.append(json.loads(summary.read_text())["best_validation_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=0.2)


def test_generation_agrees_with_the_processor(model_dir: Path) -> None:
    on_device, on_cpu = (
        open_model(model_dir, device=device).backbone for device in (DEVICE, "cpu")
    )
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        found = on_device(ids.to(DEVICE)).logits.float().cpu()
        expected = on_cpu(ids).logits
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    generator = TextGenerator.open(model_dir, device=DEVICE, weights_dtype="float32")
    options = {"max_new_tokens": 30, "temperature": 0.8, "seed": 7}
    texts = [generator.generate("The reader", **options)[0] for _ in range(2)]  # type: ignore[arg-type]
    assert texts[0] == texts[1]
    for sampling in (
        {"top_k": 5},
        {"top_p": 0.9},
        {"typical_p": 0.9},
        {"min_p": 0.05},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"logit_bias": {5: 4.0}},
        {"temperature": 0.0},
    ):
        assert generator.generate("The reader", **{**options, **sampling})  # type: ignore[arg-type]


def test_bfloat16_generates_many_at_once(model_dir: Path) -> None:
    generator = TextGenerator.open(
        model_dir, device=DEVICE, weights_dtype="bfloat16" if IS_CUDA else "float32"
    )
    texts = generator.generate("The reader", num_return_sequences=8, max_new_tokens=40, seed=1)
    assert len({*texts}) > 1


def test_the_service_answers_several_at_once(model_dir: Path) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "full_stack_transformer", "serve", str(model_dir)),
            *("--device", DEVICE, "--port", "0"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        log = ""
        while " at http://" not in log:
            line = process.stderr.readline()
            assert line, log
            log += line
        if IS_CUDA:
            assert "PyTorch, bfloat16 on cuda" in log
        url = log.split(" at ")[-1].split(" ")[0]
        body = {"prompt": "The reader", "max_tokens": 40, "seed": 3}
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = [
                pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=60)
                for _ in range(16)
            ]
            assert all(answer.result().status_code == 200 for answer in answers)
        chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
        assert httpx.post(f"{url}/v1/chat/completions", json=chat).status_code == 200
        for encoding in ("float", "base64"):
            text = {"input": "The reader", "encoding_format": encoding}
            assert httpx.post(f"{url}/v1/embeddings", json=text).status_code == 200
        with httpx.stream(
            "POST", f"{url}/v1/completions", json={**body, "stream": True}, timeout=60
        ) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.stderr.close()
        process.wait()


def test_slots_are_as_many_as_memory_holds(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = resolve_device(DEVICE)
    free = free_memory_bytes(device)
    assert free is not None
    assert free > 1e8
    backbone = open_model(model_dir, device=DEVICE).backbone
    monkeypatch.setattr(
        "full_stack_transformer.generation.open_engine.free_memory_bytes", lambda device: 2_000_000
    )
    engine = open_engine(backbone, num_slots=1_000, weights_dtype="float32")
    assert 1 <= engine.block_use.num_blocks < 1_000


@needs_cuda
def test_a_batch_that_does_not_fit_is_one_sentence(dataset_dir: Path, tmp_path: Path) -> None:
    """A hundredth of the memory stands for a small device."""
    code = (
        "import sys, torch\ntorch.cuda.set_per_process_memory_fraction(0.01)\n"
        "from full_stack_transformer.command_line import run\nsys.exit(run(sys.argv[1:]))"
    )
    words = (
        *("train", "--dataset_dir", dataset_dir, "--experiments_root", tmp_path, *_ACCELERATOR),
        *("--model_config", "base", "--batch_size", "256", "--compile", "never"),
        *("--limit_train_batches", "1.0", "--precision", "32"),
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr[-3000:]
    assert "memory" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.fixture
def little_memory() -> Iterator[torch.device]:
    """The device, of whose memory torch may take 64 MB more than it has."""
    device = torch.device("cuda", 0)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    allowed = torch.cuda.memory_allocated(device) + _LEFT_BYTES
    torch.cuda.set_per_process_memory_fraction(allowed / total, device)
    yield device
    torch.cuda.set_per_process_memory_fraction(1.0, device)
    torch.cuda.empty_cache()


@needs_cuda
def test_a_device_that_is_nearly_full_takes_fewer_texts_or_says_so(
    little_memory: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    ids = {"begin": 0, "end": 1, "pad": 2}
    backbone = new_backbone("mini", vocab_size=300, max_length=4096, special_token_ids=ids).eval()
    free = free_memory_bytes(little_memory)
    assert free is not None
    assert free <= _LEFT_BYTES
    engine = open_engine(backbone.to(little_memory), num_slots=64)
    assert engine.memory is not None
    assert engine.memory.num_tokens < 64 * 4096
    assert "memory holds" in caplog.text
    rest = free_memory_bytes(little_memory) or 0
    taken = torch.empty(max(0, rest - 2**20), dtype=torch.uint8, device=little_memory)
    with pytest.raises(MachineError, match=r"a text of 256 tokens needs|GPU's memory is short"):
        open_engine(backbone, num_slots=64)
    del taken


@needs_cuda
def test_a_model_that_does_not_fit_is_one_sentence(little_memory: torch.device) -> None:
    ids = {"begin": 0, "end": 1, "pad": 2}
    large = new_backbone("base", vocab_size=300, max_length=64, special_token_ids=ids)
    with pytest.raises(MachineError, match="the GPU's memory is short for the model's weights"):
        moved(large, little_memory)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NOT RUN: it needs two CUDA devices")
def test_two_gpus_train_and_validate_together(
    dataset_dir: Path, tmp_path: Path, run_fst: RunFst
) -> None:
    done = run_fst(
        *("train", "--dataset_dir", dataset_dir, "--experiments_root", tmp_path),
        *("--model_config", "tiny", "--accelerator", "gpu", "--devices", "2", "--strategy", "ddp"),
        *("--max_epochs", "-1", "--max_steps", "10", "--val_check_interval", "5"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("step 5: validation loss") == 1


def test_the_doctor_knows_the_device(run_fst: RunFst) -> None:
    if "doctor" not in {name for name, _, _ in COMMANDS}:
        pytest.skip("there is no fst doctor")
    done = run_fst("doctor", "--json")
    assert done.returncode == 0, done.stderr
    content = done.stdout
    json.loads(content)
    if IS_CUDA:
        assert torch.cuda.get_device_name(0) in content


def test_one_line_of_json_beside_nanogpts_way() -> None:
    command = [sys.executable, "tests/benchmarks/train_gpu.py", "--device", DEVICE]
    if not IS_CUDA:
        command.append("--short")
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[1],
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = done.stdout.splitlines()[-1]
    print(line)
    result = json.loads(line)
    assert result["ours"]["tokens_per_second"] > 0
    assert result["nanogpt"]["tokens_per_second"] > 0
