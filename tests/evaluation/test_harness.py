"""lm-evaluation-harness on a tiny model with a local task."""

import json
from pathlib import Path

import pytest

from full_stack_transformer.arguments.models import EvaluateArguments
from full_stack_transformer.errors import InputError, MissingExtraError, UsageError
from full_stack_transformer.evaluation import harness
from full_stack_transformer.evaluation.log_likelihoods import continuation_span, log_likelihoods
from full_stack_transformer.generation.runners.torch import TorchRunner
from full_stack_transformer.modelling.model_directory import open_model
from tests.conftest import RunFst

ROWS = [
    {
        "question": f"The reader learns {number}",
        "choices": ["from it", "to be", "never"],
        "label": 1,
    }
    for number in range(6)
]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: rows.jsonl
test_split: test
output_type: {output_type}
{rest}
"""
KINDS = {
    "multiple_choice": """\
doc_to_text: "{{question}}"
doc_to_target: label
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
""",
    "loglikelihood_rolling": """\
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: bits_per_byte
    aggregation: bits_per_byte
    higher_is_better: false
""",
    "generate_until": """\
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 5
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
""",
}


def write_task(directory: Path, output_type: str) -> Path:
    """A task of one kind beside its rows."""
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    file = directory / f"{output_type}.yaml"
    content = TASK.format(name=output_type, output_type=output_type, rest=KINDS[output_type])
    file.write_text(content, "utf-8")
    return file


@pytest.mark.parametrize("output_type", KINDS)
def test_a_local_task_runs_without_a_network(
    output_type: str, run_fst: RunFst, model_dir: Path, tmp_path: Path
) -> None:
    file = write_task(tmp_path, output_type)
    done = run_fst("evaluate", model_dir, "--harness", file, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)[output_type]
    if output_type == "multiple_choice":
        assert figures["acc,none"] == pytest.approx(accuracy_by_hand(model_dir))
    elif output_type == "loglikelihood_rolling":
        assert figures["bits_per_byte,none"] > 0
    else:
        assert 0 <= figures["exact_match,none"] <= 1


def accuracy_by_hand(model_dir: Path) -> float:
    """Of the multiple choice, by the likelihoods that the runner computes."""
    model = open_model(model_dir, device="cpu")
    runner = TorchRunner(model.backbone, num_blocks=4)
    num_right = 0
    for row in ROWS:
        spans = [
            continuation_span(str(row["question"]), f" {choice}", model.tokenizer, max_length=128)
            for choice in list(row["choices"])  # type: ignore[call-overload]
        ]
        values = [one.value for one in log_likelihoods(spans, runner)]
        num_right += values.index(max(values)) == row["label"]
    return num_right / len(ROWS)


def test_without_the_extra_the_command_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "PACKAGE", "a_package_that_is_not_there")
    file = write_task(tmp_path, "multiple_choice")
    with pytest.raises(MissingExtraError, match=r"\.\[harness\]"):
        harness.run_harness(tmp_path, file, device="cpu", weights_dtype="float32", num_slots=1)


def test_a_task_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.yaml"):
        harness.run_harness(
            tmp_path,
            tmp_path / "absent.yaml",
            device="cpu",
            weights_dtype="float32",
            num_slots=1,
        )


def test_data_or_a_task_file_must_be_named_and_not_both() -> None:
    with pytest.raises(UsageError, match="only one"):
        EvaluateArguments(Path("model"))
    with pytest.raises(UsageError, match="only one"):
        EvaluateArguments(Path("model"), Path("data"), harness=Path("task.yaml"))
    with pytest.raises(UsageError, match="omit --harness"):
        EvaluateArguments(Path("model"), harness=Path("task.yaml"), generation=1)
