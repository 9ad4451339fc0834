"""`fst evaluate MODEL --harness TASK.yaml`: lm-evaluation-harness on a model, with its own engine, offline.

    TASK.yaml ──lm-eval──> contexts, continuations ──our runner──> log-likelihoods ──lm-eval──> metrics
                           prompts                 ──our engine──> texts

The task file is the user's and local, and so are its data: paths in it are relative to its directory.
Nothing is fetched. lm-evaluation-harness is an extra, imported here and in `harness_model` only.
"""

import contextlib
import importlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from full_stack_transformer.errors import InputError, MissingExtraError, install_command
from full_stack_transformer.generation.runners.native.decoder import KvDtype, WeightsDtype
from full_stack_transformer.modelling.model_directory import open_model

logger = logging.getLogger(__name__)

PACKAGE = "lm_eval"
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def run_harness(
    model_path: Path,
    task_file: Path,
    *,
    base: str | None = None,
    device: str,
    weights_dtype: WeightsDtype,
    num_slots: int,
    kv_dtype: Literal["auto"] | KvDtype = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """The metrics of each task by name, with their standard errors, as lm-eval gives them.

    Args:
        model_path: a causal language model.
        task_file: YAML of lm-evaluation-harness.
        base: of an adapter, if it is not the one that it names.
        device: where to compute.
        weights_dtype: what to compute with.
        num_slots: texts computed at once.
        kv_dtype: of keys and values.
        seed: of few-shot examples.

    Raises:
        MissingExtraError: lm-evaluation-harness is not installed.
        InputError: the task file cannot be used.
        ModelError: the model cannot be opened.
    """
    if not task_file.is_file():
        raise InputError(f"--harness should name a task file of lm-evaluation-harness: {task_file}")
    with _offline():
        _import_harness()
        harness_model = importlib.import_module("full_stack_transformer.evaluation.harness_model")
        evaluator = importlib.import_module("lm_eval.evaluator")
        tasks = importlib.import_module("lm_eval.tasks")
        model = open_model(model_path, base=base, device=device, weights_dtype=weights_dtype)
        adapter = harness_model.HarnessModel(
            model, num_slots=num_slots, weights_dtype=weights_dtype, kv_dtype=kv_dtype
        )
        file = task_file.resolve()
        with contextlib.chdir(file.parent):
            try:
                found = evaluator.simple_evaluate(
                    model=adapter,
                    tasks=[str(file)],
                    task_manager=tasks.TaskManager(include_defaults=False),
                    log_samples=False,
                    bootstrap_iters=1000,
                    random_seed=seed,
                    numpy_random_seed=seed,
                    torch_random_seed=seed,
                    fewshot_random_seed=seed,
                )
            except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
                raise InputError(
                    f"lm-evaluation-harness cannot run {task_file}: {type(error).__name__}: {error}"
                ) from error
    return {
        name: {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        for name, metrics in found["results"].items()
    }


def _import_harness() -> None:
    try:
        importlib.import_module(PACKAGE)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"--harness needs the package {error.name}, which is not installed; install it with: "
            f"{install_command('harness')}"
        ) from error


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """No network, and no cache that stays: rows are read again each time."""
    with tempfile.TemporaryDirectory() as cache:
        added = {**_OFFLINE, "HF_DATASETS_CACHE": cache}
        before = {name: os.environ.get(name) for name in added}
        os.environ.update(added)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
