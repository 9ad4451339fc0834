"""One run of one subject of the benchmark of preparation: delimiter text -> two .npy files, timed.

python tests/benchmarks/prepare_peers.py JOB

`tests/benchmarks/prepare.py` starts this with another interpreter where a peer lives in one, once per
repetition. JOB is the fields of `Job` as JSON, the result one line of JSON. The clock runs from the
files of documents and vocabulary to the closed .npy files; starting the process and importing are
outside. Peers share the reading (`read_documents`) and the cutting (`frame_and_cut`), which are as
fast as NumPy and str make them on whole files; only the ancestor does all in plain Python. Peers
neither hash nor flush to the disk, as ours does. Knows nothing of ratios.
"""

import base64
import contextlib
import hashlib
import importlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Large enough that threads have work, small enough that lists of Python integers do not pile up.
_BATCH_CHARACTERS = 4_000_000
# GPT-2's split, as tiktoken 0.14 writes it for r50k_base (tiktoken_ext/openai_public.py): equivalent to
# the original, and faster.
_GPT2_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)

Encoded = tuple[NDArray[np.integer[Any]], NDArray[np.integer[Any]]]
"""Ids of several documents in one array, and the number of ids of each."""
Encoder = Callable[[list[str]], Iterable[Encoded]]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to prepare, and how a sample looks."""

    subject: str
    documents: str
    out: str
    end_of_document: str
    tokenizer_path: str = ""
    """Directory that `--tokenizer_path` names."""
    documents_valid: str = ""
    stub_sha256: bool = False
    preimport: tuple[str, ...] = ()
    """Modules that ours is known to import on the way: imports are outside the clock for all."""
    tokenizer_json: str = ""
    bare_tokenizer_json: str = ""
    """The same without added tokens: gigatoken would find them in text."""
    ranks: str = ""
    """tiktoken's file of the same vocabulary."""
    before: str = ""
    after: str = ""
    begin_id: int = 0
    end_id: int = 0
    dtype: str = "<u2"
    max_sample_length: int = 256
    min_sample_length: int = 8


def read_documents(job: Job) -> list[str]:
    """All documents of the file, lines stripped, framed as the tokenizer wants it."""
    text = Path(job.documents).read_bytes().decode("utf-8")
    pieces = text.split(f"\n{job.end_of_document}\n")[:-1]
    stripped = ("\n".join(map(str.strip, piece.split("\n"))) for piece in pieces)
    return [f"{job.before}{document}{job.after}" for document in stripped if document.strip()]


def frame_and_cut(encoded: Encoded, job: Job) -> Encoded:
    """Ids of several documents -> ids of their samples, and the length of each sample."""
    ids, lengths = encoded
    framed_lengths = lengths + 2
    ends = np.cumsum(framed_lengths)
    starts = ends - framed_lengths
    framed = np.empty(int(framed_lengths.sum()), job.dtype)
    is_text = np.ones(len(framed), bool)
    is_text[starts] = is_text[ends - 1] = False
    framed[is_text] = ids
    framed[starts], framed[ends - 1] = job.begin_id, job.end_id
    num_pieces = -(-framed_lengths // job.max_sample_length)
    sample_lengths = np.full(int(num_pieces.sum()), job.max_sample_length)
    last = np.cumsum(num_pieces) - 1
    sample_lengths[last] = framed_lengths - (num_pieces - 1) * job.max_sample_length
    is_kept = sample_lengths >= job.min_sample_length
    if not is_kept.all():
        framed = framed[np.repeat(is_kept, sample_lengths)]
    return framed, sample_lengths[is_kept]


def write_corpus(samples: Sequence[Encoded], job: Job) -> None:
    """Write the two files as ours are named."""
    tokens = np.concatenate([tokens for tokens, _ in samples])
    lengths = np.concatenate([lengths for _, lengths in samples])
    np.save(Path(job.out, "corpus.npy"), tokens)
    np.save(Path(job.out, "sample_start_positions.npy"), np.cumsum(lengths) - lengths)


def _batches(documents: list[str]) -> Iterator[list[str]]:
    start, num_characters = 0, 0
    for index, document in enumerate(documents, start=1):
        num_characters += len(document)
        if num_characters >= _BATCH_CHARACTERS or index == len(documents):
            yield documents[start:index]
            start, num_characters = index, 0


def _from_lists(lists: Sequence[Sequence[int]]) -> Encoded:
    lengths = np.fromiter(map(len, lists), np.int64, len(lists))
    return np.fromiter(chain.from_iterable(lists), np.uint32, int(lengths.sum())), lengths


def _open_tokenizers(job: Job) -> Any:
    tokenizer = importlib.import_module("tokenizers").Tokenizer.from_file(job.tokenizer_json)
    tokenizer.encode_special_tokens = True
    return tokenizer


def _load_tokenizers(job: Job) -> Encoder:
    tokenizer = _open_tokenizers(job)

    def encode(documents: list[str]) -> Iterator[Encoded]:
        for batch in _batches(documents):
            encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            yield _from_lists([encoding.ids for encoding in encodings])

    return encode


def _load_datasets(job: Job) -> Encoder:
    datasets = importlib.import_module("datasets")
    datasets.disable_progress_bars()
    tokenizer = _open_tokenizers(job)

    def encode_batch(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        tokenizer.encode_special_tokens = True  # lost on the way to the other process
        encodings = tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"input_ids": [encoding.ids for encoding in encodings]}

    def encode(documents: list[str]) -> Iterator[Encoded]:
        mapped = datasets.Dataset.from_dict({"text": documents}).map(
            encode_batch,
            batched=True,
            num_proc=2,
            remove_columns=["text"],
            features=datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))}),
            cache_file_name=str(Path(job.out, "map.arrow")),
        )
        for chunk in mapped.data.column("input_ids").chunks:
            yield chunk.flatten().to_numpy(), chunk.value_lengths().to_numpy().astype(np.int64)

    return encode


def _load_tiktoken(job: Job) -> Encoder:
    ranks = Path(job.ranks).read_bytes().splitlines()
    encoding = importlib.import_module("tiktoken").Encoding(
        "benchmark",
        pat_str=_GPT2_PATTERN,
        mergeable_ranks={
            base64.b64decode(token): int(rank) for token, rank in map(bytes.split, ranks)
        },
        special_tokens={},
    )

    def encode(documents: list[str]) -> Iterator[Encoded]:
        for batch in _batches(documents):
            yield _from_lists(encoding.encode_ordinary_batch(batch, num_threads=2))

    return encode


def _load_gigatoken(job: Job) -> Encoder:
    awkward = importlib.import_module("awkward")
    gigatoken = importlib.import_module("gigatoken")
    backend = gigatoken.Tokenizer(job.bare_tokenizer_json).backend

    def encode(documents: list[str]) -> Iterator[Encoded]:
        encoded = backend.encode_batch(documents, parallel=True)
        yield awkward.flatten(encoded).to_numpy(), awkward.num(encoded).to_numpy()

    return encode


PEERS: dict[str, tuple[tuple[str, ...], Callable[[Job], Encoder]]] = {
    "tokenizers": (("tokenizers",), _load_tokenizers),
    "datasets": (("datasets", "tokenizers"), _load_datasets),
    "tiktoken": (("tiktoken",), _load_tiktoken),
    "gigatoken": (("gigatoken", "awkward"), _load_gigatoken),
}
"""Packages to import before the clock, and what opens the vocabulary."""


def run_peer(job: Job) -> dict[str, Any]:
    """Prepare with a peer that encodes many documents at once."""
    packages, load = PEERS[job.subject]
    for package in packages:
        importlib.import_module(package)
    started = time.perf_counter()
    encode = load(job)
    loaded = time.perf_counter()
    samples = [frame_and_cut(encoded, job) for encoded in encode(read_documents(job))]
    write_corpus(samples, job)
    return _result(started, loaded, packages)


def run_ancestor(job: Job) -> dict[str, Any]:
    """The algorithm of 2020: one document after the other, lists of Python integers to the end."""
    importlib.import_module("tokenizers")
    started = time.perf_counter()
    tokenizer = _open_tokenizers(job)
    loaded = time.perf_counter()
    documents: list[str] = []
    lines: list[str] = []
    for line in Path(job.documents).read_text(encoding="utf-8").split("\n"):
        if line.strip() == job.end_of_document:
            documents.append("\n".join(lines))
            lines = []
        else:
            lines.append(line.strip())
    corpus: list[int] = []
    positions: list[int] = []
    for document in documents:
        if not document.strip():
            continue
        text = f"{job.before}{document}{job.after}"
        encoded = tokenizer.encode(text, add_special_tokens=False).ids
        framed = [job.begin_id, *encoded, job.end_id]
        for start in range(0, len(framed), job.max_sample_length):
            sample = framed[start : start + job.max_sample_length]
            if len(sample) >= job.min_sample_length:
                positions.append(len(corpus))
                corpus.extend(sample)
    np.save(Path(job.out, "corpus.npy"), np.array(corpus, dtype=job.dtype))
    np.save(Path(job.out, "sample_start_positions.npy"), np.array(positions, dtype=np.int64))
    return _result(started, loaded, ("tokenizers",))


class _NoHash:
    """Stands in for sha256: what hashing costs is the difference."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def update(self, _: object) -> None:
        pass

    def hexdigest(self) -> str:
        return "0" * 64


def run_ours(job: Job) -> dict[str, Any]:
    """`fst prepare_dataset`, called as a function."""
    sha256 = hashlib.sha256
    for name in job.preimport:
        with contextlib.suppress(Exception):  # not every name in sys.modules can be imported by it
            importlib.import_module(name)
    if job.stub_sha256:
        setattr(hashlib, "sha256", _NoHash)  # noqa: B010 — mypy refuses the assignment
    from full_stack_transformer.arguments.data import PrepareDatasetArguments
    from full_stack_transformer.preparation.prepare import main as prepare_dataset

    arguments = PrepareDatasetArguments(
        documents_train_file=(Path(job.documents),),
        documents_valid_file=(Path(job.documents_valid),),
        datasets_root=Path(job.out),
        dataset_name="benchmark",
        end_of_document=job.end_of_document,
        tokenizer_path=job.tokenizer_path,
    )
    started = time.perf_counter()
    directory = prepare_dataset(arguments)
    result = _result(started, started, ("full_stack_transformer", "tokenizers"))
    files = [*directory.rglob("*"), Path(job.documents), Path(job.documents_valid)]
    return {
        **result,
        "directory": str(directory),
        "backend": _backend(directory),
        "hash_seconds": _seconds_to_hash(files, sha256),
        "modules": sorted(name for name in sys.modules if not name.startswith("__")),
    }


def _backend(directory: Path) -> str:
    description = json.loads((directory / "description.json").read_text(encoding="utf-8"))
    return str(description.get("tokenizer_backend"))


def _seconds_to_hash(paths: Iterable[Path], sha256: Callable[[], Any]) -> float:
    """Time to hash all files, one after the other, out of the page cache."""
    started = time.perf_counter()
    for path in paths:
        if path.is_file():
            with path.open("rb") as file:
                digest = sha256()
                while block := file.read(1 << 20):
                    digest.update(block)
    return time.perf_counter() - started


def _result(started: float, loaded: float, packages: Iterable[str]) -> dict[str, Any]:
    return {
        "seconds": time.perf_counter() - started,
        "load_seconds": loaded - started,
        "peak_mb": _peak_bytes() / 1e6,
        "versions": {package: version(package) for package in packages},
    }


def _peak_bytes() -> int:
    """Most memory of this process at a time, and of its largest child."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    try:
        # Linux hands ru_maxrss on through fork and exec: there it may be that of the caller.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        own = int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (own + children) * unit


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    Path(job.out).mkdir(parents=True, exist_ok=True)
    run = {"ours": run_ours, "ancestor": run_ancestor}.get(job.subject, run_peer)
    print(json.dumps(run(job)), flush=True)


if __name__ == "__main__":
    main()
