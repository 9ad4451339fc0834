"""Checkpoints that are directories: each process has written its part of the tensors.

    last.ckpt/
        values.pt        all else: numbers, options, what callbacks remember
        .metadata        which part of which tensor is in which file
        __0_0.distcp …   the parts, a file of each process (torch.distributed.checkpoint)

    content ──split──> values, tensors by path ──write_parts──> directory ──read_parts──> content

Any number of processes reads what another number has written: each what it needs. Knows nothing of what the
content means. No file makes code run: torch reads its own index with pickle, here only its plain classes.
"""

import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

VALUES_FILE_NAME = "values.pt"
_INDEX_FILE_NAME = ".metadata"
_PathOf = list[str | int]
# What may be in torch's index beside types of numbers.
_CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata"),
        *("TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    },
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}
_NOT_SHARED = ".*torch.distributed is disabled, unavailable or uninitialized.*"


@dataclass(frozen=True)
class Parts:
    """The content of a checkpoint, taken apart."""

    values: bytes
    """Of `values.pt`: the content with gaps, and which tensors have two names."""
    tensors: dict[str, Tensor]
    """By their path in the content, as JSON; a `DTensor` is this process's part of one."""


def split(content: dict[str, Any]) -> Parts:
    """Take a checkpoint apart; tensors are copied, so that a training may change its own.

    Numbers in tensors without dimensions stay with the values.
    """
    tensors: dict[str, Tensor] = {}
    keys: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}

    def without_tensors(value: Any, path: _PathOf) -> Any:
        if isinstance(value, Tensor) and value.ndim:
            key = json.dumps(path)
            first = keys.setdefault(_identity(value), key)
            if first == key:
                tensors[key] = value.detach().to("cpu", copy=True)
            else:
                aliases[key] = first
            return None
        if isinstance(value, dict) and all(isinstance(name, str | int) for name in value):
            return {name: without_tensors(one, [*path, name]) for name, one in value.items()}
        if isinstance(value, list):
            return [without_tensors(one, [*path, index]) for index, one in enumerate(value)]
        return value

    values = without_tensors(content, [])
    buffer = io.BytesIO()
    torch.save({"values": values, "aliases": aliases}, buffer)
    return Parts(buffer.getvalue(), tensors)


def _identity(value: Tensor) -> tuple[Any, ...]:
    """Equal for two names of one tensor."""
    local = value.to_local() if isinstance(value, DTensor) else value
    place = local.untyped_storage()._cdata
    return place, local.storage_offset(), local.shape, local.stride(), local.dtype


def write_parts(parts: Parts, directory: Path, group: ProcessGroup | None) -> None:
    """Write this process's part durably into a directory; all of the group do so at once.

    What several processes have whole is written by one of them.

    Args:
        parts: of this process.
        directory: new, on a disk that all processes share.
        group: of processes, used by nothing else meanwhile; None for one that is alone.

    Raises:
        OSError, RuntimeError: it failed in one of the processes, and so in all of them.
    """
    warnings.filterwarnings("ignore", _NOT_SHARED)
    try:
        save(
            parts.tensors,
            storage_writer=FileSystemWriter(directory),
            planner=DefaultSavePlanner(flatten_state_dict=False),
            process_group=group,
            no_dist=group is None,
        )
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error
    if group is None or group.rank() == 0:
        # After what all do together: an error here must not leave the others waiting.
        with (directory / VALUES_FILE_NAME).open("wb") as file:
            file.write(parts.values)
            file.flush()
            os.fsync(file.fileno())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint of either form, but for the optimizer's state where it can be left out."""
    if path.is_dir():
        return read_parts(path, only="state_dict")
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return content


def read_values(directory: Path) -> dict[str, Any]:
    """The content of a checkpoint without its tensors."""
    values: dict[str, Any] = _read_values(directory)["values"]
    return values


def _read_values(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(
        directory / VALUES_FILE_NAME, map_location="cpu", weights_only=True
    )
    return found


def read_parts(
    directory: Path,
    *,
    only: str | None = None,
    like: Callable[[list[str | int]], Tensor | None] = lambda path: None,
) -> dict[str, Any]:
    """The content of a checkpoint.

    Args:
        directory: of the checkpoint.
        only: read the tensors below this name alone; the others are None.
        like: for the path of a tensor one that is sharded in the same way; of such a one only this process's
            part is read. The others are read whole.

    Raises:
        ValueError: the index is damaged, or holds what is no index.
    """
    found = _read_values(directory)
    reader = _Reader(directory)
    tensors: dict[str, Tensor] = {}
    for key, facts in reader.read_metadata().state_dict_metadata.items():
        path = json.loads(key)
        if only is None or path[0] == only:
            assert isinstance(facts, TensorStorageMetadata)
            tensors[key] = _empty(facts, like(path))
    warnings.filterwarnings("ignore", _NOT_SHARED)
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    load(tensors, storage_reader=reader, planner=planner, no_dist=True)
    content: dict[str, Any] = found["values"]
    for key, first in found["aliases"].items():
        if first in tensors:
            tensors[key] = tensors[first]
    for key, tensor in tensors.items():
        *parents, last = json.loads(key)
        place: Any = content
        for name in parents:
            place = place[name]
        place[last] = tensor
    return content


def _empty(facts: TensorStorageMetadata, like: Tensor | None) -> Tensor:
    dtype = facts.properties.dtype
    if isinstance(like, DTensor) and like.shape == facts.size:
        return torch.empty_like(like, dtype=dtype, requires_grad=False)
    return torch.empty(facts.size, dtype=dtype)


def missing_parts(directory: Path) -> list[str]:
    """The files that the index names and that are not there: other processes wrote to other disks."""
    storage = _Reader(directory).read_metadata().storage_data
    names = {place.relative_path for place in storage.values()}
    return sorted(name for name in names if not (directory / name).is_file())


def check_parts(directory: Path) -> None:
    """Read every byte, and compare it with its checksum.

    Raises:
        ValueError, OSError: something is damaged or missing.
    """
    _check_archive(directory / VALUES_FILE_NAME, VALUES_FILE_NAME)
    storage = _Reader(directory).read_metadata().storage_data
    for place in storage.values():
        with (directory / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            content = file.read(place.length)
        _check_archive(io.BytesIO(content), place.relative_path)


def _check_archive(file: Path | io.BytesIO, name: str) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        raise ValueError(f"its part {name} is damaged: {error}") from error
    if damaged is not None:
        raise ValueError(f"the checksum of its part {name} is wrong")


class _Reader(FileSystemReader):
    """Reads the index without running what it names."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / _INDEX_FILE_NAME).open("rb") as file:
            try:
                found = _PlainUnpickler(file).load()
            except (pickle.UnpicklingError, EOFError, AttributeError, IndexError) as error:
                raise ValueError(f"its part {_INDEX_FILE_NAME} is damaged: {error}") from error
        if not isinstance(found, Metadata) or found.storage_meta is None:
            raise ValueError(f"its part {_INDEX_FILE_NAME} is no index")
        found.storage_meta.load_id = self.load_id
        return found


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong there")
