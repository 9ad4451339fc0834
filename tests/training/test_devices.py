"""Several processes train as one does."""

import json
from pathlib import Path

import pytest

from full_stack_transformer.errors import UsageError
from full_stack_transformer.training import metric_names
from tests.conftest import RunFst
from tests.training.training_here import (
    GPT2_WITH_DROPOUT,
    TrainingHere,
    checkpoint_of,
    curve_of,
)


def test_two_processes_give_the_curve_of_one_with_the_same_global_batch(
    dataset_dir: Path, run_fst: RunFst, tmp_path: Path
) -> None:
    """Within 1e-5 in fp32: the sums of a gradient have another order."""
    without_dropout = {name: 0.0 for name in GPT2_WITH_DROPOUT if name.endswith("_pdrop")}
    config = tmp_path / "without_dropout.json"
    config.write_text(json.dumps(GPT2_WITH_DROPOUT | without_dropout))
    done = run_fst(
        *("train", "--dataset_dir", dataset_dir, "--experiments_root", tmp_path),
        *("--experiment_name", "two", "--model_config", config),
        *("--accelerator", "cpu", "--devices", "2", "--strategy", "ddp", "--precision", "32"),
        *("--max_epochs", "-1", "--max_steps", "6", "--val_check_interval", "4"),
        *("--batch_size", "4", "--num_warmup_steps", "2", "--learning_rate", "5e-3"),
        *("--num_generated_samples", "0", "--log_every_n_steps", "1", "--compile", "never"),
        *("--replay", f"{dataset_dir}:0.2"),
    )
    assert done.returncode == 0, done.stderr
    two = tmp_path / "two" / "0"
    assert done.stdout == f"{two}\n", "one process speaks for both"
    assert done.stderr.count("step 4: validation loss") == 1
    assert checkpoint_of(two)["world_size"] == 2

    training = TrainingHere(dataset_dir, tmp_path)
    one = training.to_the_end(
        model_config=str(config),
        batch_size=8,
        max_steps=6,
        val_check_interval=4.0,
        replay=(f"{dataset_dir}:0.2",),
    )
    for name in (
        *(metric_names.TRAIN_LOSS, metric_names.TRAIN_REPLAY_LOSS),
        *(metric_names.VALID_LOSS, metric_names.GRADIENT_NORM),
    ):
        expected, found = curve_of(one, name), curve_of(two, name)
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx(
            [value for _, value in expected], abs=1e-5
        )
    with pytest.raises(UsageError, match="1 with --batch_size 5 would read 5: pass --batch_size 8"):
        training(resume=str(two), model_config=str(config), batch_size=5, max_steps=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "zigzag"}, "--strategy zigzag: .*"),
        ({"accelerator": "warp"}, "--accelerator must be .*warp"),
        ({"devices": "many"}, "--devices must be .*many"),
        ({"devices": "0"}, "--devices 0"),
        ({"devices": "2", "find_learning_rate": True}, "--find_learning_rate need a single device"),
    ],
)
def test_impossible_devices_are_refused(
    options: dict[str, object], message: str, dataset_dir: Path, tmp_path: Path
) -> None:
    training = TrainingHere(dataset_dir, tmp_path)
    with pytest.raises(UsageError, match=message):
        training(max_steps=1, **options)
    assert not (tmp_path / "experiment").exists(), "no version of what never began"
