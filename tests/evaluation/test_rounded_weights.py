"""The loss through a runner is that of the backbone, and rounding changes it as little as is said."""

import json
import math
from pathlib import Path

import pytest

from full_stack_transformer.datasets.corpus import DatasetDirectory
from full_stack_transformer.evaluation.log_likelihoods import measure_rounded_weights
from full_stack_transformer.evaluation.run import measure_corpus
from full_stack_transformer.generation.runners.native.decoder import WeightsDtype, why_not_native
from full_stack_transformer.modelling.model_directory import open_model
from full_stack_transformer.tasks.causal_lm import CausalLm, CausalLmOptions
from tests.conftest import RunFst


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_change_is_that_of_the_perplexity(
    model_dir: Path, dataset: DatasetDirectory, dtype: WeightsDtype
) -> None:
    model = open_model(model_dir, device="cpu")
    if dtype == "int8" and (problem := why_not_native(model.backbone)):
        pytest.skip(f"no C++ decoder here: {problem}")
    task = CausalLm(model.tokenizer, CausalLmOptions())
    task.read_dataset(dataset)
    exact, _ = measure_corpus(task, model.backbone, dataset.valid, batch_size=8)
    rounded = measure_rounded_weights(model.backbone, dataset.valid, exact, dtype)
    assert rounded.perplexity == pytest.approx(math.exp(rounded.loss))
    change = rounded.relative_perplexity_change
    assert change == pytest.approx(rounded.perplexity / math.exp(exact) - 1, abs=1e-6)
    assert abs(change) < (1e-4 if dtype == "float32" else 0.02)


def test_the_command_prints_it_beside_the_exact_figures(
    run_fst: RunFst, model_dir: Path, dataset_dir: Path
) -> None:
    words = ("evaluate", model_dir, dataset_dir, "--device", "cpu", "--weights_dtype", "bfloat16")
    done = run_fst(*words)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    rounded = figures["rounded_weights"]
    assert rounded["weights_dtype"] == "bfloat16"
    assert rounded["perplexity"] == pytest.approx(figures["perplexity"], rel=0.02)
    assert "with bfloat16 weights, keys and values in bfloat16: perplexity" in done.stderr
