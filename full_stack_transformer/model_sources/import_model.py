"""`fst import_model`: a pretrained model from anywhere -> a checked model directory.

    hub name ──hub──> directory
    directory ── safetensors: copied; pytorch_model.bin: read as tensors ──┐
    GGUF file ── rounded weights: computed again ──────────────────────────┼──check──> MODELS_ROOT/NAME
    PEFT adapter + base ── merged ─────────────────────────────────────────┘

Nothing that a model brings is run: no code of its own (auto_map), no pickle beyond tensors; other files stay
behind.
"""

import dataclasses
import logging
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer

from full_stack_transformer.arguments.models import ImportModelArguments
from full_stack_transformer.errors import MachineError, ModelError, UsageError
from full_stack_transformer.model_sources.gguf import convert_gguf
from full_stack_transformer.model_sources.hub import download
from full_stack_transformer.modelling.adapters import merge_adapter
from full_stack_transformer.modelling.backbones import num_parameters
from full_stack_transformer.modelling.model_files import (
    check_model_files,
    check_tokenizer_files,
    find_model_directory,
    read_config,
    weight_files,
)
from full_stack_transformer.modelling.other_files import (
    ADAPTER_FILE_NAME,
    CONFIG_FILE_NAME,
    HUB_NAME,
    found_at,
    is_gguf,
    json_of,
)
from full_stack_transformer.modelling.places import IMPORTED_KEY, adapter_at, base_of
from full_stack_transformer.modelling.pretrained import (
    GENERATION_CONFIG_FILE_NAME,
    load_backbone,
    open_config,
    read_start,
)
from full_stack_transformer.storage import (
    DESCRIPTION_FILE_NAME,
    check_name,
    make_directories,
    replace_directory,
    why_not_written,
    write_json,
)
from full_stack_transformer.tasks.opening import OpenedTask, open_task, task_class_of
from full_stack_transformer.tokenization.document_tokenizer import copy_tokenizer_files

logger = logging.getLogger(__name__)

# What is copied beside config, weights and tokenizer: licences, and the parts of sentence-transformers.
_MORE_FILES = (
    *("LICENSE*", "NOTICE*", "USE_POLICY*", "README.md", GENERATION_CONFIG_FILE_NAME),
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
    *("[0-9]_*/config.json", "[0-9]_*/*.safetensors", DESCRIPTION_FILE_NAME),
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: ImportModelArguments) -> Path:
    """Write the model directory, and return it; see `import_model`."""
    return import_model(arguments)


def import_model(
    arguments: ImportModelArguments,
    *,
    facts: Mapping[str, Any] | None = None,
    finish: Callable[[Path], None] = lambda _: None,
) -> Path:
    """Write the model directory, and return it.

    Args:
        arguments: the options of the command.
        facts: more fields of description.json.
        finish: writes more files into the directory.

    Raises:
        UsageError: it exists already, or a file has to be chosen.
        ModelError: there is no model at the source, or it cannot be opened.
        MachineError: the hub cannot be reached, the disk is full or cannot be written.
        MissingExtraError: a package is not installed that reads such a source.
    """
    target = target_of(arguments)
    if target.exists():
        raise UsageError(f"{target} exists; remove it, or choose another name with --model_name")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        make_directories(target.parent.absolute())
        found = _bring(arguments.source, partial, arguments)
        finish(partial)
        opened = check(partial)
        description = {
            **json_of(partial / DESCRIPTION_FILE_NAME),
            IMPORTED_KEY: arguments.source,
            **found,
            **(facts or {}),
            "num_parameters": num_parameters(opened.backbone),
        }
        write_json(partial / DESCRIPTION_FILE_NAME, description)
        replace_directory(partial, target)
    except (OSError, SafetensorError) as error:
        raise MachineError(f"writing {target} failed: {why_not_written(error)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    verb = "generate" if opened.task.generates else "serve"
    logger.info(
        "%s: %s parameters for %s; try it: fst %s %s",
        target,
        f"{description['num_parameters']:,}",
        opened.name,
        verb,
        shlex.quote(str(target)),
    )
    return target


def target_of(arguments: ImportModelArguments) -> Path:
    """The directory that is written."""
    name = arguments.model_name
    if name is None:
        path = Path(arguments.source)
        last = path.resolve().name if path.exists() else arguments.source.rpartition("/")[2]
        if (
            path.exists()
            and last in ("model", "adapter")
            and path.resolve().parent.name.isdecimal()
        ):
            last = path.resolve().parents[1].name
        name = re.sub(r"[^\w.-]", "_", last.removesuffix(".gguf")).lstrip(".-") or "model"
    return arguments.models_root / check_name(name, "--model_name")


def _bring(source: str, target: Path, arguments: ImportModelArguments) -> dict[str, Any]:
    """Write an unchecked model directory; what there is to know of where it comes from.

    Raises:
        ModelError: there is no model at the source.
    """
    path = Path(source)
    if not path.exists() and HUB_NAME.fullmatch(source) and not is_gguf(path):
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as place:
            revision = download(
                source, Path(place), revision=arguments.revision, gguf_file=arguments.file
            )
            return {"revision": revision, **_bring(place, target, arguments)}
    if path.is_file() and is_gguf(path):
        return convert_gguf(path, target, dtype=arguments.dtype)
    if path.is_file() and (path.parent / CONFIG_FILE_NAME).is_file():
        path = path.parent
    if (path / ADAPTER_FILE_NAME).is_file() or (path / "adapter" / ADAPTER_FILE_NAME).is_file():
        return _merge(path, target, arguments)
    ggufs = sorted(file for file in path.glob("*") if file.is_file() and is_gguf(file))
    if ggufs and not weight_files(path):
        return convert_gguf(_chosen(ggufs, arguments), target, dtype=arguments.dtype)
    if not path.exists():
        raise ModelError(
            f"{source} should be a name on the hub (OWNER/NAME), a model directory, a GGUF file, or a PEFT "
            f"adapter; found {found_at(path)}"
        )
    _copy(find_model_directory(path), target, arguments)
    return {}


def _chosen(files: list[Path], arguments: ImportModelArguments) -> Path:
    if arguments.file is not None:
        files = [file for file in files if file.name == arguments.file]
    if len(files) == 1:
        return files[0]
    names = ", ".join(sorted(file.name for file in files)) or f"no {arguments.file}"
    raise UsageError(f"{arguments.source} holds {names}; choose one with --file")


# ---------------------------------------------------------------------- a model directory


def _copy(source: Path, target: Path, arguments: ImportModelArguments) -> None:
    """The files of a model directory that are read here; weights that are no safetensors become such."""
    check_model_files(source)
    files = weight_files(source)
    if not files:
        raise ModelError(
            f"{source} holds rounded weights only; import the model that they were made from"
        )
    target.mkdir(parents=True)
    _copy_tokenizer(source, target)
    for pattern in _MORE_FILES:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                copy = target / file.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
    is_copied = arguments.dtype == "auto" and all(file.suffix == ".safetensors" for file in files)
    if is_copied:
        shutil.copyfile(source / CONFIG_FILE_NAME, target / CONFIG_FILE_NAME)
        index = source / "model.safetensors.index.json"
        for file in (*files, *([index] if index.is_file() and len(files) > 1 else [])):
            shutil.copyfile(file, target / file.name)
    else:
        _save(source, target, arguments)
    for name in (CONFIG_FILE_NAME, "tokenizer_config.json"):
        _forget_code(target / name)


def _save(source: Path, target: Path, arguments: ImportModelArguments) -> None:
    """Open the weights, which are read as tensors alone, and save them as safetensors."""
    start = read_start(str(source))
    dtype = arguments.dtype if arguments.dtype != "auto" else start.dtype or "float32"
    config = open_config(source)
    model_class = task_class_of(source).backbone_class(config)
    backbone = load_backbone(str(source), dtype=_DTYPES[dtype], model_class=model_class)
    backbone.save_pretrained(target)
    if start.generation_config is not None:
        write_json(target / GENERATION_CONFIG_FILE_NAME, start.generation_config)


def _copy_tokenizer(source: Path, target: Path) -> None:
    check_tokenizer_files(source)
    copy_tokenizer_files(source, target)
    names = {file.name for file in target.iterdir()}
    if "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names:
        return
    try:
        AutoTokenizer.from_pretrained(str(source), trust_remote_code=False).save_pretrained(target)
    except ImportError as error:
        raise MachineError(
            f"the tokenizer of {source} is in the form of SentencePiece, which needs two packages: pip "
            "install sentencepiece protobuf"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the tokenizer of {source} cannot be read: {error}") from error


def _forget_code(file: Path) -> None:
    """Without the names of code that stays behind."""
    content = json_of(file)
    if "auto_map" in content:
        logger.warning("%s names code of its own (auto_map), which is left out", file.name)
        del content["auto_map"]
        write_json(file, content)


# ---------------------------------------------------------------------- an adapter


def _merge(path: Path, target: Path, arguments: ImportModelArguments) -> dict[str, Any]:
    """The adapter added to its base."""
    adapter = adapter_at(path) or path
    base = arguments.base or base_of(adapter)
    with _base(base, target.parent, arguments) as model:
        start = read_start(str(model))
        if arguments.dtype != "auto":
            start = dataclasses.replace(start, dtype=arguments.dtype)
        start.save(merge_adapter(adapter, base=str(model)), target)
        has_tokenizer = (adapter / "tokenizer_config.json").is_file()
        _copy_tokenizer(adapter if has_tokenizer else model, target)
    return {"base": base}


@contextmanager
def _base(base: str, root: Path, arguments: ImportModelArguments) -> Iterator[Path]:
    """The base as a model directory: where it is, or imported for the moment."""
    path = Path(base)
    if (path / CONFIG_FILE_NAME).is_file() and not (path / ADAPTER_FILE_NAME).is_file():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix=".base.", dir=root) as place:
        try:
            plain = dataclasses.replace(arguments, dtype="auto", file=None, revision=None)
            _bring(base, Path(place, "base"), plain)
        except (ModelError, MachineError) as error:
            raise ModelError(
                f"the base of the adapter {arguments.source} cannot be opened: {error}; name it with --base"
            ) from error
        yield Path(place, "base")


# ---------------------------------------------------------------------- the check


def check(directory: Path) -> OpenedTask:
    """Open a model directory as the other commands do, and let a causal model read a text.

    Raises:
        ModelError: config, weights and tokenizer do not belong together, or what it computes is no number.
    """
    read_config(directory)
    opened = open_task(directory, device="cpu", dtype=torch.bfloat16)
    if opened.task.generates:
        ids = opened.task.tokenizer.encode_after_begin("The quick brown fox")
        with torch.inference_mode():
            logits = opened.backbone(torch.tensor([ids])).logits
        if not torch.isfinite(logits).all():
            raise ModelError(
                f"{directory} computes scores that are not finite; its weights are damaged"
            )
    return opened
