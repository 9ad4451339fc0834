"""How fast the C++ decoder of each instruction set is, beside PyTorch or another checkout.

python tests/benchmarks/decoder.py --subjects torch avx2 --weights_dtype float32
python tests/benchmarks/decoder.py --subjects ../before . --shape gpt2 --past 2000 --kv_dtype int8

    1, 8 and 32 streams of a token each after 200, a prompt of 512 ──> each subject in turn, A B B A ──> ms

A model of SmolLM2's shape with random values, 10 layers of 576, or another one, on one thread. After 2,000
tokens there are 8 streams at most, after 8,000 one; the prompt then stands behind them. A subject is an
instruction set, `torch`, or the directory of another checkout with the best decoder of that. Each is a
process that has loaded the model. Processor time is counted, because neighbours take turns with us, and the
table gives the smallest one and the median of the ratios to the first subject, where more than 1 is faster.
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
PROMPT, BLOCK_SIZE = 512, 32
CELLS = {"1 stream": 1, "8 streams": 8, "32 streams": 32, "prompt": 0}
# Tokens that streams have read -> the most streams.
PASTS = {200: 32, 2000: 8, 8000: 1}
# Layers, heads, heads of keys, hidden size, intermediate size.
SHAPES = {
    "smollm2": (10, 9, 3, 576, 1536),
    "llama": (4, 16, 4, 1024, 2816),
    "gpt2": (4, 12, 12, 768, 3072),
}


def _backbone(shape: str, max_length: int) -> Any:
    import transformers

    num_layers, num_heads, num_key_heads, hidden_size, intermediate_size = SHAPES[shape]
    if shape == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_layer=num_layers,
                n_head=num_heads,
                n_embd=hidden_size,
                vocab_size=16384,
                n_positions=max_length,
            )
        ).eval()
    config = transformers.LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_heads,
        vocab_size=16384,
        max_position_embeddings=max_length,
    )
    return transformers.LlamaForCausalLM(config).eval()


def work(subject: str, arguments: argparse.Namespace) -> None:
    """Answer each line, a number of streams or 0 for a prompt, with seconds of processor time for a step."""
    import torch

    from full_stack_transformer.generation.runners.native.decoder import NativeRunner
    from full_stack_transformer.generation.runners.torch import Runner, SequenceWork, TorchRunner

    weights_dtype, past = arguments.weights_dtype, arguments.past
    num_streams, prompt_start = PASTS[past], past if past > PROMPT else 0
    # A table of blocks for each stream, anywhere in the pool.
    num_own = -(-(past + PROMPT + 16) // BLOCK_SIZE)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tables = torch.randperm(num_streams * num_own).view(num_streams, num_own).int().numpy()
    backbone = _backbone(arguments.shape, num_own * BLOCK_SIZE)
    if subject == "torch":
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[weights_dtype]
        runner: Runner = TorchRunner(backbone.to(dtype), num_blocks=tables.size)
    else:
        options: dict[str, Any] = {} if Path(subject).is_dir() else {"isa": subject}
        kv_dtype = "float32" if weights_dtype == "float32" else "bfloat16"
        runner = NativeRunner(
            backbone,
            num_blocks=tables.size,
            block_size=BLOCK_SIZE,
            weights_dtype=weights_dtype,
            kv_dtype=arguments.kv_dtype or kv_dtype,  # type: ignore[arg-type]
            num_threads=1,
            **options,
        )
    for number, table in enumerate(tables):
        ids = [(7 * place + number) % 2000 for place in range(past)]
        for start in range(0, past, PROMPT):
            runner.run([SequenceWork(table, start, ids[start : start + PROMPT], 0)])
    print("ready", flush=True)
    for line in sys.stdin:
        num_streams = int(line)
        steps = 8 // num_streams + 1 if num_streams else 1
        before = time.thread_time()
        for step in range(steps):
            if num_streams:
                runner.run([SequenceWork(one, past + step, [5], 1) for one in tables[:num_streams]])
            else:
                prompt = [(11 * place) % 2000 for place in range(PROMPT)]
                runner.run([SequenceWork(tables[0], prompt_start, prompt, 1)])
        print((time.thread_time() - before) / steps, flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="+", default=["torch", "avx2"])
    parser.add_argument("--weights_dtype", default="float32")
    parser.add_argument("--kv_dtype", help="of keys and values; by default that of the service")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--past", type=int, choices=PASTS, default=200)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--worker")
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments)
        return
    subjects: list[str] = arguments.subjects
    workers = {one: _start(one) for one in subjects}
    cells = {cell: number for cell, number in CELLS.items() if number <= PASTS[arguments.past]}
    seconds: dict[str, dict[str, list[float]]] = {
        one: {cell: [] for cell in cells} for one in subjects
    }
    for number in range(arguments.rounds):
        for cell, num_streams in cells.items():
            for one in subjects if number % 2 else reversed(subjects):
                seconds[one][cell].append(_ask(workers[one], str(num_streams)))
    for worker in workers.values():
        worker.communicate()
    for cell in cells:
        for one in subjects:
            pairs = zip(seconds[subjects[0]][cell], seconds[one][cell], strict=True)
            result = {
                "weights": arguments.weights_dtype,
                "shape": arguments.shape,
                "past": arguments.past,
                "cell": cell,
                "subject": one,
                "ms": round(min(seconds[one][cell]) * 1e3, 2),
                "times as fast": round(
                    statistics.median(first / other for first, other in pairs), 2
                ),
            }
            print(json.dumps(result))


def _start(subject: str) -> "subprocess.Popen[str]":
    checkout = subject if Path(subject).is_dir() else str(HERE.parents[1])
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", subject]
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
