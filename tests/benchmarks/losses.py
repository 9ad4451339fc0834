"""What the loss costs: ours and its peers on the same logits, forward and backward.

python tests/benchmarks/losses.py --short

    logits (samples, tokens, vocabulary), labels ──> loss, gradient of the logits

Peers: torch's cross entropy as it is; the same with logits cast to fp32, as transformers does (in bf16
torch alone rounds the loss to three digits); with the unlikelihood of Welleck et al. 2019 the way of
2020, a log-softmax whose gathered entries autograd differentiates, and a dense one, where candidates are
marked over the whole vocabulary. Runs are interleaved, A B C A B C, in one process; medians. The memory
settings of `fst train` are in place. On a machine that others use too, measure the processor's time
instead of the wall's: --processor_time --threads 1. The last line holds the ratios and what they are to
be, where higher is better everywhere.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # run by its path, this script sees only its own directory

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional  # noqa: E402

from full_stack_transformer.modelling.losses import (  # noqa: E402
    LossOptions,
    language_model_loss,
    next_token_loss,
)

# samples, tokens, vocabulary: of the small and of the big model of tests/benchmarks/train.py
SIZES = {"small": (16, 256, 8192), "big": (4, 256, 50257)}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALPHA = 1.0
MAX_UNLIKELIHOOD_COST = 1.2
ALLOCATOR = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"
ALLOCATOR += ":glibc.malloc.top_pad=67108864:glibc.malloc.hugetlb=1"


@dataclass(frozen=True)
class Batch:
    """What every subject gets."""

    logits: Tensor
    input_ids: Tensor
    targets: Tensor
    """Labels where they are predicted, for the peers."""


Subject = Callable[[Batch], Tensor]


def torch_alone(batch: Batch) -> Tensor:
    return functional.cross_entropy(
        batch.logits.flatten(0, 1), batch.targets.flatten(), reduction="sum"
    )


def torch_in_fp32(batch: Batch) -> Tensor:
    return functional.cross_entropy(
        batch.logits.float().flatten(0, 1), batch.targets.flatten(), reduction="sum"
    )


def ours(batch: Batch) -> Tensor:
    return next_token_loss(batch.logits, batch.input_ids)[0]


def ours_unlikelihood(batch: Batch) -> Tensor:
    options = LossOptions(unlikelihood_alpha=ALPHA)
    return language_model_loss(batch.logits, batch.input_ids, batch.input_ids, options)[0]


def gathered_unlikelihood(batch: Batch) -> Tensor:
    """Cross entropy, and a second softmax whose entries at the tokens before are gathered."""
    num_tokens = batch.input_ids.shape[1]
    log_p = batch.logits.float().log_softmax(2)
    index = batch.input_ids[:, None, :].expand(-1, num_tokens, -1)
    p = log_p.gather(2, index).exp()
    is_past = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    is_candidate = is_past & (index != batch.targets[:, :, None])
    penalty = -(1 - p).clamp(min=1e-5).log()
    return torch_in_fp32(batch) + ALPHA * (penalty * is_candidate).sum()


def dense_unlikelihood(batch: Batch) -> Tensor:
    """Cross entropy, and a penalty over the vocabulary, with the candidates marked in it."""
    log_p = batch.logits.float().log_softmax(2)
    is_past = torch.ones((batch.input_ids.shape[1],) * 2).tril().expand(len(log_p), -1, -1)
    index = batch.input_ids[:, None, :].expand(is_past.shape)
    candidates = torch.zeros_like(log_p).scatter_reduce_(2, index, is_past, "amax")
    candidates.scatter_(2, batch.targets.clamp(min=0)[:, :, None], 0)
    penalty = -(1 - log_p.exp()).clamp(min=1e-5).log()
    return torch_in_fp32(batch) + ALPHA * (penalty * candidates).sum()


SUBJECTS: dict[str, Subject] = {
    "torch": torch_alone,
    "torch, logits in fp32": torch_in_fp32,
    "ours": ours,
    "ours, unlikelihood": ours_unlikelihood,
    "gathered unlikelihood": gathered_unlikelihood,
    "dense unlikelihood": dense_unlikelihood,
}
# subject, peer, how many times as fast it is to be
COMPARISONS = (
    ("ours", "torch, logits in fp32", 1.0),
    ("ours, unlikelihood", "gathered unlikelihood", 2.0),
    ("ours, unlikelihood", "dense unlikelihood", 4.0),
)


def make_batch(size: tuple[int, int, int], dtype: torch.dtype) -> Batch:
    """Logits of a model that knows a little, and tokens that repeat as those of a text do."""
    generator = torch.Generator().manual_seed(0)
    num_samples, num_tokens, vocab_size = size
    logits = 2 * torch.randn(*size, generator=generator)
    # Zipf's law: the logarithm of the rank is uniform.
    ranks = (
        torch.rand(num_samples, num_tokens, generator=generator) * torch.tensor(vocab_size).log()
    )
    input_ids = ranks.exp().long().clamp(max=vocab_size - 1)
    targets = torch.cat([input_ids[:, 1:], torch.full((num_samples, 1), -100)], dim=1)
    return Batch(logits.to(dtype).requires_grad_(), input_ids, targets)


def measure(
    batch: Batch, num_repetitions: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each subject, the runs interleaved; the first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in SUBJECTS}
    for repetition in range(num_repetitions + 1):
        for name, subject in SUBJECTS.items():
            batch.logits.grad = None
            started = clock()
            (subject(batch) / batch.input_ids.numel()).backward()  # type: ignore[no-untyped-call]
            if repetition:
                seconds[name].append(clock() - started)
    return seconds


def find_ratios(case: str, seconds: dict[str, list[float]]) -> dict[str, tuple[float, float]]:
    """Each ratio and its aim; higher is better."""
    medians = {name: statistics.median(runs) for name, runs in seconds.items()}
    ratios = {
        f"{case}: {peer} / {subject}": (medians[peer] / medians[subject], aim)
        for subject, peer, aim in COMPARISONS
    }
    if case.startswith("big"):
        cost = medians["ours, unlikelihood"] / medians["ours"]
        name = f"{case}: {MAX_UNLIKELIHOOD_COST} / cost of unlikelihood"
        ratios[name] = (MAX_UNLIKELIHOOD_COST / cost, 1.0)
    return ratios


def print_table(case: str, seconds: dict[str, list[float]]) -> None:
    """A line per subject."""
    alone = statistics.median(seconds["ours"])
    print(f"\n{case:28}{'n':>4}{'ms':>9}{'spread':>8}{'of ours':>9}")
    for name, runs in seconds.items():
        median = statistics.median(runs)
        spread = (max(runs) - min(runs)) / median
        print(f"  {name:26}{len(runs):4}{median * 1e3:9.1f}{spread:8.0%}{median / alone:8.2f}x")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--short", action="store_true", help="under a minute: three runs of each")
    parser.add_argument("--repetitions", type=int, help="runs of each subject (15, short 3)")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--processor_time", action="store_true", help="not wall time")
    options = parser.parse_args()
    clock = time.process_time if options.processor_time else time.perf_counter
    torch.set_num_threads(options.threads)
    print(f"machine     {platform.machine()}, {os.cpu_count()} cores, {options.threads} threads")
    print(f"versions    Python {platform.python_version()}, torch {torch.__version__}")
    print(f"load        {os.getloadavg()[0]:.1f} at the start")
    ratios: dict[str, tuple[float, float]] = {}
    for size_name, size in SIZES.items():
        for type_name, dtype in TYPES.items():
            case = f"{size_name} {type_name}"
            num_repetitions = options.repetitions or (3 if options.short else 15)
            seconds = measure(make_batch(size, dtype), num_repetitions, clock)
            print_table(f"{case}, {size[0]} x {size[1]} x {size[2]:,}", seconds)
            ratios.update(find_ratios(case, seconds))
    print()
    for name, (ratio, aim) in ratios.items():
        print(f"{name:60} {ratio:6.2f}  (aim {aim:g})")
    summary = {
        "benchmark": "losses",
        "ratios": {name: round(ratio, 3) for name, (ratio, _) in ratios.items()},
        "aims": {name: aim for name, (_, aim) in ratios.items()},
    }
    print(json.dumps(summary), flush=True)
    return 0


if __name__ == "__main__":
    if "GLIBC_TUNABLES" not in os.environ:
        environment = {**os.environ, "GLIBC_TUNABLES": ALLOCATOR}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    sys.exit(main())
