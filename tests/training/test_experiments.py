"""Which directory a training writes into, and what --resume accepts."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from full_stack_transformer.arguments.training import TrainArguments
from full_stack_transformer.arguments.typed import CommandLine, running
from full_stack_transformer.datasets.corpus import DatasetDirectory
from full_stack_transformer.errors import DatasetError, InputError, TrainingError, UsageError
from full_stack_transformer.training.checkpoints import (
    EXPERIMENT_ID_KEY,
    VALIDATION_IS_DUE_KEY,
    DurableCheckpointIO,
)
from full_stack_transformer.training.experiments import Experiment, open_experiment


class _Opening:
    """Opens experiments in a root and writes checkpoints as a training would."""

    def __init__(self, dataset: DatasetDirectory, root: Path) -> None:
        self.dataset = dataset
        self.root = root

    def __call__(self, **options: Any) -> Experiment:
        arguments = TrainArguments(
            dataset_dir=self.dataset.directory, experiments_root=self.root, **options
        )
        with open_experiment(arguments, self.dataset) as experiment:
            return experiment

    def save(
        self,
        experiment: Experiment,
        step: int,
        *,
        validation_is_due: bool = False,
        has_id: bool = True,
    ) -> Path:
        path = experiment.directory / "checkpoints" / "last.ckpt"
        content = {
            "global_step": step,
            VALIDATION_IS_DUE_KEY: validation_is_due,
            "world_size": 1,
            **({EXPERIMENT_ID_KEY: experiment.id} if has_id else {}),
        }
        DurableCheckpointIO().save_checkpoint(content, path)
        return path


@pytest.fixture
def opening(dataset: DatasetDirectory, tmp_path: Path) -> _Opening:
    return _Opening(dataset, tmp_path)


def test_each_training_has_a_version_of_its_own(opening: _Opening) -> None:
    assert [opening().name for _ in range(2)] == ["experiment/0", "experiment/1"]
    assert opening(experiment_name="other").name == "other/0"


def test_the_arguments_are_saved_without_what_is_of_this_run(opening: _Opening) -> None:
    experiment = opening(learning_rate=0.5)
    saved = json.loads((experiment.directory / "arguments.json").read_text())
    assert saved["learning_rate"] == 0.5
    assert saved["dataset_dir"] == str(opening.dataset.directory)
    assert not {"resume", "max_minutes", "model_path"} & saved.keys()


def test_last_is_the_newest_version_and_has_its_options(opening: _Opening) -> None:
    for rate in (0.25, 0.5):
        opening.save(opening(learning_rate=rate, seed=3), 7)
    resumed = opening(resume="last")
    assert resumed.name == "experiment/1"
    assert (resumed.arguments.learning_rate, resumed.arguments.seed) == (0.5, 3)
    assert resumed.checkpoint is not None
    assert resumed.checkpoint.step == 7
    by_name = opening(resume=str(opening.root / "experiment" / "0"), experiment_name="ignored")
    assert by_name.name == "experiment/0"
    assert by_name.arguments.learning_rate == 0.25
    assert by_name.arguments.experiment_name == "experiment"


def test_a_directory_to_resume_may_be_the_current_one(
    opening: _Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(opening().directory)
    resumed = opening(resume=".")
    assert resumed.name == "experiment/0"
    assert resumed.arguments.experiments_root == opening.root


def test_the_line_that_goes_on_names_the_place(opening: _Opening) -> None:
    first, second = opening(), opening()
    assert first.resume_command() == f"fst train --resume {first.directory}"
    assert second.resume_command() == f"fst train --resume {second.directory}"


def test_a_training_that_was_killed_before_its_first_checkpoint_begins_again(
    opening: _Opening,
) -> None:
    first = opening(learning_rate=0.5)
    again = opening(resume="last")
    assert again.directory == first.directory
    assert again.arguments.learning_rate == 0.5
    assert again.checkpoint is None
    (first.directory / "arguments.json").unlink()  # killed sooner still
    assert opening(resume="last", learning_rate=0.75).arguments.learning_rate == 0.75


def test_other_options_are_refused_by_name(opening: _Opening) -> None:
    opening(learning_rate=0.5, batch_size=4)
    with pytest.raises(
        UsageError,
        match=r"change: --accumulate_grad_batches 2 \(was 1\); --learning_rate 0.25 \(was 0.5\); leave",
    ):
        opening(resume="last", learning_rate=0.25, accumulate_grad_batches=2, max_epochs=3)


def test_a_typed_option_is_never_ignored(opening: _Opening) -> None:
    """Also where its value is the default of the command."""
    opening(batch_size=8, learning_rate=0.5, max_steps=5)
    line = CommandLine(given={"learning_rate", "resume"})
    with (
        running(line),
        pytest.raises(UsageError, match=r"change: --learning_rate 0.001 \(was 0.5\); leave"),
    ):
        opening(resume="last", learning_rate=0.001)
    with running(CommandLine(given={"max_steps", "resume"})):
        assert opening(resume="last", max_steps=-1).arguments.max_steps == -1
    with running(CommandLine(given={"resume"})):
        assert opening(resume="last").arguments.batch_size == 8


def test_paths_of_the_run_begin_where_it_was_started(
    opening: _Opening, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "model").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    directory = opening(model_path="model", tokenizer_path="gpt2").directory
    monkeypatch.chdir(tmp_path)
    again = opening(resume=str(directory)).arguments
    assert (again.model_path, again.tokenizer_path) == (str(tmp_path / "here/model"), "gpt2")
    assert opening(resume=str(directory), model_path="here/model").directory == directory
    with pytest.raises(UsageError, match="--model_path model"):
        opening(resume=str(directory), model_path="model")


def test_classes_of_the_run_are_typed_again(opening: _Opening) -> None:
    file = opening().directory / "arguments.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"task": "of_a_stranger.Task"}))
    with pytest.raises(UsageError, match=r"type --task of_a_stranger\.Task"):
        opening(resume="last")
    own = {"data_class": "of_a_stranger.Data"}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    with pytest.raises(UsageError, match="resume it with fst run_experiment too"):
        opening(resume="last")


def test_a_checkpoint_of_another_training_is_passed_over(
    opening: _Opening, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = opening(), opening()
    for experiment, step in ((first, 3), (first, 4), (second, 9)):
        opening.save(experiment, step)
    mine, theirs = (one.directory / "checkpoints" / "last.ckpt" for one in (first, second))
    shutil.copyfile(theirs, mine)
    resumed = opening(resume=str(first.directory))
    assert resumed.checkpoint is not None
    assert resumed.checkpoint.step == 3
    assert "it is a checkpoint of another training" in caplog.text
    for name in ("last.ckpt", "previous.ckpt"):
        shutil.copyfile(theirs, mine.with_name(name))
    with pytest.raises(
        TrainingError, match=r"previous.ckpt: it is a checkpoint of another training"
    ):
        opening(resume=str(first.directory))


def test_a_checkpoint_from_before_there_were_ids_is_accepted(opening: _Opening) -> None:
    first = opening()
    opening.save(dataclasses.replace(first, id=""), 3, has_id=False)
    (first.directory / "experiment.json").unlink()
    resumed = opening(resume="last")
    assert resumed.checkpoint is not None
    assert resumed.id
    assert json.loads((first.directory / "experiment.json").read_text())["id"] == resumed.id


def test_a_batch_stays_what_it_is_until_a_checkpoint_tells_it(opening: _Opening) -> None:
    """One of an older version tells the processes alone, and --batch_size follows another number."""
    first = opening(batch_size=8)
    opening.save(first, 3)
    for _ in range(2):
        resumed = opening(resume="last", batch_size=4)
        assert resumed.arguments.batch_size == 4
        assert resumed.checkpoint is not None
        assert resumed.checkpoint.rows_per_batch == 8


def test_a_refused_training_leaves_no_version(opening: _Opening) -> None:
    arguments = TrainArguments(
        dataset_dir=opening.dataset.directory, experiments_root=opening.root, experiment_name="x"
    )
    with (
        pytest.raises(RuntimeError),
        open_experiment(arguments, opening.dataset) as experiment,
    ):
        (experiment.directory / "events.out.tfevents.1").touch()
        raise RuntimeError
    assert not (opening.root / "x").exists()


def test_limits_may_be_extended_and_stay_so(
    opening: _Opening, caplog: pytest.LogCaptureFixture
) -> None:
    opening(max_steps=5)
    with caplog.at_level(logging.INFO):
        assert opening(resume="last", max_steps=9).arguments.max_steps == 9
    assert "--max_steps is now 9; it was 5" in caplog.messages
    assert opening(resume="last").arguments.max_steps == 9


def test_what_was_found_is_not_in_the_way_of_the_same_command(opening: _Opening) -> None:
    first = opening(find_learning_rate=True)
    file = first.directory / "arguments.json"
    found = json.loads(file.read_text()) | {"learning_rate": 0.01, "find_learning_rate": False}
    file.write_text(json.dumps(found))
    resumed = opening(resume="last", find_learning_rate=True, learning_rate=0.5)
    assert resumed.arguments.learning_rate == 0.01
    assert not resumed.arguments.find_learning_rate


def test_a_finished_training_is_only_gone_on_with_under_other_limits(opening: _Opening) -> None:
    first = opening(max_steps=5)
    opening.save(first, 5)
    (first.directory / "summary.json").write_text("{}")
    assert opening(resume="last").is_finished
    assert (first.directory / "summary.json").is_file()
    assert not opening(resume="last", max_steps=9).is_finished
    assert not (first.directory / "summary.json").exists()


def test_nothing_to_resume_is_said(opening: _Opening) -> None:
    with pytest.raises(UsageError, match="--resume last: there is no experiment in"):
        opening(resume="last")
    with pytest.raises(UsageError, match=r"--resume must be last, auto or an experiment directory"):
        opening(resume=str(opening.root))


def test_another_dataset_is_refused(opening: _Opening) -> None:
    first = opening()
    file = first.directory / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"number_of_train_tokens": 1}))
    with pytest.raises(DatasetError, match="is not the dataset that"):
        opening(resume="last")


def test_options_of_another_version_are_refused(opening: _Opening) -> None:
    file = opening().directory / "arguments.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"magic": True}))
    with pytest.raises(InputError, match="written by another version of fst"):
        opening(resume="last")


def test_two_processes_cannot_go_on_with_one_training(opening: _Opening) -> None:
    opening()
    arguments = TrainArguments(
        dataset_dir=opening.dataset.directory, experiments_root=opening.root, resume="last"
    )
    with (
        open_experiment(arguments, opening.dataset),
        pytest.raises(UsageError, match="another process is training in"),
    ):
        opening(resume="last")
    opening(resume="last")


@pytest.mark.parametrize(
    ("validation_is_due", "kept"), [(True, [1, 2]), (False, [1, 2, 3])], ids=["before", "after"]
)
def test_what_comes_after_the_checkpoint_is_forgotten(
    *, validation_is_due: bool, kept: list[int], opening: _Opening
) -> None:
    first = opening()
    opening.save(first, 3, validation_is_due=validation_is_due)
    generated = first.directory / "generated.jsonl"
    generated.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 4)))
    partial = first.directory / "checkpoints" / ".last.ckpt.partial-1"
    partial.touch()
    resumed = opening(resume="last")
    assert resumed.first_repeated_step == kept[-1] + 1
    lines = generated.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == kept
    assert not partial.exists()


def test_a_damaged_checkpoint_is_set_aside(
    opening: _Opening, caplog: pytest.LogCaptureFixture
) -> None:
    first = opening()
    for step in (3, 4):
        last = opening.save(first, step)
    last.write_bytes(last.read_bytes()[:-100])
    resumed = opening(resume="last")
    assert resumed.checkpoint is not None
    assert resumed.checkpoint.step == 3
    assert f"{last} cannot be used" in caplog.text
    assert last.with_name("last.ckpt.damaged").is_file()
    again = opening(resume="last")
    assert again.checkpoint is not None
    assert (again.checkpoint.path, again.checkpoint.step) == (last, 3)
