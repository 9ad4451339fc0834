"""Docstrings of the modules that are written in C: built into the interpreter, or compiled beside it.

Imports those modules, so it knows which of them do nothing when imported.
"""

import importlib
import inspect
import re
import sys
import sysconfig
import types
import warnings
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from full_stack_transformer.document_sources.documents import tidy
from full_stack_transformer.document_sources.pages import Kind, Section
from full_stack_transformer.document_sources.prose import SeenLines, is_readable

# Left out: what exists for tests, and what touches the terminal, the sound card or a display library.
_SKIPPED_MODULE = re.compile(r"_?xx.*|_test.*|.*_test|readline|_?curses.*|_tkinter|ossaudiodev|nis")
_RECEIVER = re.compile(r"^\(\$\w+(, )?(/(, )?)?")
_MAX_SIGNATURE_LENGTH = 120


def builtin_module_names() -> list[str]:
    """Names of the modules in C that may be imported without side effect, sorted."""
    names = set(sys.builtin_module_names)
    folder = sysconfig.get_config_var("DESTSHARED")
    if folder and Path(folder).is_dir():
        names.update(
            path.name.split(".")[0]
            for path in Path(folder).iterdir()
            if path.name.endswith(tuple(EXTENSION_SUFFIXES))
        )
    return sorted(name for name in names if not _SKIPPED_MODULE.fullmatch(name))


def builtin_sections(name: str, seen: SeenLines) -> list[Section]:
    """The texts of one module in C; empty when it cannot be imported here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # modules that a later Python will not have
        try:
            module = importlib.import_module(name)
        except ImportError:
            return []
    return list(_sections(module, seen))


def _sections(module: types.ModuleType, seen: SeenLines) -> Iterator[Section]:
    if text := _text(module, seen):
        yield Section("module", "", (text,))
    for name, member in sorted(vars(module).items()):
        if not _is_in_c(member):
            continue
        kind: Kind = "class" if isinstance(member, type) else "function"
        blocks = tuple(_blocks(name, member, seen))
        if blocks:
            yield Section(kind, name, blocks)


def _is_in_c(member: object) -> bool:
    """Whether `member` is a class or function in C, and no value, nor what `site` adds to builtins."""
    if isinstance(member, type):
        return not any(isinstance(method, types.FunctionType) for method in vars(member).values())
    return inspect.isbuiltin(member)


def _blocks(name: str, member: object, seen: SeenLines) -> Iterator[str]:
    if text := _text(member, seen):
        yield _block(f"class {name}" if isinstance(member, type) else name, member, text)
    if isinstance(member, type):
        for method_name, method in sorted(vars(member).items()):
            if isinstance(method, staticmethod):
                method = method.__func__
            # Wrappers such as __add__ all say the same.
            is_wrapper = isinstance(method, types.WrapperDescriptorType)
            if inspect.isroutine(method) and not is_wrapper and (text := _text(method, seen)):
                yield _block(f"{name}.{method_name}", method, text)


def _block(name: str, member: object, text: str) -> str:
    signature = getattr(member, "__text_signature__", None)
    if text.startswith(f"{name.rpartition('.')[2]}("):
        return text
    if not signature:
        return text if "(" in text.partition("\n")[0] else f"{name}\n{text}"
    signature = _RECEIVER.sub("(", signature)
    if len(signature) > _MAX_SIGNATURE_LENGTH:
        signature = "(...)"
    return f"{name}{signature}\n{text}"


def _text(member: object, seen: SeenLines) -> str:
    documentation = getattr(member, "__doc__", None)
    text = tidy(inspect.cleandoc(documentation)) if isinstance(documentation, str) else ""
    return text if is_readable(text) and seen.is_new(text) else ""
