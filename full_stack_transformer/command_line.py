"""The table of commands, each imported only when it runs, and how their options are read.

Results (paths, texts, metrics) go to standard output, logs and progress to standard error.
Exit codes: 0 success, 1 an error explained by the message, 2 wrong usage, 75 another process of the training
has ended, 130 interrupted.
"""

import dataclasses
import importlib
import logging
import os
import re
import shlex
import sys
import typing
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import cyclopts
from cyclopts import App, Parameter

from full_stack_transformer import __version__, interruption
from full_stack_transformer.arguments import data, exporting, models, planning, serving, training
from full_stack_transformer.arguments.checks import check_texts
from full_stack_transformer.arguments.familiar_options import RENAMED, translate
from full_stack_transformer.arguments.typed import CommandLine, running
from full_stack_transformer.errors import (
    FullStackTransformerError,
    MissingExtraError,
    UsageError,
    install_command,
)
from full_stack_transformer.first_checks import check_first
from full_stack_transformer.model_sources.names import with_imported_models
from full_stack_transformer.own_classes import trust_options
from full_stack_transformer.processes import is_main_process, may_speak, quieten_others
from full_stack_transformer.storage import not_utf_8, readable, why_not_written

if TYPE_CHECKING:
    from cyclopts.help import HelpEntry, HelpPanel
    from rich.console import Console, ConsoleOptions

# name, options, module whose main(options) runs it; in the order of the pipeline
COMMANDS: tuple[tuple[str, type, str], ...] = (
    ("collect_documents", data.CollectDocumentsArguments, "document_sources.collect"),
    ("prepare_dataset", data.PrepareDatasetArguments, "preparation.prepare"),
    ("verify_dataset", data.VerifyDatasetArguments, "datasets.verify"),
    ("check_tokenizer", data.CheckTokenizerArguments, "tokenization.check_tokenizer"),
    ("collect_model", models.CollectModelArguments, "model_sources.collect_model"),
    ("import_model", models.ImportModelArguments, "model_sources.import_model"),
    ("train", training.TrainArguments, "training.command"),
    ("run_experiment", training.RunExperimentArguments, "training.command"),
    ("average_checkpoints", models.AverageCheckpointsArguments, "modelling.averaging"),
    ("merge", models.MergeArguments, "modelling.merging"),
    ("whiten", models.WhitenArguments, "modelling.embedding.whitening"),
    ("quantize", models.QuantizeArguments, "quantization.command"),
    ("export", exporting.ExportArguments, "exporting.command"),
    ("evaluate", models.EvaluateArguments, "evaluation.run"),
    ("generate", models.GenerateArguments, "generation.command"),
    ("chat", models.ChatArguments, "generation.chatting"),
    ("serve", serving.ServeArguments, "serving.run"),
    ("telegram_bot", serving.TelegramBotArguments, "telegram.run"),
    ("tensorboard", training.TensorboardArguments, "training.tensorboard"),
    ("demo", data.DemoArguments, "document_sources.demo"),
    ("doctor", training.DoctorArguments, "doctor"),
    ("plan", planning.PlanArguments, "planning.command"),
)

# With any command: print its options and their values, and run nothing.
_SHOW_ALL = "--show_all_args"
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]+")
_CONFIG_READERS: dict[str, Callable[..., Any]] = {
    ".json": cyclopts.config.Json,
    ".toml": cyclopts.config.Toml,
    ".yaml": cyclopts.config.Yaml,
    ".yml": cyclopts.config.Yaml,
}

# The extra that installs a package.
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
    "peft": "peft",
    "sklearn": "evaluation",
    "scipy": "evaluation",
    "seqeval": "evaluation",
    "sacrebleu": "evaluation",
    "rouge_score": "evaluation",
}


def run(argv: list[str]) -> int:
    """Run one command and return its exit code; no traceback for a user's mistake."""
    # One line per record, and only here: importing a module configures nothing.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    quieten_others()
    for noisy in ("httpx", "httpcore", "aiogram.event", "huggingface_hub", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # A broken pipe (fst generate … | head) ends the program quietly.
    try:
        app = _make_app()
        line = CommandLine(words=tuple(argv))
        argv, config = _take_config_option(app, _normalize(argv))
        app.config = (partial(_note, line.typed), *(app.config or ()), partial(_note, line.given))
        if _SHOW_ALL in argv:
            return _show_all_options(app, [word for word in argv if word != _SHOW_ALL], config)
        with running(line):
            result = app(argv, exit_on_error=False, print_error=False, result_action="return_value")
    except cyclopts.UnusedCliTokensError as error:
        unused = " ".join(map(shlex.quote, error.unused_tokens or ()))
        return _complain(
            f"too many arguments without an option: {unused}; quote a text that has spaces. "
            f"See: fst {_known_command(argv)}--help",
            2,
        )
    except cyclopts.CycloptsError as error:
        return _complain(f"{error} See: fst {_known_command(argv)}--help", 2)
    except FullStackTransformerError as error:
        return _complain(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        return _complain(str(_missing_extra(error)), MissingExtraError.exit_code)
    except KeyboardInterrupt:
        return _complain("interrupted", interruption.EXIT_CODE)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # such as a failing disk
        return _complain(f"{error.filename or 'a file'}: {why_not_written(error)}", 1)
    except MemoryError as error:
        return _complain(f"there is not enough memory{f': {error}' if str(error) else ''}", 1)
    except UnicodeEncodeError as error:
        if not_utf_8(str(error.object)) is None:
            raise
        return _complain(
            f"{error.object!r} is not UTF-8, which is needed here; rename the file or directory", 1
        )
    if isinstance(result, Path):
        _print_path(result)
    return result if isinstance(result, int) else 0


def _print_path(path: Path) -> None:
    """Print a path as it is, whatever bytes it has."""
    sys.stdout.flush()
    stream = getattr(sys.stdout, "buffer", None)
    if stream is None:
        sys.stdout.write(f"{path}\n")
    else:
        stream.write(os.fsencode(path) + b"\n")
        stream.flush()


def _complain(message: str, exit_code: int) -> int:
    if may_speak():
        sys.stderr.write(f"fst: {readable(message)}\n")
    return exit_code


def _known_command(argv: list[str]) -> str:
    return f"{argv[0]} " if argv and argv[0] in {name for name, _, _ in COMMANDS} else ""


def _make_app() -> App:
    # Options are spelled like the dataclass fields; cyclopts accepts hyphens for underscores.
    app = App(
        name="fst",
        help="From a folder of texts to a language model that people talk to.",
        help_epilogue="fst COMMAND --help lists the options of a command. --config FILE reads options from a "
        "JSON, TOML or YAML file. --show_all_args prints all options with their values and origins.",
        version=__version__,
        default_parameter=Parameter(
            name_transform=str,
            negative_bool=("no-", "no_"),
            negative_iterable=(),
            show_default=_shown_default,
        ),
        sort_key=None,
        suppress_keyboard_interrupt=False,
    )
    app["--help"].group = "Help"
    app["--version"].group = "Help"
    for order, (name, options, module_name) in enumerate(COMMANDS):
        summary = (options.__doc__ or "").strip()
        app.command(
            _runner(options, module_name),
            name=name,
            help=summary,
            sort_key=order,
            help_formatter=_GroupedHelp(options),
        )
    return app


def _shown_default(value: object) -> str | None:
    """The default in the help of an option, or None if it says nothing."""
    if value is None or value is False or value in ("", ()):
        return None
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


@dataclasses.dataclass(frozen=True)
class _GroupedHelp:
    """Shows the options of a command in groups.

    The fields of the command's own class come first. Each base class named …Options is one more group, whose
    title is its docstring.
    """

    options: type

    def __call__(
        self, console: "Console", console_options: "ConsoleOptions", panel: "HelpPanel"
    ) -> None:
        """Print one panel for each group."""
        from cyclopts.help import DefaultFormatter

        titles = self._titles()
        groups: dict[str, list[HelpEntry]] = {title: [] for title in titles.values()}
        for entry in panel.entries:
            name = entry.positive_names[0].removeprefix("--")
            groups[titles[name]].append(self._with_one_spelling(entry))
        for title, entries in groups.items():
            DefaultFormatter()(console, console_options, panel.copy(title=title, entries=entries))

    def render_usage(
        self, console: "Console", console_options: "ConsoleOptions", usage: Any
    ) -> None:
        """Print the usage line as cyclopts does."""
        from cyclopts.help import DefaultFormatter

        DefaultFormatter().render_usage(console, console_options, usage)

    def _titles(self) -> dict[str, str]:
        """The title of each field's group, in the order of the groups."""
        owners = [owner for owner in self.options.__mro__ if dataclasses.is_dataclass(owner)]
        groups = [owner for owner in owners if owner.__name__.endswith("Options")]
        common = "Common options" if groups else "Options"
        titles = {
            name: common
            for owner in owners
            if owner not in groups
            for name in owner.__annotations__
        }
        return titles | {
            name: (owner.__doc__ or "").rstrip(".")
            for owner in groups
            for name in owner.__annotations__
        }

    @staticmethod
    def _with_one_spelling(entry: "HelpEntry") -> "HelpEntry":
        """Of `--no-x` and `--no_x` the second, and none where an option is off by default."""
        names = [
            name for name in entry.negative_names if name.startswith("--no_") and entry.default
        ]
        return entry.copy(negative_names=tuple(names))


def _note(names: set[str], _app: App, _commands: Sequence[str], arguments: Any) -> None:
    """Note the options that have a value by now, and refuse a number that cyclopts would round.

    cyclopts calls it before and after it reads the --config file.

    Raises:
        UsageError: an option for a whole number has another value.
    """
    for argument in arguments:
        kinds = {*(typing.get_args(argument.hint) or [argument.hint])} - {type(None), ...}
        for token in argument.tokens:
            names.add(argument.keys[0])
            if kinds == {int} and token.value and not _WHOLE_NUMBER.fullmatch(token.value):
                raise UsageError(
                    f"--{argument.keys[0]} must be a whole number such as 8, found {token.value!r}"
                )


def _runner(options: type, module_name: str) -> Callable[..., Any]:
    """A function that takes `options` from cyclopts, imports the module and calls its `main`."""

    def runner(given: Any) -> Any:
        given = options() if given is None else given
        check_texts(given)
        given = with_imported_models(given)
        if is_main_process():
            check_first(given)
        module = importlib.import_module(f"full_stack_transformer.{module_name}")
        trust_options(given)
        interruption.raise_where_safe()
        try:
            return module.main(given)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of Rust's is no Exception
            if interruption.was_raised():  # native code makes other errors of it
                raise KeyboardInterrupt from error
            raise

    runner.__annotations__["given"] = Annotated[options, Parameter(name="*")]
    if all(field.default is not dataclasses.MISSING for field in dataclasses.fields(options)):
        # cyclopts needs a default if no single option is required; __post_init__ may require one of several.
        try:
            runner.__defaults__ = (options(),)
        except UsageError:
            # Where pydantic is imported, cyclopts has it check the default too.
            runner.__annotations__["given"] = Annotated[options | None, Parameter(name="*")]
            runner.__defaults__ = (None,)
    return runner


def _normalize(argv: list[str]) -> list[str]:
    """Accept `prepare-dataset` for `prepare_dataset`, `--strip_lines false` for `--strip_lines=false`, and
    `-` as a value.

    Also `help COMMAND` for `COMMAND --help`, and `-p` for `--prompt`. For training also accept the
    option names of other trainers.
    """
    words: list[str] = []
    for word in argv:
        is_value = bool(words) and words[-1].startswith("--") and "=" not in words[-1]
        if is_value and word.lower() in ("true", "false"):
            words[-1] += f"={word.lower()}"
        elif is_value and word == "-":
            words[-1] += "=-"
        else:
            words.append(word)
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    if words and not words[0].startswith("-"):
        words[0] = words[0].replace("-", "_")
    if words[:1] == ["generate"]:
        words = ["--prompt" if word == "-p" else word for word in words]
    if words[:1] == ["whiten"]:  # cyclopts takes - for an option
        words = ["/dev/stdin" if word == "-" else word for word in words]
    return translate(words) if _is_training(words) else words


def _is_training(argv: list[str]) -> bool:
    return argv[:1] in (["train"], ["run_experiment"])


def _take_config_option(app: App, argv: list[str]) -> tuple[list[str], Path | None]:
    """Take `--config FILE` out of `argv`; options on the command line override the file."""
    for index, word in enumerate(argv):
        if word == "--config" and index + 1 < len(argv):
            path, rest = Path(argv[index + 1]), argv[:index] + argv[index + 2 :]
        elif word.startswith("--config="):
            path, rest = Path(word.removeprefix("--config=")), argv[:index] + argv[index + 1 :]
        else:
            continue
        if path.suffix not in _CONFIG_READERS or not path.is_file():
            raise UsageError(f"--config must name a .json, .toml or .yaml file; found {path}")
        reader = _CONFIG_READERS[path.suffix](path, use_commands_as_keys=False)
        if _is_training(argv) and isinstance(reader.config, dict):
            content = {str(RENAMED.get(key, key)): value for key, value in reader.config.items()}
            reader = cyclopts.config.Dict(content, use_commands_as_keys=False, source=str(path))
        app.config = (reader,)
        return rest, path
    return argv, None


def _show_all_options(app: App, argv: list[str], config: Path | None) -> int:
    """Print every option of a command with its value and its origin, and run nothing."""
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
        f"install it with: {install_command(extra)}"
    )
