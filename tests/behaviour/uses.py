"""Models that are used from the command line: texts, figures, and the names of all options.

Nothing is left to the defaults of sampling, which may change.
"""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.behaviour.commands import fst
from tests.behaviour.data import ROW_TASKS
from tests.behaviour.facts import Facts, plain, read_json, read_json_lines, sha256
from tests.behaviour.steps import Step
from tests.behaviour.trainings import LANGUAGE_MODEL

_MODEL = f"experiments/{LANGUAGE_MODEL}/0"
_COMMANDS = (
    *("collect_documents", "prepare_dataset", "verify_dataset", "check_tokenizer", "train"),
    *(
        "run_experiment",
        "average_checkpoints",
        "whiten",
        "quantize",
        "evaluate",
        "generate",
        "serve",
    ),
    *("telegram_bot", "tensorboard", "demo"),
)
_GREEDY: dict[str, float] = {
    "max_new_tokens": 40,
    "temperature": 0,
    "top_k": 0,
    "top_p": 1,
    "min_p": 0,
    "typical_p": 1,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "min_new_tokens": 0,
    "seed": 0,
    "num_return_sequences": 1,
}
_DRAWN: dict[str, float] = {
    **_GREEDY,
    "temperature": 0.9,
    "top_k": 50,
    "top_p": 0.95,
    "repetition_penalty": 1.1,
    "seed": 11,
}
_HARNESS_TASK = """\
task: first_lines
dataset_path: json
dataset_kwargs:
  data_files:
    test: rows/multiple_choice/test.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}\\n"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc_norm
"""


def using_steps() -> list[Step]:
    """Of texts, figures and options."""
    trained = (f"train/{LANGUAGE_MODEL}",)
    texts: dict[str, tuple[Callable[[Path], Facts], tuple[str, ...]]] = {
        "drawn": (_drawn, trained),
        "scored": (_scored, trained),
        "steered": (_steered, trained),
        "checkpoint": (_greedy_of_checkpoint, trained),
        "gpt2": (_of_gpt2, ("train/dropout",)),
        "torch": (_of_torch, ("train/other",)),
        "conversation": (_conversation, ("models/chat",)),
    }
    on_rows = [
        Step(f"evaluate/{task}", partial(_on_rows, task=task), (f"train/{task}",), goes_on=True)
        for task in ROW_TASKS
    ]
    return [
        Step("options", _options),
        *(Step(f"generate/{name}", *what, goes_on=True) for name, what in texts.items()),
        *on_rows,
        *(
            Step(f"evaluate/{name}", run, needs, goes_on=True)
            for name, run, needs in (
                ("causal_lm", _language_model, trained),
                ("choices", _choices, (*trained, "collected/multiple_choice")),
                ("harness", _harness, (*trained, "collected/multiple_choice")),
                ("masked_lm", _masked, ("train/masked_lm",)),
                ("whitened", _whitened, ("models/whitened",)),
            )
        ),
    ]


def _options(work: Path) -> Facts:
    """The names of all options of each command."""
    found = {}
    for command in _COMMANDS:
        shown = re.findall(r"(?<![\w-])--[a-z_-]+", fst(work, command, "--help"))
        found[command] = sorted(set(shown))
    return found


def _generate(
    work: Path,
    model: str,
    sampling: dict[str, float],
    *more: str,
    weights_dtype: str = "float32",
    stdin: str = "",
) -> Facts:
    words = [f"--{name}={value}" for name, value in sampling.items()]
    kind = ("--device", "cpu", "--weights_dtype", weights_dtype)
    printed = fst(work, "generate", model, *words, *kind, *more, stdin=stdin)
    return {"printed": printed, "sha256": sha256(printed)}


def _drawn(work: Path) -> Facts:
    several = {**_DRAWN, "num_return_sequences": 3}
    return _generate(work, _MODEL, several, "--prompt", "Every sample")


def _scored(work: Path) -> Facts:
    words = ("--prompt", "Nobody", "--log_probabilities", "3")
    printed = _generate(work, _MODEL, _DRAWN, *words, weights_dtype="bfloat16")["printed"]
    return {"tokens": [plain(json.loads(line)) for line in printed.split("\n")[:-1]]}


def _steered(work: Path) -> Facts:
    steering = {"min_p": 0.01, "typical_p": 0.9, "presence_penalty": 0.3, "frequency_penalty": 0.2}
    words = ("--prompt", "The corpus", "--stop", "9.", "--ignored_words", "token")
    more = ("--logit_bias", "40=-100", "--logit_bias", "60=2.5")
    sampling = {**_DRAWN, **steering, "min_new_tokens": 5}
    return _generate(work, _MODEL, sampling, *words, *more, weights_dtype="int8")


def _greedy_of_checkpoint(work: Path) -> Facts:
    model = f"{_MODEL}/checkpoints/previous.ckpt"
    return _generate(work, model, _GREEDY, stdin="A small model\n")


def _of_gpt2(work: Path) -> Facts:
    several = {**_DRAWN, "num_return_sequences": 2}
    return _generate(work, "experiments/dropout/0", several, "--prompt", "The reader")


def _of_torch(work: Path) -> Facts:
    several = {**_DRAWN, "num_return_sequences": 2}
    return _generate(work, "experiments/other/0", several, "--prompt", "The reader")


def _conversation(work: Path) -> Facts:
    lines = "Hello\nAnd then?\n/seed 4\nAgain\n/reset\nHello\n/quit\n"
    short = {name: value for name, value in _DRAWN.items() if name != "num_return_sequences"}
    return _generate(
        work, "models/chat", {**short, "max_new_tokens": 10}, "--interactive", stdin=lines
    )


def _evaluate(work: Path, model: str, *words: str) -> Facts:
    printed = fst(work, "evaluate", model, *words, "--device", "cpu")
    figures: Facts = plain(json.loads(printed))
    return figures


def _language_model(work: Path) -> Facts:
    words = ("datasets/main", "--weights_dtype", "int8")
    more = ("--generation", "6", "--max_new_tokens", "24", "--temperature", "0")
    return _evaluate(work, _MODEL, *words, *more)


def _choices(work: Path) -> Facts:
    return _evaluate(work, _MODEL, "rows/multiple_choice", "--num_resamples", "20")


def _harness(work: Path) -> Facts:
    (work / "harness.yaml").write_text(_HARNESS_TASK, encoding="utf-8")
    return _evaluate(work, _MODEL, "--harness", "harness.yaml")


def _masked(work: Path) -> Facts:
    return _evaluate(work, "experiments/masked_lm/0", "datasets/main")


def _whitened(work: Path) -> Facts:
    return _evaluate(work, "models/whitened", "rows/sentence_embedding", "--num_resamples", "20")


def _on_rows(work: Path, task: str) -> Facts:
    directory = work / "evaluation" / task
    shutil.rmtree(directory, ignore_errors=True)
    words = (f"rows/{task}", "--num_resamples", "20", "--output_dir", f"evaluation/{task}")
    figures = _evaluate(work, f"experiments/{task}/0", *words)
    return {
        **figures,
        "files": sorted(path.name for path in directory.iterdir()),
        "saved": read_json(directory / "results.json"),
        **{path.stem: read_json_lines(path) for path in sorted(directory.glob("*.jsonl"))},
        **{path.name: sha256(path.read_bytes()) for path in sorted(directory.glob("*.svg"))},
    }
