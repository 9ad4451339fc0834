"""Own classes: which modules may run their code here, and their import from the working directory.

Models, datasets, checkpoints and JSON files are data: a class that one of them names is imported only if its
module is trusted. Trusted are modules that an option of this command line names (`--task my_module.MyTask`,
`--allow_code_from my_module`), or that a Python program passes. The working directory is not on `sys.path`:
only trusted modules are found there.
"""

import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from full_stack_transformer.arguments.typed import is_typed
from full_stack_transformer.errors import InputError, UsageError

# Options whose value names a class as my_module.MyClass.
_CLASS_OPTIONS = ("task", "tokenizer_cls_name", "data_class", "model_class")
_PACKAGE = __name__.split(".")[0]
_PACKAGE_PARENT = Path(__file__).resolve().parents[1]

_trusted: set[str] = set()


def trust(modules: Iterable[str]) -> None:
    """Let classes of these modules, and of modules below them, be imported; imports nothing.

    Raises:
        UsageError: one is not the name of a module.
    """
    for module in modules:
        if not all(part.isidentifier() for part in module.split(".")):
            raise UsageError(
                f"--allow_code_from must be the name of a module such as my_module, found {module!r}"
            )
        _trusted.add(module)
    if not any(isinstance(finder, _WorkingDirectoryFinder) for finder in sys.meta_path):
        sys.meta_path.append(_WorkingDirectoryFinder(Path.cwd()))


def trust_options(options: object) -> None:
    """Trust the modules that typed options name, or all options where Python code made them."""
    for name in _CLASS_OPTIONS:
        module = str(getattr(options, name, None) or "").rpartition(".")[0]
        if is_typed(name) and _is_module_name(module):
            trust([module])
    if is_typed("allow_code_from"):
        trust(getattr(options, "allow_code_from", ()))


def trusted_modules() -> tuple[str, ...]:
    """The modules that were trusted, for a process that is started."""
    return tuple(sorted(_trusted))


def class_of_option(path: str, option: str, what: str) -> Any:
    """What `--OPTION my_module.MyClass` names.

    Args:
        path: the value of the option.
        option: its name.
        what: the class should be, for the error.

    Raises:
        UsageError: it cannot be imported, or stands in a file of options.
    """
    module = path.rpartition(".")[0]
    if not _is_module_name(module):
        raise UsageError(f"--{option} should name {what} as my_module.MyClass, found {path!r}")
    if is_typed(option):
        trust([module])
    check_trusted(path, option, Path("the file of options"))
    return _imported(path, f"--{option}", what)


def check_trusted(path: str, option: str, place: Path) -> None:
    """Refuse the value of an option for a class that a file of options gave, unless it is trusted.

    Raises:
        UsageError: the module of the class is not trusted.
    """
    module = path.rpartition(".")[0]
    if module and not is_trusted(module):
        raise UsageError(
            f"{place} names {path}, and code that only a file names is not run; if you trust it, type "
            f"--{option} {path}"
        )


def class_of_file(path: object, place: Path, what: str) -> Any:
    """What a file, such as a downloaded one, names as my_module.MyClass.

    Raises:
        InputError: its module is not trusted.
        UsageError: it cannot be imported.
    """
    module = path.rpartition(".")[0] if isinstance(path, str) else ""
    if not isinstance(path, str) or not _is_module_name(module):
        raise InputError(f"{place} should name {what} as my_module.MyClass, found {path!r}")
    if not is_trusted(module):
        raise InputError(
            f"{place} names {what}, {path}, and code that only a file names is not run; if you trust it, "
            f"add --allow_code_from {module}"
        )
    return _imported(path, str(place), what)


def _imported(path: str, origin: str, what: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        advice = ""
        if isinstance(error, ModuleNotFoundError) and error.name and not is_trusted(error.name):
            missing = error.name.split(".")[0]
            advice = f"; if {missing} is in the working directory, add --allow_code_from {missing}"
        raise UsageError(
            f"{origin}: {path!r} should name {what}, my_module.MyClass: {error}{advice}"
        ) from error


def _is_module_name(module: str) -> bool:
    return all(part.isidentifier() for part in module.split("."))


def is_trusted(module: str) -> bool:
    """Whether classes of a module may be imported because a file names them."""
    parts = module.split(".")
    above = {".".join(parts[: length + 1]) for length in range(len(parts))}
    return parts[0] == _PACKAGE or not above.isdisjoint(_trusted)


class _WorkingDirectoryFinder(MetaPathFinder):
    """Finds trusted modules, and no others, in the working directory; asked after all other places."""

    def __init__(self, directory: Path) -> None:
        self._directory = str(directory)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module, if it is a trusted one or the package of one."""
        if path is not None or fullname not in {name.split(".")[0] for name in _trusted}:
            return None
        return PathFinder.find_spec(fullname, [self._directory])


def leave_working_directory() -> None:
    """Take the working directory off `sys.path`, for this process and those that it starts.

    `python -m`, `python -c` and an empty entry of PYTHONPATH put it before the installed packages: a torch.py
    beside a downloaded model would be imported. What PYTHONPATH spells out stays, and so does the directory
    of this package, such as a clone that is not installed.
    """
    spelled_out = [name for name in os.environ.get("PYTHONPATH", "").split(os.pathsep) if name]
    kept = {_PACKAGE_PARENT, *(Path(name).resolve() for name in spelled_out)}
    is_clone = Path(sys.path[0]).resolve() == _PACKAGE_PARENT
    # What `python` adds comes before the standard library.
    library = str(Path(os.__file__).parent)
    end = sys.path.index(library) if library in sys.path else 1
    here = Path.cwd()
    sys.path[:end] = [
        entry for entry in sys.path[:end] if Path(entry).resolve() != here or here in kept
    ]
    os.environ["PYTHONSAFEPATH"] = "1"
    if is_clone and str(_PACKAGE_PARENT) not in spelled_out:
        spelled_out.append(str(_PACKAGE_PARENT))
    if spelled_out or "PYTHONPATH" in os.environ:
        os.environ["PYTHONPATH"] = os.pathsep.join(spelled_out)
