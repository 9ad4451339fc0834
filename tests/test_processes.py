"""Which process this is, by what the launchers leave in the environment."""

import pytest

from full_stack_transformer.processes import Launch, is_main_process, launch

# https://slurm.schedmd.com/sbatch.html and srun.html, "output environment variables".
_BATCH = {"SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "train"}
_STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}


@pytest.fixture(autouse=True)
def _nothing_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_RANK", "NODE_RANK", *_BATCH, *_STEP):
        monkeypatch.delenv(name, raising=False)


def test_a_batch_script_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the tasks of its job, which only srun starts."""
    for name, value in _BATCH.items():
        monkeypatch.setenv(name, value)
    assert launch() is None
    assert is_main_process()


def test_a_step_of_srun_is_one_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**_BATCH, **_STEP, "SLURM_PROCID": "3"}.items():
        monkeypatch.setenv(name, value)
    found = launch()
    assert found == Launch(rank=3, num_processes=4, num_on_this_machine=2, is_torchrun=False)
    assert not is_main_process()
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    assert launch() is None, "somebody types in a shell"
