"""How fast the C++ decoder of each instruction set is, beside PyTorch or another checkout.

python tests/benchmarks/decoder.py --subjects torch avx2 --weights_dtype float32

    1, 8 and 32 streams of a token each after 200, a prompt of 512 ──> each subject in turn, A B B A ──> ms

A model of Llama's shape with random values, 10 layers of 576, on one thread. A subject is an instruction set,
`torch`, or the directory of another checkout with the best decoder of that. Each is a process that has loaded
the model. Processor time is counted, because neighbours take turns with us, and the table gives the smallest
one and the median of the ratios to the first subject, where more than 1 is faster.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
NUM_STREAMS = 32
PAST, PROMPT, MAX_LENGTH = 200, 512, 768
CELLS = {"1 stream": 1, "8 streams": 8, "32 streams": 32, "prompt": 0}


def work(subject: str, weights_dtype: str) -> None:
    """Answer each line, a number of streams or 0 for a prompt, with seconds of processor time for a step."""
    import torch
    import transformers

    from full_stack_transformer.generation.runners.native.decoder import NativeRunner
    from full_stack_transformer.generation.runners.torch import Runner, SequenceWork, TorchRunner

    # A table of blocks for each stream.
    num_own = MAX_LENGTH // 32
    tables = [range(one * num_own, (one + 1) * num_own) for one in range(NUM_STREAMS)]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=10,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=16384,
        max_position_embeddings=MAX_LENGTH,
    )
    backbone = transformers.LlamaForCausalLM(config).eval()
    if subject == "torch":
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[weights_dtype]
        runner: Runner = TorchRunner(backbone.to(dtype), num_blocks=NUM_STREAMS * num_own)
    else:
        options: dict[str, Any] = {} if Path(subject).is_dir() else {"isa": subject}
        runner = NativeRunner(
            backbone,
            num_blocks=NUM_STREAMS * num_own,
            weights_dtype=weights_dtype,  # type: ignore[arg-type]
            kv_dtype="float32" if weights_dtype == "float32" else "bfloat16",
            num_threads=1,
            **options,
        )
    for number, table in enumerate(tables):
        past = [(7 * place + number) % 2000 for place in range(PAST)]
        runner.run([SequenceWork(table, 0, past, 0)])
    print("ready", flush=True)
    for line in sys.stdin:
        num_streams = int(line)
        steps = 8 // num_streams + 1 if num_streams else 1
        before = time.thread_time()
        for step in range(steps):
            if num_streams:
                runner.run([SequenceWork(one, PAST + step, [5], 1) for one in tables[:num_streams]])
            else:
                prompt = [(11 * place) % 2000 for place in range(PROMPT)]
                runner.run([SequenceWork(tables[0], 0, prompt, 1)])
        print((time.thread_time() - before) / steps, flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="+", default=["torch", "avx2"])
    parser.add_argument("--weights_dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--worker")
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.weights_dtype)
        return
    subjects: list[str] = arguments.subjects
    workers = {one: _start(one, arguments.weights_dtype) for one in subjects}
    seconds: dict[str, dict[str, list[float]]] = {
        one: {cell: [] for cell in CELLS} for one in subjects
    }
    for number in range(arguments.rounds):
        for cell, num_streams in CELLS.items():
            for one in subjects if number % 2 else reversed(subjects):
                seconds[one][cell].append(_ask(workers[one], str(num_streams)))
    for worker in workers.values():
        worker.communicate()
    for cell in CELLS:
        for one in subjects:
            pairs = zip(seconds[subjects[0]][cell], seconds[one][cell], strict=True)
            result = {
                "weights": arguments.weights_dtype,
                "cell": cell,
                "subject": one,
                "ms": round(min(seconds[one][cell]) * 1e3, 2),
                "times as fast": round(
                    statistics.median(first / other for first, other in pairs), 2
                ),
            }
            print(json.dumps(result))


def _start(subject: str, weights_dtype: str) -> "subprocess.Popen[str]":
    checkout = subject if Path(subject).is_dir() else str(HERE.parents[1])
    command = [sys.executable, __file__, "--worker", subject, "--weights_dtype", weights_dtype]
    worker = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": checkout},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout is not None
    assert worker.stdout.readline() == "ready\n", f"{subject} cannot be measured here"
    return worker


def _ask(worker: "subprocess.Popen[str]", line: str) -> float:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(line + "\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


if __name__ == "__main__":
    main()
