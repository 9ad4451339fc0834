"""Continuations of held-out texts: the same as one by one, and figures beside the true ones."""

import json
from pathlib import Path

import pytest

from full_stack_transformer.arguments.models import EvaluateArguments
from full_stack_transformer.arguments.sampling import SamplingParameters, as_keywords
from full_stack_transformer.datasets.corpus import DatasetDirectory
from full_stack_transformer.errors import DatasetError
from full_stack_transformer.evaluation.continued_texts import (
    continue_texts,
    evaluate_generation,
)
from full_stack_transformer.evaluation.run import main as evaluate
from full_stack_transformer.generation.text_generator import TextGenerator
from full_stack_transformer.modelling.model_directory import open_model


def test_texts_continued_together_equal_those_continued_alone(model_dir: Path) -> None:
    model = open_model(model_dir, device="cpu")
    generator = TextGenerator(model, num_slots=3)
    sampling = SamplingParameters(max_new_tokens=7, temperature=1, seed=5)
    texts = [f"The reader learns {number} " + "and " * number for number in range(11)]
    prompts = [model.tokenizer.encode_prompt(text) for text in texts]
    alone = [generator.generate(text, **as_keywords(sampling))[0] for text in texts]
    assert continue_texts(generator, prompts, sampling) == alone


def test_the_figures_say_how_the_texts_differ(model_dir: Path, dataset: DatasetDirectory) -> None:
    model = open_model(model_dir, device="cpu")
    found = evaluate_generation(
        model, dataset.valid, num_texts=6, max_new_tokens=12, num_resamples=50
    )
    assert found.num_texts == 6
    assert set(found.intervals) == {
        "bleu",
        "chrf",
        "rouge1",
        "rouge2",
        "rougeL",
        "exact_match",
        "repetition_4",
    }
    for name, interval in found.intervals.items():
        if name not in ("bleu", "chrf"):  # no means: of few texts they may lie outside
            assert interval.low - 1e-9 <= found.figures[name] <= interval.high + 1e-9
    assert 0 < found.figures["expected_distinct_1"] <= 1
    assert json.loads(json.dumps(found.as_json()))["figures"] == found.figures
    again = evaluate_generation(
        model, dataset.valid, num_texts=6, max_new_tokens=12, num_resamples=50
    )
    assert again == found


def test_samples_that_are_too_short_are_refused(model_dir: Path, dataset: DatasetDirectory) -> None:
    class Short:
        def lengths(self) -> object:
            return dataset.valid.lengths() * 0 + 3

    with pytest.raises(DatasetError, match="the longest one has 3"):
        evaluate_generation(
            open_model(model_dir, device="cpu"),
            Short(),  # type: ignore[arg-type]
            num_texts=1,
            max_new_tokens=4,
        )


def test_the_command_prints_them_beside_the_perplexity(
    model_dir: Path, dataset_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(
        EvaluateArguments(model_dir, dataset_dir, generation=3, max_new_tokens=8, device="cpu")
    )
    figures = json.loads(capsys.readouterr().out)
    assert figures["perplexity"] > 1
    assert figures["generation"]["num_texts"] == 3
    assert "bleu" in figures["generation"]["figures"]
