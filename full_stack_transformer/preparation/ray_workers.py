"""Workers on the nodes of a cluster, by Ray Data: they read parts of files and encode them.

    parts of files --Ray Data--> nodes: documents, ids, frames --EncodedBlock, in order--> this process

The same functions run as on one machine, and what depends on the order of the documents happens in this
process alone, so a dataset has the same bytes. Ray Data keeps the order, holds back work while its results
wait for their turn, and repeats the parts of a node that died. A part is a task rather than a call of an
actor: the next free CPU takes it, also of a node that joined meanwhile, and each process of Ray opens the
tokenizer once.
"""

import contextlib
import logging
import os
import pickle
import socket
import tempfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from full_stack_transformer.documents.blocks import Block, ReadingOptions
from full_stack_transformer.documents.parts import FilePart, blocks_of
from full_stack_transformer.errors import DocumentsError, FullStackTransformerError, MachineError
from full_stack_transformer.own_classes import trust, trusted_modules
from full_stack_transformer.preparation.encoding import (
    BlockEncoder,
    BlockEncoderOptions,
    Display,
    EncodedBlock,
    groups,
)
from full_stack_transformer.ray_cluster import Cluster, imported_ray
from full_stack_transformer.tokenization.document_tokenizer import open_saved_tokenizer
from full_stack_transformer.tokenization.encoders import make_encoder

logger = logging.getLogger(__name__)

# A part takes tenths of a second to seconds; starting its task takes some milliseconds.
_PART_BYTES = 4 << 20
# Ray Data holds a note of each part: from here on parts are larger.
_MAX_PARTS = 20_000
# What a task hands over at once, so that results travel while it reads on.
_RESULT_BYTES = 2 << 20
_RESULT = "result"
_NUMBER = "number"


@dataclass(frozen=True)
class _Setup:
    """What a worker needs before its first part."""

    options: BlockEncoderOptions
    tokenizer_files: dict[str, bytes]
    """By name; the directory is on the disk of the driver alone."""
    trusted: tuple[str, ...]
    versions: dict[str, str]


@dataclass(frozen=True)
class _Task:
    """Parts that one task encodes, with the sizes that their files should have."""

    parts: tuple[FilePart, ...]
    file_sizes: tuple[int, ...]


class RayWorkers:
    """Encode files on a cluster.

    Args:
        options: of the encoder; its tokenizer directory is sent along.
        cluster: that this process is connected to.
        total_bytes: of all files.
    """

    def __init__(self, options: BlockEncoderOptions, cluster: Cluster, *, total_bytes: int) -> None:
        self.part_bytes: int | None = max(_PART_BYTES, total_bytes // _MAX_PARTS)
        self._cluster = cluster
        directory = options.tokenizer_directory
        files = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
        versions = {name: version(name) for name in ("full_stack_transformer", options.backend)}
        self._setup = pickle.dumps(_Setup(options, files, trusted_modules(), versions))

    def encode(
        self, parts: Iterable[FilePart], display: Display
    ) -> Generator[EncodedBlock, None, None]:
        """The documents of the parts, encoded, in their order.

        Raises:
            DocumentsError: as on one machine, or a node does not see a file.
            MachineError: a node lacks this package, or the cluster broke down.
        """
        ray = imported_ray()
        assert self.part_bytes is not None
        tasks = list(_tasks(parts, self.part_bytes))
        if not tasks:
            return
        logger.info("encoding %s parts on %s", f"{len(tasks):,}", self._cluster)
        shown = -1
        try:
            for number, result in _results(tasks, self._setup):
                for task in tasks[shown + 1 : number + 1]:
                    _show(task, display)
                shown = number
                if isinstance(result, BaseException):
                    raise result
                if result.block_end:
                    display.advance_to(result.block_end)
                yield result
        except ray.exceptions.RayError as error:
            raise MachineError(_what_broke(error)) from error


def _show(task: _Task, display: Display) -> None:
    """Show the files that begin with this task."""
    for part in task.parts:
        if not part.is_proposed:
            display.begin_file(part.path, part.start)


def _tasks(parts: Iterable[FilePart], num_bytes: int) -> Iterator[_Task]:
    """The parts, those of small files together up to `num_bytes`."""
    waiting: list[FilePart] = []
    sizes: list[int] = []
    num_waiting = 0
    for given in parts:
        part = replace(given, path=given.path.absolute())  # workers have another working directory
        file_size = part.path.stat().st_size
        size = min(num_bytes, file_size)
        if waiting and num_waiting + size > num_bytes:
            yield _Task(tuple(waiting), tuple(sizes))
            waiting, sizes, num_waiting = [], [], 0
        waiting.append(part)
        sizes.append(file_size)
        num_waiting += size
    if waiting:
        yield _Task(tuple(waiting), tuple(sizes))


def _results(tasks: Sequence[_Task], setup: bytes) -> Iterator[tuple[int, Any]]:
    """The results of each task with its number, in order: encoded blocks, or at last an exception."""
    import ray.data

    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.target_max_block_size = _RESULT_BYTES
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for handler in logging.getLogger("ray.data").handlers:
        handler.addFilter(_is_error)
    with ray.data.DataContext.current(context):
        items = [{_NUMBER: number, "task": pickle.dumps(task)} for number, task in enumerate(tasks)]
        dataset = ray.data.from_items(items, override_num_blocks=len(items))
        encoded = dataset.map_batches(
            _encode, fn_kwargs={"setup": setup}, batch_size=1, batch_format="pyarrow", num_cpus=1
        )
        tables = iter(
            encoded.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        )
        for table in tables:
            numbers, results = table.column(_NUMBER), table.column(_RESULT)
            for number, result in zip(numbers, results, strict=True):
                yield number.as_py(), pickle.loads(result.as_py())  # noqa: S301 - of our own workers


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _what_broke(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    if "No module named" in last:
        return (
            f"a node of the cluster cannot run this command: {last}; install the same version of "
            "full_stack_transformer, with the same extras, on all nodes"
        )
    return f"the cluster of Ray failed: {last}; --resume continues where the journal ends"


# What follows runs on the nodes.


def _encode(batch: Any, setup: bytes) -> Iterator[dict[str, list[Any]]]:
    """The results of one task; what a user can fix is a result too, so that it is raised in its turn."""
    number = batch.column(_NUMBER)[0].as_py()
    try:
        task = pickle.loads(batch.column("task")[0].as_py())  # noqa: S301 - of our own driver
        encoder = _encoder_of_process(setup)
        with contextlib.closing(_blocks(task, encoder.reading)) as blocks:
            for group in groups(blocks):
                encoded = encoder(group)
                group.clear()
                yield {_NUMBER: [number], _RESULT: [pickle.dumps(encoded)]}
    except (FullStackTransformerError, OSError, MemoryError) as error:
        yield {_NUMBER: [number], _RESULT: [pickle.dumps(_portable(error))]}


def _blocks(task: _Task, reading: ReadingOptions) -> Generator[Block, None, None]:
    for part, size in zip(task.parts, task.file_sizes, strict=True):
        _check_file(part.path, size)
        with contextlib.closing(blocks_of(part, reading)) as blocks:
            yield from blocks


def _check_file(path: Path, size: int) -> None:
    """Raise if this node has another file there, or none."""
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DocumentsError(
            f"{path} cannot be read on the node {socket.gethostname()}: {error.strerror}; put the documents "
            "on a file system that all nodes of the cluster share, at the same path"
        ) from error
    if found != size:
        raise DocumentsError(
            f"{path} has {found:,} bytes on the node {socket.gethostname()} and {size:,} where the command "
            "runs; put the documents on a file system that all nodes of the cluster share"
        )


def _portable(error: Exception) -> Exception:
    """The error itself if it can travel."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - what was written here
    except Exception:
        return MachineError(f"{type(error).__name__} on the node {socket.gethostname()}: {error}")
    return error


_opened: tuple[bytes, BlockEncoder] | None = None


def _encoder_of_process(setup: bytes) -> BlockEncoder:
    """The encoder of this process of Ray, which encodes many parts."""
    global _opened
    if _opened is None or _opened[0] != setup:
        _opened = (setup, _opened_encoder(pickle.loads(setup)))  # noqa: S301 - of our own driver
    return _opened[1]


def _opened_encoder(setup: _Setup) -> BlockEncoder:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a task has one CPU
    for name, expected in setup.versions.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "not installed"
        if found != expected:
            raise MachineError(
                f"the node {socket.gethostname()} has {name} {found}, and the command runs with {expected}; "
                "install the same versions on all nodes"
            )
    trust(setup.trusted)
    with tempfile.TemporaryDirectory(prefix="fst-tokenizer-") as directory:
        for name, content in setup.tokenizer_files.items():
            (Path(directory) / name).write_bytes(content)
        tokenizer = open_saved_tokenizer(Path(directory))
    return BlockEncoder(
        setup.options, tokenizer, make_encoder(tokenizer.backend, setup.options.backend)
    )
