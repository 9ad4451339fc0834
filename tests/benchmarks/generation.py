"""How fast tokens are generated: ours and its peers on the same weights, the same prompts.

python tests/benchmarks/generation.py --short

    prompts of ids ──> ours, Hugging Face, CTranslate2, OpenVINO GenAI, llama.cpp ──> greedy ids, times

Two models with random values, GPT-2 small and one of Llama's shape, and SmolLM2-135M-Instruct, in four
classes: all in fp32, all in bf16, weights in int8, weights in int4. Each subject is a process that has
loaded the model (`generation_peers.py`); for each number of streams they are asked in turn, A B C A B C,
after a round that does not count. Decoding is measured while all streams decode, 64 new tokens each after
prompts of 64; `prompt` is reading one of 512 tokens. Prompts differ from run to run, so that nobody reads
them out of a cache of prefixes. The same run measures how fast this processor reads memory and multiplies
matrices: with one stream a decoder is to read all weights for each token, with 32 and while it reads
prompts it is to multiply. Tokens of all fp32 subjects are compared with ours. What peers read is written
once into --cache, which takes 6 GB and, the first time, minutes. A peer that is not installed is skipped.

All runs once take half an hour; --shape and --class choose some. --short runs three cells once with the
fastest peers, GPT-2 in int8 unless others are chosen. Where others use the machine, --processor_time counts
that of one thread. FST_ISA=avx2 holds ours back, PyTorch and CTranslate2; OpenVINO needs a copy that cannot
see AVX-512, which hide_avx512.py makes. llama.cpp is what it was built for; LLAMA_CPP_LIB_PATH names the
folder of another build. Ends with status 1 when tokens differ, and prints as its last line the ratios to the
best peer and what they are to be, where higher is better everywhere.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import statistics
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # run by its path, this script sees only its own directory

from full_stack_transformer.machine import instruction_sets, processor_name  # noqa: E402
from tests.benchmarks.generation_models import (  # noqa: E402
    AIMS,
    SHAPES,
    WEIGHT_BYTES,
    Cell,
    Shape,
    share_of_limit,
)
from tests.benchmarks.generation_runs import (  # noqa: E402
    Runs,
    Subject,
    Worker,
    call,
    decoding_rate,
    first_difference,
    has_packages,
    reading_rate,
)
from tests.benchmarks.machine import NUM_CORES, commit  # noqa: E402

_NUM_SAME_TOKENS = 16
# Logits of these models have a deviation of 0.5; llama.cpp looks GELU up in a table of fp16.
_MAX_TIE = 0.01
_NUM_WARM_UP_TOKENS = 4

CELLS = (
    Cell("1 stream", 1, 64, 64),
    Cell("8 streams", 8, 64, 64),
    Cell("32 streams", 32, 64, 64),
    Cell("prompt", 1, 512, 1),
)
SHORT_CELLS = (Cell("1 stream", 1, 64, 32), Cell("8 streams", 8, 64, 32), CELLS[3])
OURS = "ours"
SUBJECTS = (
    Subject(OURS, "ours", "float32", "full_stack_transformer", is_in_short=True),
    Subject("HF generate", "transformers", "float32", "transformers"),
    Subject("HF continuous batching", "continuous batching", "float32", "transformers"),
    Subject("CTranslate2", "ctranslate2", "float32", "ctranslate2", "ctranslate2"),
    Subject(
        "OpenVINO GenAI", "openvino", "float32", "openvino_genai", "openvino", is_in_short=True
    ),
    Subject("llama.cpp f32", "llama.cpp", "float32", "llama_cpp", "llama.cpp", is_in_short=True),
    Subject(OURS, "ours", "bfloat16", "full_stack_transformer", is_in_short=True),
    Subject("HF generate", "transformers", "bfloat16", "transformers"),
    Subject(
        "OpenVINO GenAI", "openvino", "bfloat16", "openvino_genai", "openvino", "float32", True
    ),
    Subject("llama.cpp bf16", "llama.cpp", "bfloat16", "llama_cpp", "llama.cpp", is_in_short=True),
    Subject(OURS, "ours", "int8", "full_stack_transformer", is_in_short=True),
    Subject("CTranslate2", "ctranslate2", "int8", "ctranslate2", "ctranslate2"),
    Subject("OpenVINO GenAI", "openvino", "int8", "openvino_genai", "openvino", is_in_short=True),
    Subject("llama.cpp q8_0", "llama.cpp", "int8", "llama_cpp", "llama.cpp", is_in_short=True),
    Subject(OURS, "ours", "int4", "full_stack_transformer", is_in_short=True),
    Subject("OpenVINO GenAI", "openvino", "int4", "openvino_genai", "openvino", is_in_short=True),
    Subject("llama.cpp q4_0", "llama.cpp", "int4", "llama_cpp", "llama.cpp", is_in_short=True),
)


class Benchmark:
    """All runs of one call of this script."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.shapes = tuple(one for one in SHAPES if one.name in options.shapes)
        self.cells = SHORT_CELLS if options.short else CELLS
        self.subjects = tuple(
            one
            for one in SUBJECTS
            if one.weights in options.classes
            and (one.is_in_short or not options.short)
            # Its times are its own.
            and not (options.processor_time and one.name == "continuous batching")
        )
        self.runs: dict[tuple[Shape, Subject], Runs] = {}
        self.versions: dict[str, str] = {}
        self._num_repetitions: int = options.repetitions
        self._counts_processor_time: bool = options.processor_time
        sources = b"".join(
            (HERE / name).read_bytes() for name in ("generation_files.py", "generation_openvino.py")
        )
        self._files: Path = options.cache / f"generation-{hashlib.sha256(sources).hexdigest()[:8]}"
        self._pythons = _find_pythons({one.package for one in self.subjects}, options.peer_python)

    def measure(self) -> None:
        """Everything."""
        for shape in self.shapes:
            self._write_files("model", sys.executable, self.model(shape), shape=shape.name)
            for weights in WEIGHT_BYTES:
                subjects = [one for one in self.subjects if one.weights == weights]
                if subjects:
                    self._measure_class(shape, subjects)

    def model(self, shape: Shape) -> Path:
        """Directory of the model of transformers."""
        return self._files / shape.name

    def best_peer(self, shape: Shape, weights: str, cell: Cell) -> float:
        """Tokens per second of the fastest; 0 where there is none."""
        peers = [one for one in self.subjects if one.weights == weights and one.label != OURS]
        return max((self.runs[shape, one].median(cell) for one in peers), default=0.0)

    def ours(self, shape: Shape, weights: str) -> Runs:
        """Our runs of a class."""
        subjects = (one for one in self.subjects if one.weights == weights and one.label == OURS)
        return self.runs[shape, next(subjects)]

    def _measure_class(self, shape: Shape, subjects: list[Subject]) -> None:
        workers: dict[Subject, Worker] = {}
        for subject in subjects:
            runs = self.runs[shape, subject] = Runs()
            python = self._pythons.get(subject.package)
            if python is None:
                runs.problem = f"skipped: {subject.package} is not installed"
                print(f"{subject.label} {subject.weights}: {runs.problem}", file=sys.stderr)
            else:
                workers[subject] = self._start(shape, subject, python)
        for subject, worker in list(workers.items()):
            problem = worker.wait()
            if problem:
                self.runs[shape, subject].problem = problem
                del workers[subject]
            self.versions |= worker.versions
        for repetition in range(-1, self._num_repetitions):
            print(
                f"{shape.name} {subjects[0].weights}: repetition {repetition + 1}", file=sys.stderr
            )
            for cell in self.cells:
                prompts = _make_prompts(shape, cell, repetition)
                for subject, worker in workers.items():
                    self._ask(self.runs[shape, subject], worker, cell, prompts, repetition)
        for worker in workers.values():
            worker.close()
        ours = self.ours(shape, subjects[0].weights)
        if ours.problem:
            raise SystemExit(f"ours: {ours.problem}")

    def _start(self, shape: Shape, subject: Subject, python: str) -> Worker:
        files = self.model(shape)
        if subject.files:
            weights = subject.files_weights or subject.weights
            files = self._files / f"{shape.name}-{subject.files}-{weights}"
            self._write_files(
                subject.files, python, files, model=str(self.model(shape)), weights=weights
            )
        job = {
            "subject": subject.name,
            "model": str(self.model(shape)),
            "files": str(files),
            "weights": subject.weights,
            "isa": instruction_sets()[0],
            "num_threads": 1 if self._counts_processor_time else NUM_CORES,
            "counts_processor_time": self._counts_processor_time,
            "max_streams": max(cell.num_streams for cell in self.cells),
            "max_tokens": max(cell.num_prompt + cell.num_new for cell in self.cells),
        }
        return Worker(python, job)

    def _write_files(self, kind: str, python: str, out: Path, **fields: str) -> None:
        if not out.is_dir():
            print(f"writing {out}", file=sys.stderr)
            call(python, "generation_files.py", {"kind": kind, "out": str(out), **fields})

    def _ask(
        self, runs: Runs, worker: Worker, cell: Cell, prompts: list[list[int]], repetition: int
    ) -> None:
        if runs.problem:
            return
        is_warm_up = repetition < 0
        num_new = min(_NUM_WARM_UP_TOKENS, cell.num_new) if is_warm_up else cell.num_new
        answer, runs.problem = worker.ask(prompts, num_new)
        if runs.problem or is_warm_up:
            return
        times = answer["times"]
        rate = decoding_rate(times) if cell.is_decoding else reading_rate(times, cell.num_prompt)
        runs.rates.setdefault(cell, []).append(rate)
        runs.prompts[cell, repetition] = prompts
        runs.ids[cell, repetition] = answer["ids"]
        runs.loading_peak_mb = answer["loading_peak_mb"]
        runs.generating_peak_mb = answer["generating_peak_mb"]


def compare_tokens(benchmark: Benchmark) -> dict[str, str]:
    """What is said of each subject's tokens beside ours in fp32: label -> sentence.

    Those of subjects in fp32 are to be the same, at first and up to ties.
    """
    said: dict[str, str] = {}
    if all(subject.weights != "float32" for subject in benchmark.subjects):
        return said
    for (shape, subject), runs in benchmark.runs.items():
        ours = benchmark.ours(shape, "float32")
        if runs is ours or not runs.ids:
            continue
        pairs = [
            pair
            for key, streams in runs.ids.items()
            if key[0].is_decoding
            for pair in zip(ours.ids[key], streams, strict=True)
        ]
        num_same = statistics.median(first_difference(*pair) for pair in pairs)
        sentence = f"{num_same:g} of {len(pairs[0][0])} tokens as ours in fp32, median of streams"
        if subject.weights == "float32":
            num_ties, runs.problem = _judge(ours, runs, benchmark.model(shape))
            sentence = runs.problem or f"{sentence}; {num_ties} of {len(pairs)} differ by ties"
        said[f"{shape.name} {subject.weights} {subject.label}"] = sentence
    return said


def _judge(ours: Runs, theirs: Runs, model: Path) -> tuple[int, str]:
    """Number of streams that part from ours early at a tie, and what is wrong with others."""
    cases = _find_differences(ours, theirs)
    if not cases:
        return 0, ""
    job = {"kind": "gaps", "model": str(model), "cases": cases}
    gaps: list[float] = call(sys.executable, "generation_reference.py", job)
    wrong = [abs(gap) for gap in gaps if abs(gap) > _MAX_TIE]
    problem = (
        f"DIFFERS from ours in {len(wrong)} streams, by up to {max(wrong, default=0):.2f} in logits"
    )
    return len(gaps) - len(wrong), problem if wrong else ""


def _find_differences(ours: Runs, theirs: Runs) -> list[dict[str, object]]:
    """The texts before the first tokens in which streams differ early, and both tokens."""
    cases: list[dict[str, object]] = []
    for key, streams in theirs.ids.items():
        for prompt, our_ids, ids in zip(ours.prompts[key], ours.ids[key], streams, strict=True):
            number = first_difference(our_ids, ids)
            if number < min(_NUM_SAME_TOKENS, len(ids)):
                tokens = [our_ids[number], ids[number]]
                cases.append({"ids": [*prompt, *ids[:number]], "tokens": tokens})
    return cases


def find_ratios(benchmark: Benchmark) -> dict[str, tuple[float, float]]:
    """Ours to the fastest peer of the same class in each cell, and what that is to be."""
    ratios = {}
    for shape in benchmark.shapes:
        for weights in {one.weights: None for one in benchmark.subjects}:
            for cell in benchmark.cells:
                best = benchmark.best_peer(shape, weights, cell)
                rate = benchmark.ours(shape, weights).median(cell)
                if best:
                    ratios[f"{shape.name} {weights}, {cell.label}"] = rate / best, AIMS[weights]
    return ratios


def print_machine(benchmark: Benchmark, limits: dict[str, float], load: float) -> None:
    """Machine, versions, commit and limits."""
    versions = ", ".join(f"{name} {number}" for name, number in sorted(benchmark.versions.items()))
    print(f"machine     {processor_name()}, {NUM_CORES} cores, load {load:.1f} at the start")
    print(f"used        {instruction_sets()[0]}")
    print(f"versions    Python {platform.python_version()}, {versions}")
    print(f"commit      {commit()}")
    print(
        f"limits      reading {limits['read'] / 1e9:.0f} GB/s; matrices "
        + ", ".join(
            f"{name} {limits[name] / 1e9:,.0f} GFLOP/s" for name in limits if name != "read"
        )
    )
    print("cells       tokens/s, spread, share of the limit: reading with 1 stream, else matrices")


def print_tables(benchmark: Benchmark, limits: dict[str, float]) -> None:
    """A table for each model and class, a line per subject."""
    for shape in benchmark.shapes:
        for weights in WEIGHT_BYTES:
            subjects = [one for one in benchmark.subjects if one.weights == weights]
            if not subjects:
                continue
            n = max(len(rates) for rates in benchmark.ours(shape, weights).rates.values())
            heads = "".join(f"{cell.label:>20}" for cell in benchmark.cells)
            print(f"\n{f'{shape.name} {weights}, n {n}':24}{heads}{'load MB':>9}{'run MB':>8}")
            for subject in subjects:
                runs = benchmark.runs[shape, subject]
                if not runs.rates:
                    print(f"{subject.label:24}{runs.problem}")
                    continue
                line = "".join(
                    _cell_text(shape, weights, cell, runs, limits) for cell in benchmark.cells
                )
                memory = f"{runs.loading_peak_mb:9,.0f}{runs.generating_peak_mb:8,.0f}"
                print(f"{subject.label:24}{line}{memory}")
            best = [benchmark.best_peer(shape, weights, cell) for cell in benchmark.cells]
            ours = benchmark.ours(shape, weights)
            ratios = (
                f"{ours.median(cell) / peer:.2f}x" if peer else "no peer"
                for cell, peer in zip(benchmark.cells, best, strict=True)
            )
            print(f"{'ours is':24}" + "".join(f"{ratio:>20}" for ratio in ratios))


def _cell_text(shape: Shape, weights: str, cell: Cell, runs: Runs, limits: dict[str, float]) -> str:
    if cell not in runs.rates:
        return f"{'failed':>20}"
    rate = runs.median(cell)
    share = share_of_limit(shape, weights, cell, rate, limits)
    share_text = " " * 6 if share is None else f"{share:6.2f}"
    return f"{rate:9,.1f}{runs.spread(cell):5.0%}{share_text}"


def _make_prompts(shape: Shape, cell: Cell, repetition: int) -> list[list[int]]:
    source = random.Random(f"{shape.name} {cell.label} {repetition}")
    return [
        source.choices(range(shape.vocab_size), k=cell.num_prompt) for _ in range(cell.num_streams)
    ]


def _find_pythons(packages: set[str], peer_python: str) -> dict[str, str]:
    """The interpreter that has the package, this one before the peers'."""
    pythons: dict[str, str] = {}
    for python in (peer_python, sys.executable):
        pythons |= {name: python for name, has in has_packages(python, [*packages]).items() if has}
    return pythons


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--short", action="store_true", help="under a minute: fewer cells, one run")
    shapes, classes = [one.name for one in SHAPES], [*WEIGHT_BYTES]
    parser.add_argument("--shape", dest="shapes", nargs="+", choices=shapes, help="models (all)")
    parser.add_argument("--class", dest="classes", nargs="+", choices=classes, help="(all)")
    parser.add_argument("--repetitions", type=int, help="runs of each cell (3, short 1)")
    parser.add_argument(
        "--processor_time", action="store_true", help="of one thread: where others use the machine"
    )
    parser.add_argument("--peer_python", default=sys.executable, help="interpreter that has peers")
    cache = Path(tempfile.gettempdir(), "full-stack-transformer-benchmarks")
    parser.add_argument("--cache", type=Path, default=cache, help="directory for models")
    options = parser.parse_args()
    if options.repetitions is None:
        options.repetitions = 1 if options.short else 3
    options.shapes = options.shapes or (["gpt2"] if options.short else shapes)
    options.classes = options.classes or (["int8"] if options.short else classes)
    return options


def main() -> int:
    options = parse_options()
    load = os.getloadavg()[0]
    job = {"kind": "limits", "repetitions": 5, "counts_processor_time": options.processor_time}
    limits: dict[str, float] = call(sys.executable, "generation_reference.py", job)
    benchmark = Benchmark(options)
    benchmark.measure()
    said = compare_tokens(benchmark)
    print_machine(benchmark, limits, load)
    print_tables(benchmark, limits)
    print()
    for label, sentence in said.items():
        print(f"{label:40} {sentence}")
    ratios = find_ratios(benchmark)
    problems = {
        f"{shape.name} {subject.weights} {subject.label}": runs.problem
        for (shape, subject), runs in benchmark.runs.items()
        if runs.problem
    }
    summary = {
        "benchmark": "generation",
        "ratios": {name: round(ratio, 3) for name, (ratio, _) in ratios.items()},
        "processor": processor_name(),
        "instruction_set": instruction_sets()[0],
        "aims": {name: aim for name, (_, aim) in ratios.items()},
        "problems": problems,
    }
    print(json.dumps(summary), flush=True)
    return int(any(not problem.startswith("skipped") for problem in problems.values()))


if __name__ == "__main__":
    sys.exit(main())
