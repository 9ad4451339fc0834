"""Perplexity is the plain mean over all targets, whatever the batch size."""

import json
import math
from pathlib import Path

import pytest
import torch

from full_stack_transformer.datasets.corpus import DatasetDirectory
from full_stack_transformer.evaluation.run import measure_corpus
from full_stack_transformer.modelling.model_directory import open_model
from full_stack_transformer.tasks.causal_lm import CausalLm, CausalLmOptions
from tests.conftest import RunFst


def test_the_figures_equal_one_sample_at_a_time(model_dir: Path, dataset: DatasetDirectory) -> None:
    model = open_model(model_dir, device="cpu")
    task = CausalLm(model.tokenizer, CausalLmOptions())
    task.read_dataset(dataset)
    total, count, num_bytes = 0.0, 0, 0
    for index in range(len(dataset.valid)):
        ids = torch.from_numpy(dataset.valid[index])
        with torch.inference_mode():
            log_probabilities = model.backbone(ids[None]).logits[0].log_softmax(-1)
        total -= float(log_probabilities[torch.arange(len(ids) - 1), ids[1:]].double().sum())
        count += len(ids) - 1
        num_bytes += len(model.tokenizer.decode(ids[1:].tolist()).encode())
    for batch_size in (1, 7, 64):
        found = task.evaluation(
            *measure_corpus(task, model.backbone, dataset.valid, batch_size=batch_size)
        )
        assert found["loss"] == pytest.approx(total / count, rel=1e-6)
        assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
        assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / num_bytes, rel=1e-6)
        assert found["num_target_tokens"] == count


def test_the_command_prints_json(run_fst: RunFst, model_dir: Path, dataset_dir: Path) -> None:
    done = run_fst("evaluate", model_dir, dataset_dir, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))


def test_a_dataset_of_another_tokenizer_is_refused(
    run_fst: RunFst, model_dir: Path, documents_dir: Path, tmp_path: Path
) -> None:
    prepared = run_fst(
        "prepare_dataset",
        *("--documents_train_file", documents_dir / "train.txt"),
        *("--documents_valid_file", documents_dir / "valid.txt"),
        *("--datasets_root", tmp_path, "--dataset_name", "other", "--vocab_size", "270"),
    )
    done = run_fst("evaluate", model_dir, prepared.stdout.strip())
    assert done.returncode == 1
    assert "another tokenizer (270 tokens)" in done.stderr
    assert "Traceback" not in done.stderr
