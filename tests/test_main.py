"""The command line: help at once, options in every spelling, errors as one sentence."""

import dataclasses
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from full_stack_transformer import __version__, command_line, errors
from full_stack_transformer.arguments.data import PrepareDatasetArguments
from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.command_line import COMMANDS
from full_stack_transformer.errors import install_command
from tests.conftest import RunFst

REPOSITORY = Path(__file__).resolve().parents[1]


def test_commands_are_listed_in_the_order_of_the_pipeline(run_fst: RunFst) -> None:
    done = run_fst("--help")
    assert done.returncode == 0
    positions = [done.stdout.index(f"│ {name} ") for name, _, _ in COMMANDS]
    assert positions == sorted(positions)
    for name, options, _ in COMMANDS:
        assert options.__doc__, name


@pytest.mark.parametrize("name", [name for name, _, _ in COMMANDS])
def test_every_option_has_help(name: str, run_fst: RunFst) -> None:
    done = run_fst(name, "--help")
    options = next(options for command, options, _ in COMMANDS if command == name)
    for field in dataclasses.fields(options):
        if not field.name.startswith("_"):
            assert f"--{field.name}" in done.stdout
            owner = next(cls for cls in options.__mro__ if field.name in cls.__annotations__)
            if "help" in field.metadata:
                continue
            declaration = inspect.getsource(owner).split(f"    {field.name}: ")[1]
            assert declaration.split("\n")[1].strip().startswith('"""'), field.name


def test_the_help_of_train_has_groups_and_the_common_options_first(run_fst: RunFst) -> None:
    lines = run_fst("train", "--help", env={"COLUMNS": "100"}).stdout.splitlines()
    titles = {line.split("─ ")[1].split(" ─")[0]: i for i, line in enumerate(lines) if "╭" in line}
    assert [*titles] == [
        *("Common options", "Data", "Files of labelled rows", "Model", "Optimization", "Schedule"),
        *("Validation", "Hardware", "Cluster", "Output", "Fine-tuning", "Adapters (LoRA)"),
        *("Masked language model", "Sequence classification"),
        *("Span selection and token labelling", "Sentence embedding"),
        *("Data in object storage", "Own classes"),
    ]
    assert titles["Data"] <= 40, "the common options fit on one screen"


@pytest.mark.parametrize("name", [name for name, _, _ in COMMANDS])
def test_no_default_is_shown_that_says_nothing(name: str, run_fst: RunFst) -> None:
    shown = re.findall(r"default:\W+(\S*)]", run_fst(name, "--help").stdout)
    assert not {"None", "()", "-", "", '""', "False"} & {*shown}


def test_help_imports_nothing_heavy() -> None:
    """That is why it comes at once: a tenth of a second where torch alone takes more than one."""
    code = (
        "import sys; from full_stack_transformer.command_line import run\n"
        "codes = [run([name, '--help']) for name in sys.argv[1:]]\n"
        "assert not any(codes), codes\n"
        "print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    names = [name for name, _, _ in COMMANDS]
    done = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, check=True
    )
    imported = set(done.stderr.split())
    assert "cyclopts" in imported
    heavy = {
        *("aiogram", "fastapi", "httpx", "huggingface_hub", "numpy", "pydantic", "pyarrow"),
        *("pytorch_lightning", "tensorboard", "tokenizers", "torch", "transformers"),
    }
    assert not imported & heavy


@pytest.mark.parametrize("module_name", [module_name for _, _, module_name in COMMANDS])
def test_every_command_exists(module_name: str) -> None:
    path = REPOSITORY / "full_stack_transformer" / f"{module_name.replace('.', '/')}.py"
    assert "\ndef main(arguments: " in path.read_text(encoding="utf-8")


def test_every_script_calls_its_command() -> None:
    scripts = [
        path.stem for path in (REPOSITORY / "full_stack_transformer/scripts").glob("[a-z]*.py")
    ]
    assert len(scripts) >= 7
    for name in scripts:
        path = REPOSITORY / "full_stack_transformer" / "scripts" / f"{name}.py"
        done = subprocess.run(
            [sys.executable, path, "--help"], capture_output=True, text=True, check=True, cwd="/"
        )
        assert f"fst {name}" in done.stdout


def test_classes_of_ones_own_are_found_in_the_working_directory(tmp_path: Path) -> None:
    """By the installed `fst` too, whose own folder Python looks into first; -P leaves out the working one."""
    (tmp_path / "my_module.py").write_text("class MyTokenizer: pass")
    start = "from full_stack_transformer.__main__ import main; main()"
    words = ["check_tokenizer", "--tokenizer_cls_name", "my_module.MyTokenizer"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", start, *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert "No module named" not in done.stderr
    assert "DocumentTokenizer" in done.stderr


def test_the_version_is_printed(run_fst: RunFst) -> None:
    assert run_fst("--version").stdout == f"{__version__}\n"


def _parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    """The options that a command line means, without running the command."""
    parsed: list[object] = []

    class Module:
        @staticmethod
        def main(given: object) -> None:
            parsed.append(given)

    monkeypatch.setattr("importlib.import_module", lambda name: Module)
    assert command_line.run(["prepare_dataset", *words]) == 0
    return parsed[0]


REQUIRED = ["--documents_train_file", "a", "--documents_valid_file", "b", "--dataset_name", "n"]


@pytest.mark.parametrize(
    "words",
    [
        ["--max_sample_length", "99", "--no_strip_lines"],
        ["--max-sample-length", "99", "--no-strip-lines"],
        ["--max_sample_length=99", "--strip_lines=false"],
        ["--strip_lines", "false", "--max_sample_length", "99"],
        ["--strip-lines", "False", "--max-sample-length=99"],
    ],
    ids=" ".join,
)
def test_options_may_be_spelled_in_every_usual_way(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = _parse([*REQUIRED, *words], monkeypatch)
    assert isinstance(given, PrepareDatasetArguments)
    assert (given.max_sample_length, given.strip_lines) == (99, False)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.json", '{"max_sample_length": 77, "vocab_size": 999}'),
        ("x.toml", "max_sample_length = 77\nvocab_size = 999\n"),
        ("x.yaml", "max_sample_length: 77\nvocab_size: 999\n"),
    ],
)
def test_options_win_over_the_config_file(
    name: str, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text(content)
    words = [*REQUIRED, "--vocab_size", "500", "--config", str(tmp_path / name)]
    given = _parse(words, monkeypatch)
    assert isinstance(given, PrepareDatasetArguments)
    assert (given.max_sample_length, given.vocab_size) == (77, 500)


@pytest.mark.parametrize(
    ("words", "exit_code", "message"),
    [
        (["trian"], 2, 'Did you mean "train"'),
        (["help", "trian"], 2, 'Did you mean "train"'),
        (["train", "data"], 2, "too many arguments without an option: data;"),
        (["generate", "none", "one text", "other"], 2, "option: other; quote a text"),
        (["generate", "none", "a text"], 1, "none should be a model directory"),
        (["generate", "none", "-p", "a text"], 1, "none should be a model directory"),
        (["train", "--dataset_dir", "x", "--learning_rat", "1"], 2, "--learning_rate"),
        (["train"], 2, "--dataset_dir"),
        (["train", "--warmup_ratio", "0.1"], 2, "use instead: --num_warmup_steps"),
        (["train", "--temperature", "0.1"], 2, "use instead: --simcse_temperature"),
        (["run_experiment"], 2, "pass --data_class or --model_class"),
        (["run_experiment", "--data_class", "no.Such"], 2, "should name a data set"),
        (
            ["train", "--task", "token_labelling", "--train_file", "none.csv"],
            1,
            "none.csv does not exist",
        ),
        (["prepare_dataset", *REQUIRED, "--vocab_size", "many"], 2, "--vocab_size"),
        (["prepare_dataset", *REQUIRED], 1, "a does not exist"),
        (["prepare_dataset", "--config", "none.json"], 2, "--config must name"),
        (["prepare_dataset", *REQUIRED[:-1], "../../x"], 2, "--dataset_name"),
        (["evaluate", "none", "none"], 1, "none should be a model directory"),
        (["generate", "none", "--prompt", "x"], 1, "none should be a model directory"),
        (["serve", "none"], 1, "none should be a model directory"),
        (["serve", "none", "--port", "70000"], 2, "--port must be between 0 and 65535"),
        (["tensorboard", "none"], 1, "none does not exist"),
        (["collect_documents", "everything"], 2, "python_docs"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_a_mistake_is_one_sentence(
    words: list[str], exit_code: int, message: str, run_fst: RunFst, tmp_path: Path
) -> None:
    done = run_fst(*words, cwd=tmp_path)
    assert done.returncode == exit_code, done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("fst: ")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_all_options_are_shown_with_their_origin(run_fst: RunFst, tmp_path: Path) -> None:
    (tmp_path / "options.toml").write_text("batch_size = 4\nlearning_rate = 0.5\n")
    done = run_fst(
        *("train", "--dataset_dir", "x", "--config", "options.toml", "--show_all_args"),
        *("--per_device_train_batch_size", "8", "--gpus", "2"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    shown = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    names = {field.name for field in dataclasses.fields(TrainArguments)} - {"_"}
    assert shown.keys() == names
    assert shown["batch_size"] == ["8", "command", "line"]
    assert shown["learning_rate"] == ["0.5", "options.toml"]
    assert shown["accelerator"] == ["'gpu'", "command", "line"]
    assert shown["seed"] == ["0", "default"]


def test_the_saved_options_of_earlier_versions_are_read(run_fst: RunFst, tmp_path: Path) -> None:
    (tmp_path / "arguments.json").write_text('{"dataset_dir": "x", "temperature": 0.25}')
    done = run_fst("train", "--config", "arguments.json", "--show_all_args", cwd=tmp_path)
    assert re.search(r"^simcse_temperature +0.25 +arguments.json$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("words", [["help", "train"], ["help"], ["help", "prepare-dataset"]])
def test_help_is_a_command_too(words: list[str], run_fst: RunFst) -> None:
    assert run_fst(*words).stdout == run_fst(*words[1:], "--help").stdout != ""


def test_the_install_command_fits_the_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout has constraints.txt; an installed package has none beside it."""
    assert install_command("data") == "pip install -c constraints.txt -e '.[data]'"
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "full_stack_transformer" / "errors.py"))
    assert install_command("data") == "pip install 'full_stack_transformer[data]'"


def test_a_metric_without_its_library_names_the_extra() -> None:
    error = ModuleNotFoundError("No module named 'sklearn'", name="sklearn.metrics")
    message = str(command_line._missing_extra(error))
    assert "needs the package sklearn" in message
    assert "pip install -c constraints.txt -e '.[evaluation]'" in message


def test_a_missing_extra_names_its_install_command(tmp_path: Path, run_fst: RunFst) -> None:
    (tmp_path / "aiogram.py").write_text("raise ModuleNotFoundError(name='aiogram')")
    done = run_fst("telegram_bot", env={"PYTHONPATH": str(tmp_path), "TELEGRAM_BOT_TOKEN": "1:abc"})
    assert done.returncode == 1
    assert "pip install -c constraints.txt -e '.[telegram]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "stdin", "expected"),
    [
        (
            [b"--prompt", b"caf\xe9"],
            b"",
            b"--prompt is not UTF-8: byte 0xe9 at offset 3; convert it",
        ),
        ([b"--stop", b"\xc3\xa9\xff"], b"a", b"--stop is not UTF-8: byte 0xff at offset 2"),
        ([], b"caf\xe9", b"standard input is not UTF-8: byte 0xe9 at offset 3"),
        ([b"--prompt_file", b"-"], b"\xff\xfea\0", b"standard input is not UTF-8: it is UTF-16"),
        ([b"--prompt_file", b"/no\xe9"], b"", b"--prompt_file /no\\xe9: No such file"),
        ([b"--device", b"cp\xe9"], b"a", b"--device must be auto"),
    ],
    ids=["prompt", "second word", "stdin", "utf-16", "path", "other text"],
)
def test_texts_that_are_not_utf_8_are_one_sentence(
    words: list[bytes], stdin: bytes, expected: bytes, model_dir: Path, tmp_path: Path
) -> None:
    model = os.fsencode(tmp_path) + b"/model\xe9"
    shutil.copytree(model_dir, os.fsdecode(model))
    command = [sys.executable.encode(), b"-m", b"full_stack_transformer", b"generate", model]
    done = subprocess.run([*command, *words], input=stdin, capture_output=True, check=False)
    assert done.returncode in (1, 2)
    assert done.stderr.startswith(b"fst: " + expected)
    assert done.stderr.count(b"\n") == 1
