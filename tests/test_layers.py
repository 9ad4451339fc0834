"""The import rules of the package: who may know whom."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from full_stack_transformer.tasks.catalogue import TASKS

PACKAGE = Path(__file__).resolve().parents[1] / "full_stack_transformer"
NAME = PACKAGE.name
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def _room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


ALL = {_room(module) for module in MODULES} - {
    "",
    "__main__",
    "command_line",
    "first_checks",
    "scripts",
}
BASE = {
    *{"arguments", "errors", "interruption", "storage", "machine", "own_classes", "processes"},
    *{"object_storage", "object_cache", "ray_cluster"},
}
# Names without code behind them: the command line and the documents' side may know which tasks there are.
CATALOGUE = f"{NAME}.tasks.catalogue"
# Third-party packages that belong to one room.
ROOM_OF_PACKAGE = {
    "pytorch_lightning": "training",
    "tensorboard": "training",
    "fastapi": "serving",
    "fastapi_offline": "serving",
    "uvicorn": "serving",
    "llguidance": "serving",
    "aiogram": "telegram",
    "aiohttp": "telegram",
    "cyclopts": "command_line",
    "lm_eval": "evaluation",
}
# And those with metrics of their own.
ROOMS_WITH_METRICS = {"serving", "telegram"}
# What a room must never import of ours.
FORBIDDEN = {
    "arguments": ALL - BASE,
    "documents": ALL - BASE - {"documents"},
    "conversations": ALL - BASE - {"conversations", "documents"},
    "tokenization": ALL - BASE - {"tokenization"},
    "rows": ALL - BASE - {"rows", "documents"},
    "metrics": ALL - BASE - {"metrics"},
    "document_sources": {"modelling", "training", "generation", "serving", "datasets", "telegram"},
    "preparation": ALL
    - BASE
    - {"preparation", "documents", "conversations", "tokenization", "datasets"},
    "datasets": ALL - BASE - {"datasets", "tokenization"},
    "modelling": {
        *{"datasets", "rows", "tasks", "training", "generation", "serving", "evaluation"},
        "model_sources",
    },
    "model_sources": {
        *{"training", "generation", "serving", "datasets", "evaluation", "telegram", "preparation"},
        *{"documents", "document_sources"},
    },
    "tasks": {"preparation", "training", "generation", "serving", "evaluation", "telegram"},
    "generation": {"training", "serving", "preparation", "datasets", "evaluation", "telegram"},
    "training": {"serving", "telegram", "evaluation", "preparation", "documents"},
    "evaluation": {"training", "serving", "telegram", "preparation", "documents"},
    "serving": {
        *{"training", "preparation", "datasets", "rows", "documents", "document_sources"},
        *{"evaluation", "telegram"},
    },
}
# What a folder of a room must never import: http/ knows no model, workers/ no HTTP.
FORBIDDEN_FOLDERS = {
    "serving.http": (
        *("serving.routes", "serving.workers", "generation", "modelling", "tasks"),
        *("tokenization", "torch", "transformers"),
    ),
    "serving.workers": ("serving.http", "serving.routes", "starlette", "fastapi"),
    "serving.routes": ("socket", "uvicorn", "h11"),
}

# What a folder of the bot may import of the bot: updates -> conversation -> sending -> state.
TELEGRAM = {
    "state": set(),
    "sending": {"state", "texts"},
    "conversation": {"state", "sending", "texts", "monitoring"},
    "updates": {"state", "sending", "conversation", "texts", "monitoring"},
}


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            module = node.module or ""
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield inner if inner in MODULES else module


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_room_may(module: str) -> None:
    room = _room(module)
    for imported in _imports(MODULES[module]):
        package = imported.split(".")[0]
        if imported == CATALOGUE:
            continue
        if package == NAME:
            assert _room(imported) not in FORBIDDEN.get(room, set()), f"{module} imports {imported}"
            if room == "telegram":
                allowed = {f"{NAME}.serving.client", f"{NAME}.serving.schemas"}
                assert _room(imported) in BASE | {"telegram"} or imported in allowed
                folder, target = module.split(".")[2:3], imported.split(".")[2:3]
                if imported.startswith(f"{NAME}.telegram.") and folder[0] in TELEGRAM:
                    assert target[0] in TELEGRAM[folder[0]] | set(folder), (
                        f"{module} imports {imported}"
                    )
            if room in BASE:
                assert _room(imported) in BASE
        elif package == "prometheus_client":
            assert room in ROOMS_WITH_METRICS, f"{module} imports {imported}"
        elif package in ROOM_OF_PACKAGE:
            assert room == ROOM_OF_PACKAGE[package], f"{module} imports {imported}"


@pytest.mark.parametrize("folder", FORBIDDEN_FOLDERS)
def test_a_folder_imports_only_what_it_may(folder: str) -> None:
    modules = [name for name in MODULES if name.startswith(f"{NAME}.{folder}.")]
    assert modules
    for module in modules:
        for imported in _imports(MODULES[module]):
            inside = imported.removeprefix(f"{NAME}.")
            for forbidden in FORBIDDEN_FOLDERS[folder]:
                assert not f"{inside}.".startswith(f"{forbidden}."), f"{module} imports {imported}"


def test_ray_is_imported_only_where_the_name_says_so() -> None:
    """`ray_cluster` imports it for all; what uses it is named for it, or lies in `serving.replicas`."""
    for module, path in MODULES.items():
        if not (module.rpartition(".")[2].startswith("ray_") or ".serving.replicas." in module):
            imported = {name.split(".")[0] for name in _imports(path)}
            assert "ray" not in imported, f"{module} imports ray"


def test_there_are_no_cycles() -> None:
    graph = {
        module: {name for name in _imports(path) if name in MODULES and name != module}
        for module, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail, module])
        if module not in done:
            for imported in graph[module]:
                visit(imported, (*trail, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_every_package_has_a_docstring() -> None:
    for module, path in MODULES.items():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), module


@pytest.mark.parametrize(
    "module",
    [
        "preparation.prepare",
        "document_sources.collect",
        "telegram.run",
        "telegram.bot",
        "serving.client",
        "document_sources.demo",
        "metrics.classification",
        "metrics.texts",
        "tasks.catalogue",
        "tasks.routes",
        "__main__",
        "command_line",
        "first_checks",
    ],
)
def test_light_modules_never_import_torch(module: str) -> None:
    heavy = ["torch", "transformers", "pytorch_lightning", "fastapi"]
    code = (
        f"import sys, full_stack_transformer.{module}\n"
        f"sys.exit(','.join(name for name in {heavy} if name in sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{module} imports {done.stderr}"


@pytest.mark.parametrize("module", ["training.run", "serving.run", "tasks.catalogue"])
def test_the_libraries_of_metrics_are_imported_when_one_is_computed(module: str) -> None:
    libraries = ["sklearn", "seqeval", "sacrebleu", "rouge_score", "nltk"]
    code = (
        f"import sys, full_stack_transformer.{module}\n"
        f"sys.exit(','.join(name for name in {libraries} if name in sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{module} imports {done.stderr}"


def test_the_name_of_a_task_stands_in_its_file_and_in_the_catalogue() -> None:
    """Whatever else differs between tasks, the other modules ask the task."""
    folder = PACKAGE / "tasks"
    for name, where in TASKS.items():
        allowed = {folder / "catalogue.py", folder / f"{where.partition(':')[0]}.py"}
        files = [path for ending in ("py", "js", "html") for path in PACKAGE.rglob(f"*.{ending}")]
        for path in files:
            if path not in allowed:
                assert not re.search(rf"\b{name}\b", _code(path)), f"{path} names {name}"


def _code(path: Path) -> str:
    """A file without the lines that import a task's module."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith(("from ", "import ")))


def test_the_service_never_imports_lightning() -> None:
    code = (
        "import sys, full_stack_transformer.serving.run\n"
        "sys.exit('pytorch_lightning' in sys.modules or 'tensorboard' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
