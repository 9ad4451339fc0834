"""A cluster gives the bytes of one machine, also when nodes and the command itself are killed."""

import contextlib
import gzip
import hashlib
import json
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from full_stack_transformer.arguments.data import PrepareDatasetArguments
from full_stack_transformer.datasets.corpus import DatasetDirectory
from full_stack_transformer.documents import delimited, json_lines
from full_stack_transformer.documents.blocks import ReadingOptions
from full_stack_transformer.documents.parts import FilePart
from full_stack_transformer.errors import DocumentsError, UsageError
from full_stack_transformer.preparation import encoding, journal, prepare, ray_workers
from full_stack_transformer.preparation.prepare import main as prepare_dataset
from full_stack_transformer.ray_cluster import Cluster
from full_stack_transformer.storage import files_below, versions
from tests.ray_nodes import RayNodes, ray_nodes

_END = "[END_OF_DOCUMENT]"
# The command with small parts and a journal of every block.
_COMMAND = """
import sys
from full_stack_transformer.__main__ import main
from full_stack_transformer.preparation import journal, ray_workers

ray_workers._PART_BYTES = int(sys.argv[1])
journal._SECONDS_BETWEEN_LINES = 0.0
main(sys.argv[2:])
"""
_SECONDS_TO_START = 120.0


def _texts(num_texts: int, seed: int) -> list[str]:
    """Texts of 0 to 60 words, some of them more than once."""
    chance = random.Random(seed)
    words = ["the", "reader", "café", "日本語", "learns", "🙂", "sample", "of", "tokens", "  ", "A"]
    return [
        " ".join(chance.choices(words, k=chance.randrange(60))) + f" {number % 97 or ''}"
        for number in range(num_texts)
    ]


def _write_inputs(folder: Path, num_texts: int, num_giant: int) -> Path:
    """A directory of all formats: large and small, compressed, empty, with and without line feeds."""
    folder.mkdir()
    giant = "word by word " * num_giant
    texts = _texts(num_texts, 1)
    content = f"\n{_END}\n".join([*texts, giant, *texts[:5], f"a{giant}"]) + f"\n{_END}\nno end"
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf" + content.encode())
    (folder / "b.txt").write_bytes(content.replace("\n", "\r\n").encode().replace(b"caf", b"\xff"))
    rows = "".join(json.dumps({"text": text}) + "\n" for text in _texts(num_texts, 2))
    (folder / "c.jsonl").write_text(rows + json.dumps({"text": giant}), encoding="utf-8")
    (folder / "d.txt.gz").write_bytes(gzip.compress(content.encode()))
    (folder / "e.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(rows.encode()))
    table = pa.table({"text": _texts(num_texts, 3)})
    parquet.write_table(table, folder / "f.parquet", row_group_size=max(1, num_texts // 7))
    (folder / "g.txt").write_bytes(b"")
    for number, text in enumerate(_texts(30, 4)):
        (folder / f"h{number:02}.txt").write_text(f"{text}\n{_END}\n", encoding="utf-8")
    return folder


def _options(inputs: Path, root: Path, dataset: DatasetDirectory, **more: Any) -> dict[str, Any]:
    return {
        "documents_train_file": (inputs,),
        "validation_fraction": 0.1,
        "deduplicate": "exact",
        "encoding_errors": "replace",
        "datasets_root": root,
        "dataset_name": "x",
        "tokenizer_path": str(dataset.tokenizer_directory),
        "max_sample_length": 64,
        **more,
    }


def _digest(directory: Path) -> str:
    """SHA-256 of all files; of the description without the time that it took."""
    digest = hashlib.sha256()
    for path in files_below(directory):
        content = path.read_bytes()
        if path.name == "description.json":
            description = json.loads(content)
            del description["seconds_taken"]
            content = json.dumps(description).encode()
        digest.update(f"{path.relative_to(directory)}:{len(content)}:".encode() + content)
    return digest.hexdigest()


def _run(nodes: RayNodes, options: dict[str, Any], *more: str) -> "subprocess.Popen[str]":
    words = ["prepare_dataset", "--ray_address", nodes.address, *more]
    for name, value in options.items():
        for one in value if isinstance(value, tuple) else (value,):
            words += [f"--{name}", str(one)]
    command = [sys.executable, "-c", _COMMAND, str(200_000), *words]
    return subprocess.Popen(
        command, env=nodes.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _finished(process: "subprocess.Popen[str]") -> Path:
    output, log = process.communicate(timeout=240)
    assert process.returncode == 0, log
    return Path(output.removesuffix("\n"))


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    """Two nodes of one CPU each."""
    with ray_nodes() as started:
        yield started


def test_two_nodes_give_the_bytes_of_one_machine(
    nodes: RayNodes, dataset: DatasetDirectory, tmp_path: Path
) -> None:
    inputs = _write_inputs(tmp_path / "inputs", 2_000, 100_000)
    process = _run(nodes, _options(inputs, tmp_path / "cluster", dataset))
    alone = prepare_dataset(
        PrepareDatasetArguments(**_options(inputs, tmp_path / "alone", dataset))
    )
    output, log = process.communicate(timeout=240)
    assert process.returncode == 0, log
    assert "parts on 2 nodes, 2 CPUs at" in log
    assert _digest(Path(output.strip())) == _digest(alone)


def test_a_bad_file_is_the_sentence_of_one_machine(
    nodes: RayNodes, dataset: DatasetDirectory, tmp_path: Path
) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(f"good\n{_END}\n".encode() * 60_000 + b"caf\xe9\n" + f"{_END}\n".encode() * 9)
    options = _options(path, tmp_path, dataset, encoding_errors="error")
    process = _run(nodes, options)
    with pytest.raises(DocumentsError, match="byte 0xe9 at offset") as alone:
        prepare_dataset(PrepareDatasetArguments(**options))
    output, log = process.communicate(timeout=240)
    assert process.returncode == 1
    assert log.splitlines()[-1] == f"fst: {alone.value}"
    assert "Traceback" not in log
    assert not output
    assert not versions(tmp_path, "x")


@contextlib.contextmanager
def _begun(nodes: RayNodes, options: dict[str, Any]) -> Iterator["subprocess.Popen[str]"]:
    """The command, with some of the work in its journal."""
    process = _run(nodes, options)
    end = time.monotonic() + _SECONDS_TO_START
    try:
        while True:
            journals = list(Path(options["datasets_root"]).glob("x/.partial-*/journal.jsonl"))
            if journals and len(journals[0].read_bytes().splitlines()) > 3:
                break
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.05)
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture
def long_work(dataset: DatasetDirectory, tmp_path: Path) -> tuple[dict[str, Any], str]:
    """Options of some 20 seconds of work for one CPU, and the digest of what becomes of it on one machine."""
    inputs = _write_inputs(tmp_path / "inputs", 30_000, 100_000)
    more = {"tokenizer_backend": "tokenizers"}
    alone = _options(inputs, tmp_path / "alone", dataset, **more)
    digest = _digest(prepare_dataset(PrepareDatasetArguments(**alone)))
    return _options(inputs, tmp_path / "cluster", dataset, **more), digest


@pytest.mark.slow
def test_a_killed_node_costs_nothing_but_time(
    nodes: RayNodes, long_work: tuple[dict[str, Any], str]
) -> None:
    options, expected = long_work
    with _begun(nodes, options) as process:
        while not any("_encode" in worker.name() for worker in nodes.nodes[1].workers):
            assert process.poll() is None
            time.sleep(0.05)
        nodes.nodes[1].kill()
        assert process.poll() is None
        assert _digest(_finished(process)) == expected
    nodes.add()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_command_is_resumed_there_or_here(
    number: signal.Signals, nodes: RayNodes, long_work: tuple[dict[str, Any], str]
) -> None:
    options, expected = long_work
    with _begun(nodes, options) as process:
        process.send_signal(number)
        began = time.monotonic()
        _, log = process.communicate()
        if number is signal.SIGINT:
            assert process.returncode == 130
            assert time.monotonic() - began < 10
            assert log.splitlines()[-1] == "fst: interrupted"
    if number is signal.SIGKILL:
        resumed = _finished(_run(nodes, options, "--resume"))
    else:
        resumed = prepare_dataset(PrepareDatasetArguments(**options, resume=True))
    assert _digest(resumed) == expected
    assert [path.name for path in resumed.parent.iterdir()] == ["0"]


def _encoded_here(
    tasks: list[ray_workers._Task], setup: bytes
) -> Iterator[tuple[int, encoding.EncodedBlock]]:
    """What a cluster does, in this process."""
    for number, task in enumerate(tasks):
        for [found], [result] in _batches(task, setup, number):
            assert found == number
            yield number, result


def _batches(task: ray_workers._Task, setup: bytes, number: int = 0) -> Iterator[Any]:
    batch = pa.table({"number": [number], "task": [pickle.dumps(task)]})
    for row in ray_workers._encode(batch, setup):
        yield row["number"], [pickle.loads(one) for one in row["result"]]


@pytest.mark.parametrize("part_bytes", [300, 5_000, 1 << 20])
def test_parts_of_any_size_give_the_same_bytes(
    part_bytes: int, dataset: DatasetDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = _write_inputs(tmp_path / "inputs", 60, 400)
    for module in (delimited, json_lines, encoding):
        monkeypatch.setattr(module, "BLOCK_BYTES", 1_000)
    monkeypatch.setattr(delimited, "_MAX_DELIMITER_LINE_BYTES", 100)
    monkeypatch.setattr(ray_workers, "_PART_BYTES", part_bytes)
    monkeypatch.setattr(ray_workers, "_results", _encoded_here)
    monkeypatch.setattr(
        prepare, "connected", lambda _: contextlib.nullcontext(Cluster("h:1", 1, 1, 0))
    )
    alone = prepare_dataset(
        PrepareDatasetArguments(**_options(inputs, tmp_path / "alone", dataset))
    )
    options = _options(inputs, tmp_path / "cluster", dataset, ray_address="auto")
    assert _digest(prepare_dataset(PrepareDatasetArguments(**options))) == _digest(alone)

    # Interrupted after each of the first blocks, and continued with other workers.
    monkeypatch.setattr(journal, "_SECONDS_BETWEEN_LINES", 0.0)
    options = _options(inputs, tmp_path / "resumed", dataset, resume=True)
    for number in range(3, 8):
        monkeypatch.setattr(ray_workers, "_results", _ending_after(number))
        with pytest.raises(KeyboardInterrupt):
            prepare_dataset(PrepareDatasetArguments(**options, ray_address="local"))
    assert _digest(prepare_dataset(PrepareDatasetArguments(**options))) == _digest(alone)


def _ending_after(num_results: int) -> Any:
    def results(tasks: list[ray_workers._Task], setup: bytes) -> Iterator[Any]:
        for number, result in enumerate(_encoded_here(tasks, setup)):
            if number == num_results:
                raise KeyboardInterrupt
            yield result

    return results


def _setup(dataset: DatasetDirectory, **versions_of: str) -> bytes:
    options = encoding.BlockEncoderOptions(
        dataset.tokenizer_directory,
        "tokenizers",
        ReadingOptions(end_of_document=_END),
        with_digests=False,
    )
    workers = ray_workers.RayWorkers(options, Cluster("h:1", 1, 1, 0), total_bytes=0)
    setup = pickle.loads(workers._setup)
    return pickle.dumps(replace(setup, versions={**setup.versions, **versions_of}))


@pytest.mark.parametrize(
    ("size", "versions_of", "expected"),
    [
        (None, {}, "x.txt cannot be read on the node .*: No such file or directory; put the"),
        (7, {}, "x.txt has 3 bytes on the node .* and 7 where the command runs; put the"),
        (3, {"tokenizers": "0.1"}, "the node .* has tokenizers .*, and the command runs with 0.1"),
    ],
)
def test_a_node_that_differs_is_named(
    size: int | None,
    versions_of: dict[str, str],
    expected: str,
    dataset: DatasetDirectory,
    tmp_path: Path,
) -> None:
    path = tmp_path / "x.txt"
    if size is not None:
        path.write_text("abc")
    task = ray_workers._Task((FilePart(path),), (size or 0,))
    [[_, [error]]] = _batches(task, _setup(dataset, **versions_of))
    with pytest.raises(Exception, match=expected):
        raise error


def test_small_files_share_a_task_and_large_ones_have_several(tmp_path: Path) -> None:
    parts = []
    for number, size in enumerate((10, 10, 0, 100, 250, 10)):
        path = tmp_path / str(number)
        path.write_bytes(b"x" * size)
        cuts = range(0, max(size, 1), 100)
        parts += [FilePart(path, start) for start in cuts]
    tasks = list(ray_workers._tasks(parts, 100))
    found = [[(part.path.name, part.start) for part in task.parts] for task in tasks]
    assert found == [
        [("0", 0), ("1", 0), ("2", 0)],
        *([("3", 0)], [("4", 0)], [("4", 100)], [("4", 200)]),
        [("5", 0)],
    ]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "a\n  ModuleNotFoundError: No module named 'full_stack_transformer'\n",
            "install the same",
        ),
        ("The cluster\nis gone", "the cluster of Ray failed: is gone; --resume continues"),
    ],
)
def test_a_broken_cluster_is_one_sentence(message: str, expected: str) -> None:
    assert expected in ray_workers._what_broke(RuntimeError(message))


def test_conversations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--ray_address is for documents; .* leave it out"):
        PrepareDatasetArguments(conversations=(tmp_path,), dataset_name="x", ray_address="auto")
