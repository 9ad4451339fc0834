"""What this processor can do at most, and what the model says exactly: the measures of the benchmark.

python tests/benchmarks/generation_reference.py '{"kind": "limits", "repetitions": 3}'

Knows nothing of who generates.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers

_READ_BYTES = 512 << 20  # far more than caches hold
_SIDE = 2048
_SLOW_SECONDS = 0.03


def measure_limits(repetitions: int, counts_processor_time: bool) -> dict[str, float]:
    """Bytes read, and operations of multiplying matrices of each type, each in a second.

    Args:
        repetitions: of each; the fastest counts.
        counts_processor_time: of one thread.
    """
    best_seconds = partial(_best_seconds, repetitions=repetitions, clock=time.perf_counter)
    if counts_processor_time:
        torch.set_num_threads(1)
        best_seconds = partial(_best_seconds, repetitions=repetitions, clock=time.process_time)
    numbers = torch.zeros(_READ_BYTES // 4)
    limits = {"read": _READ_BYTES / best_seconds(numbers.sum)}
    del numbers
    for dtype in (torch.float32, torch.bfloat16):
        for side in (_SIDE // 4, _SIDE):
            one, other = (torch.randn(side, side, dtype=dtype) for _ in range(2))
            seconds = best_seconds(partial(torch.matmul, one, other))
            limits[str(dtype).removeprefix("torch.")] = 2 * side**3 / seconds
            if seconds > _SLOW_SECONDS:  # bf16 without its instructions
                break
    one, other = (torch.randint(-127, 127, (_SIDE, _SIDE), dtype=torch.int8) for _ in range(2))
    # Weights (outputs, inputs): the other way round they would be turned in every run.
    seconds = best_seconds(partial(torch._int_mm, one, other.T))
    limits["int8"] = limits["int4"] = 2 * _SIDE**3 / seconds  # 4 bits are multiplied as 8
    return limits


def _best_seconds(work: Callable[[], Any], repetitions: int, clock: Callable[[], float]) -> float:
    """The shortest run: others on the machine only ever make it longer."""
    seconds = []
    for _ in range(repetitions + 1):
        started = clock()
        work()
        seconds.append(clock() - started)
    return min(seconds)


def find_gaps(model: str, cases: list[dict[str, Any]]) -> list[float]:
    """How far apart the model puts two tokens after a text, in logits."""
    backbone = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    gaps = []
    for case in cases:
        with torch.inference_mode():
            logits = backbone(torch.tensor([case["ids"]]), logits_to_keep=1).logits[0, -1]
        one, other = case["tokens"]
        gaps.append(float(logits[one] - logits[other]))
    return gaps


def main() -> None:
    job = json.loads(sys.argv[1])
    kind = job.pop("kind")
    result = measure_limits(**job) if kind == "limits" else find_gaps(**job)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
