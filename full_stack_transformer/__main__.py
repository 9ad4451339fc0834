"""`fst COMMAND`: the table of commands, each imported only when it runs.

Results (paths, texts, figures) go to standard output; logs and progress to standard error.
Exit codes: 0 done, 1 an error that the message explains, 2 wrong usage, 130 interrupted.
"""

import contextlib
import dataclasses
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import App, Parameter

from full_stack_transformer import __version__
from full_stack_transformer.arguments import data, models, serving, training
from full_stack_transformer.arguments.familiar_options import translate
from full_stack_transformer.errors import (
    FullStackTransformerError,
    MissingExtraError,
    UsageError,
)
from full_stack_transformer.machine import restart_with_kept_memory

# name, options, "module:function" that takes them; in the order of the pipeline
COMMANDS: tuple[tuple[str, type, str], ...] = (
    (
        "collect_documents",
        data.CollectDocumentsArguments,
        "document_sources.collect:collect_documents",
    ),
    ("prepare_dataset", data.PrepareDatasetArguments, "preparation.prepare:prepare_dataset"),
    ("verify_dataset", data.VerifyDatasetArguments, "datasets.verify:verify_dataset"),
    (
        "check_tokenizer",
        data.CheckTokenizerArguments,
        "tokenization.check_tokenizer:check_tokenizer",
    ),
    ("train", training.TrainArguments, "training.run:train"),
    ("run_experiment", training.RunExperimentArguments, "training.run:run_experiment"),
    (
        "average_checkpoints",
        models.AverageCheckpointsArguments,
        "modelling.averaging:average_checkpoints",
    ),
    ("whiten", models.WhitenArguments, "modelling.embedding.whitening_command:whiten"),
    ("evaluate", models.EvaluateArguments, "evaluation.run:evaluate"),
    ("generate", models.GenerateArguments, "generation.command:generate"),
    ("serve", serving.ServeArguments, "serving.run:serve"),
    ("telegram_bot", serving.TelegramBotArguments, "telegram.run:run_bot"),
    ("tensorboard", training.TensorboardArguments, "training.tensorboard:show_curves"),
    ("demo", data.DemoArguments, "document_sources.demo:run_demo"),
)

# Beside any command: print what its options are, and run nothing.
_SHOW_ALL = "--show_all_args"
_CONFIG_READERS: dict[str, Callable[..., Any]] = {
    ".json": cyclopts.config.Json,
    ".toml": cyclopts.config.Toml,
    ".yaml": cyclopts.config.Yaml,
    ".yml": cyclopts.config.Yaml,
}

# Which extra brings a package that a command may miss.
_EXTRA_OF_PACKAGE = {
    "torch": "train",
    "transformers": "train",
    "pytorch_lightning": "train",
    "tensorboard": "train",
    "fastapi": "serve",
    "fastapi_offline": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "aiogram": "telegram",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and leave with its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    # A class of one's own lies where the command is typed; only `python -m` looks there by itself.
    sys.path.append("")
    if words[:1] in (["train"], ["run_experiment"]) and not {"--help", "-h", _SHOW_ALL} & {*words}:
        restart_with_kept_memory(words)
    sys.exit(run(words))


def run(argv: list[str]) -> int:
    """Run one command and return its exit code; no traceback for a user's mistake."""
    # One line per record, and only here: importing a module configures nothing.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "httpcore", "aiogram.event", "huggingface_hub", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Reads of a broken pipe (fst generate … | head) end the program quietly.
    try:
        app = _make_app()
        argv, config = _take_config_option(app, _normalize(argv))
        if _SHOW_ALL in argv:
            return _show_all_options(app, [word for word in argv if word != _SHOW_ALL], config)
        result = app(argv, exit_on_error=False, print_error=False, result_action="return_value")
    except cyclopts.CycloptsError as error:
        return _complain(f"{error} See: fst {_known_command(argv)}--help", 2)
    except FullStackTransformerError as error:
        return _complain(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        return _complain(str(_missing_extra(error)), MissingExtraError.exit_code)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a disk that fails under a file that was there a moment ago
        return _complain(f"{error.filename or 'a file'}: {error.strerror or error}", 1)
    if isinstance(result, Path):
        sys.stdout.write(f"{result}\n")
    return result if isinstance(result, int) else 0


def _complain(message: str, exit_code: int) -> int:
    sys.stderr.write(f"fst: {message}\n")
    return exit_code


def _known_command(argv: list[str]) -> str:
    return f"{argv[0]} " if argv and argv[0] in {name for name, _, _ in COMMANDS} else ""


def _make_app() -> App:
    # The options keep the spelling of the dataclass fields; cyclopts takes hyphens for underscores.
    app = App(
        name="fst",
        help="From a folder of texts to a language model that people talk to.",
        help_epilogue="Options of a command: fst COMMAND --help. Any command reads them from a JSON, "
        "TOML or YAML file too: --config FILE. --show_all_args prints each with its value and origin.",
        version=__version__,
        default_parameter=Parameter(
            name_transform=str, negative_bool=("no-", "no_"), negative_iterable=()
        ),
        sort_key=None,
    )
    app["--help"].group = "Help"
    app["--version"].group = "Help"
    for order, (name, options, target) in enumerate(COMMANDS):
        summary = (options.__doc__ or "").strip()
        app.command(
            _runner(options, target),
            name=name,
            help=summary,
            sort_key=order,
        )
    return app


def _runner(options: type, target: str) -> Callable[..., Any]:
    """A function that cyclopts fills with `options` and that imports `target` when it runs."""

    def runner(given: Any) -> Any:
        module_name, function_name = target.split(":")
        module = importlib.import_module(f"full_stack_transformer.{module_name}")
        return getattr(module, function_name)(options() if given is None else given)

    runner.__annotations__["given"] = Annotated[options, Parameter(name="*")]
    if all(field.default is not dataclasses.MISSING for field in dataclasses.fields(options)):
        # cyclopts wants it where no option is required; one of several may be required all the same.
        with contextlib.suppress(UsageError):
            runner.__defaults__ = (None,)
            runner.__defaults__ = (options(),)
    return runner


def _normalize(argv: list[str]) -> list[str]:
    """Take `prepare-dataset` for `prepare_dataset`, and `--strip_lines false` for `--strip_lines=false`.

    Of a training also the names of other trainers' options for ours.
    """
    words: list[str] = []
    for word in argv:
        is_value = bool(words) and words[-1].startswith("--") and "=" not in words[-1]
        if is_value and word.lower() in ("true", "false"):
            words[-1] += f"={word.lower()}"
        else:
            words.append(word)
    if words and not words[0].startswith("-"):
        words[0] = words[0].replace("-", "_")
    return translate(words) if words[:1] in (["train"], ["run_experiment"]) else words


def _take_config_option(app: App, argv: list[str]) -> tuple[list[str], Path | None]:
    """Take `--config FILE` out of `argv`; options typed beside it win over the file's."""
    for index, word in enumerate(argv):
        if word == "--config" and index + 1 < len(argv):
            path, rest = Path(argv[index + 1]), argv[:index] + argv[index + 2 :]
        elif word.startswith("--config="):
            path, rest = Path(word.removeprefix("--config=")), argv[:index] + argv[index + 1 :]
        else:
            continue
        if path.suffix not in _CONFIG_READERS or not path.is_file():
            raise UsageError(f"--config must name a .json, .toml or .yaml file; found {path}")
        app.config = (_CONFIG_READERS[path.suffix](path, use_commands_as_keys=False),)
        return rest, path
    return argv, None


def _show_all_options(app: App, argv: list[str], config: Path | None) -> int:
    """Print every option of a command, its value and where it came from, and run nothing."""
    _, bound, _ = app.parse_args(argv, exit_on_error=False, print_error=False)
    options = next(options for name, options, _ in COMMANDS if name == argv[0])
    given = bound.arguments.get("given")
    given = options() if given is None else given
    typed = {
        word.partition("=")[0].removeprefix("--").replace("-", "_").removeprefix("no_")
        for word in argv
        if word.startswith("--")
    }
    fields = [field for field in dataclasses.fields(options) if not field.name.startswith("_")]
    width = max(len(field.name) for field in fields)
    for field in fields:
        value = getattr(given, field.name)
        is_default = field.default is not dataclasses.MISSING and value == field.default
        origin = "default" if is_default else "command line"
        if field.name in typed:
            origin = "command line"
        elif config is not None and not is_default:
            origin = str(config)
        shown = value if isinstance(value, (int, float, tuple)) else str(value)
        sys.stdout.write(f"{field.name:<{width}}  {shown!r:<32}  {origin}\n")
    return 0


def _missing_extra(error: ModuleNotFoundError) -> Exception:
    package = (error.name or "").split(".")[0]
    if package not in _EXTRA_OF_PACKAGE:
        raise error
    extra = _EXTRA_OF_PACKAGE[package]
    return MissingExtraError(
        f"this command needs the package {package}, which is not installed; "
        f"install it with: pip install -c constraints.txt -e '.[{extra}]'"
    )


if __name__ == "__main__":
    main()
