"""Fine-tuning beside TRL's SFTTrainer: tokens per second and peak memory, on the same batches.

python tests/benchmarks/fine_tuning.py --short
python tests/benchmarks/fine_tuning.py --peer_python PYTHON_WITH_TRL

Conversations of random ids, of which a third are answers; all weights, and LoRA of rank 16 on all linear
layers. Each way is a process of its own (`fine_tuning_peers.py`) that waits while another one trains a block
of steps: A B A B. Both have fp32 weights, multiply in bf16 where the hardware does, and keep all activations
unless --checkpointing. The model has the shape of SmolLM2-135M and random weights, with --short four layers.
Without TRL ours is measured alone. Prints as its last line the ratios and what they are to be; higher is
better.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path.insert(0, str(REPOSITORY))  # run by its path, this script sees only its own directory

from full_stack_transformer.machine import (  # noqa: E402
    ALLOCATOR_SETTINGS,
    ALLOCATOR_VARIABLE,
    multiplies_bfloat16,
    prepare_libraries,
    processor_name,
)

prepare_libraries()  # before torch is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from full_stack_transformer.datasets.corpus import CorpusWriter  # noqa: E402
from full_stack_transformer.tokenization.document_tokenizer import TrainedTokenizer  # noqa: E402
from tests.benchmarks.machine import commit  # noqa: E402
from tests.benchmarks.train_peers import NUM_THREADS  # noqa: E402

METHODS = ("full", "lora")
VOCAB_SIZE = 49152
SMOLLM2: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": VOCAB_SIZE,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
ROWS, NUM_LAYERS, NUM_STEPS = 4, 30, 2
SHORT_ROWS, SHORT_NUM_LAYERS, SHORT_NUM_STEPS = 2, 4, 1
SPEED_AIM, MEMORY_AIM = 1.3, 1.0


class Subject:
    """A process that trains a block when it is told to."""

    def __init__(self, name: str, job: dict[str, Any], python: str) -> None:
        self.name, self.blocks, self.problem = name, [], ""  # type: tuple[str, list[dict[str, Any]], str]
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(NUM_THREADS),
        }
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        if name == "ours":  # as `fst train` starts itself
            environment[ALLOCATOR_VARIABLE] = ALLOCATOR_SETTINGS
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (for the life of the process)
        self._process = subprocess.Popen(
            [python, str(HERE / "fine_tuning_peers.py"), json.dumps({**job, "subject": name})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            text=True,
        )

    def read(self) -> dict[str, Any]:
        """What the process answers to a block, or to its start."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                block: dict[str, Any] = json.loads(line)
                return block
        self._errors.seek(0)
        self.problem = (self._errors.read().strip().splitlines() or ["ended without a word"])[-1]
        return {}

    def run(self, num_steps: int, *, is_counted: bool) -> None:
        """Train a block."""
        if self.problem:
            return
        assert self._process.stdin is not None
        self._process.stdin.write(f"{num_steps}\n")
        self._process.stdin.flush()
        block = self.read()
        if block and is_counted:
            self.blocks.append(block)

    def rate(self) -> float:
        """Tokens per second, the median of the blocks."""
        return statistics.median(float(block["tokens"] / block["seconds"]) for block in self.blocks)

    def peak_mb(self) -> int:
        """Of the process."""
        return max(int(block["slots"]) for block in self.blocks)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        if self._process.poll() is None:
            self._process.stdin.close()
            self._process.wait(timeout=60)


def write_files(directory: Path, *, num_layers: int) -> None:
    """A model with random weights, and a dataset of conversations."""
    model, dataset = directory / "model", directory / "talks" / "0"
    torch.manual_seed(0)
    config = LlamaConfig(
        **SMOLLM2, num_hidden_layers=num_layers, bos_token_id=0, eos_token_id=1, pad_token_id=2
    )
    LlamaForCausalLM(config).save_pretrained(model)
    tokenizer = TrainedTokenizer.train(["a b c"], vocab_size=260)
    for place in (model, dataset / "tokenizer"):
        tokenizer.save(place, model_max_length=8192)
    numbers = np.random.default_rng(0)
    description: dict[str, Any] = {"format_version": 1, "kind": "conversations"}
    description |= {"dataset_name": "talks", "vocab_size": tokenizer.vocab_size}
    description |= {"special_token_ids": {"begin": 0, "end": 1, "pad": 2}, "max_sample_length": 512}
    for split, count in (("train", 400), ("valid", 4)):
        with CorpusWriter(dataset / split, VOCAB_SIZE, has_answers=True) as corpus:
            for _ in range(count):
                length = int(np.clip(numbers.lognormal(5.2, 0.5), 32, 512))
                learned = np.arange(length) >= length - length // 3
                ids = numbers.integers(3, tokenizer.vocab_size, length)
                corpus.append(ids, np.array([length]), learned)
        description[f"number_of_{split}_samples"] = corpus.num_samples
        description[f"number_of_{split}_tokens"] = corpus.num_tokens
    (dataset / "description.json").write_text(json.dumps(description))


def measure(method: str, job: dict[str, Any], options: argparse.Namespace) -> dict[str, Subject]:
    """Train both ways in turn; the first block of each warms it up and is not counted."""
    subjects = {
        name: Subject(name, {**job, "method": method}, python)
        for name, python in (("ours", sys.executable), ("trl", options.peer_python))
    }
    for subject in subjects.values():
        subject.read()
    for repetition in range(options.repetitions + 1):
        for subject in subjects.values():
            subject.run(job["steps"], is_counted=repetition > 0)
    for subject in subjects.values():
        if subject.problem:
            print(f"{method}: {subject.name} is left out: {subject.problem}")
        subject.close()
    return {name: subject for name, subject in subjects.items() if not subject.problem}


def main() -> None:
    """Measure all methods and print what came out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--short", action="store_true", help="under a minute: four layers")
    parser.add_argument("--repetitions", type=int, help="blocks of each way (3, short 2)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--precision", choices=("auto", "bf16", "32"), default="auto")
    parser.add_argument("--peer_python", default=sys.executable, help="Python with TRL")
    options = parser.parse_args()
    options.repetitions = options.repetitions or (2 if options.short else 3)
    if options.precision == "auto":
        options.precision = "bf16" if multiplies_bfloat16(torch.device("cpu")) else "32"
    print(f"{processor_name()}, {NUM_THREADS} threads, {options.precision}, commit {commit()}")
    print(f"load {os.getloadavg()[0]:.1f}")
    results: dict[str, dict[str, float]] = {"ratios": {}, "aims": {}}
    with tempfile.TemporaryDirectory() as directory:
        layers = SHORT_NUM_LAYERS if options.short else NUM_LAYERS
        write_files(Path(directory), num_layers=layers)
        job = {
            "model": str(Path(directory) / "model"),
            "dataset": str(Path(directory) / "talks" / "0"),
            "rows": SHORT_ROWS if options.short else ROWS,
            "steps": SHORT_NUM_STEPS if options.short else NUM_STEPS,
            "precision": options.precision,
            "checkpointing": options.checkpointing,
            "pad_id": 2,
        }
        for method in METHODS:
            report(method, measure(method, job, options), results)
    print(json.dumps({"benchmark": "fine_tuning", **results}))


def report(method: str, subjects: dict[str, Subject], results: dict[str, dict[str, float]]) -> None:
    """Print a table, and note the ratios."""
    print(f"\n{method}: tokens/s (least to most), peak memory")
    for name, subject in subjects.items():
        rates = [block["tokens"] / block["seconds"] for block in subject.blocks]
        print(
            f"  {name:6}{subject.rate():8,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"
            f"  {subject.peak_mb():,} MB"
        )
    if {"ours", "trl"} <= subjects.keys():
        ours, theirs = subjects["ours"], subjects["trl"]
        results["ratios"][f"{method}, speed"] = round(ours.rate() / theirs.rate(), 2)
        results["aims"][f"{method}, speed"] = SPEED_AIM
        results["ratios"][f"{method}, memory"] = round(theirs.peak_mb() / ours.peak_mb(), 2)
        results["aims"][f"{method}, memory"] = MEMORY_AIM


if __name__ == "__main__":
    main()
