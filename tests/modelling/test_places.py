"""Adapter directories in place of models: opened on their base, or refused in one sentence."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from full_stack_transformer.arguments.models import (
    EvaluateArguments,
    MergeArguments,
    QuantizeArguments,
)
from full_stack_transformer.arguments.serving import ServeArguments, TelegramBotArguments
from full_stack_transformer.errors import FullStackTransformerError, ModelError, UsageError
from full_stack_transformer.evaluation.run import measured
from full_stack_transformer.first_checks import check_first
from full_stack_transformer.generation.text_generator import TextGenerator
from full_stack_transformer.model_sources.names import with_imported_models
from full_stack_transformer.modelling.merging import main as merge
from full_stack_transformer.modelling.places import IMPORTED_KEY, find_model
from full_stack_transformer.serving.workers.opening import OpeningOptions, open_served
from full_stack_transformer.storage import write_json
from full_stack_transformer.telegram import run as telegram
from tests.generation.small_adapters import write_adapter

# PEFT asks transformers by a name that will go.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def experiment(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training of an adapter leaves, with a description and no tokenizer."""
    directory = tmp_path_factory.mktemp("experiments") / "tuned" / "0"
    backbone = AutoModelForCausalLM.from_pretrained(model_dir)
    write_adapter(directory / "adapter", backbone, base_model_name_or_path=str(model_dir))
    write_json(directory / "adapter" / "description.json", {"step": 7, "task": "sft"})
    return directory


@pytest.fixture(scope="module")
def merged(experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("merged") / "model"
    return merge(MergeArguments(experiment, output_dir=target))


def _text(path: Path, **options: Any) -> str:
    generator = TextGenerator.open(path, device="cpu", weights_dtype="float32", **options)
    return generator.generate("The reader", max_new_tokens=40, temperature=1, seed=3)[0]


def test_an_adapter_answers_as_the_merged_model(
    experiment: Path, merged: Path, model_dir: Path
) -> None:
    assert _text(experiment) == _text(experiment / "adapter") == _text(merged) != _text(model_dir)
    served = open_served(None, experiment, OpeningOptions("cpu", 1, "float32", None))
    assert (served.name, served.facts.step, served.facts.task) == ("tuned/0", 7, "causal_lm")


def test_an_adapter_is_evaluated_as_the_merged_model(
    experiment: Path, merged: Path, model_dir: Path, dataset_dir: Path
) -> None:
    found, expected, base = (
        measured(EvaluateArguments(path, dataset_dir, device="cpu"))["loss"]
        for path in (experiment, merged, model_dir)
    )
    assert found == pytest.approx(expected, abs=1e-5)
    assert abs(found - base) > 0.01


def test_the_base_is_named_by_hand_or_was_imported(
    experiment: Path, merged: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = _named(experiment, tmp_path / "moved", "/home/else/base")
    assert _text(moved, base=str(model_dir)) == _text(merged)
    monkeypatch.chdir(tmp_path)
    imported = tmp_path / "data" / "models" / "base"
    imported.mkdir(parents=True)
    for file in model_dir.iterdir():
        (imported / file.name).write_bytes(file.read_bytes())
    write_json(imported / "description.json", {IMPORTED_KEY: "makers/base"})
    of_hub = _named(experiment, tmp_path / "of_hub", "makers/base")
    options = with_imported_models(ServeArguments(of_hub, device="cpu", port=0))
    check_first(options)
    assert find_model(options.model).directory == Path("data/models/base")
    assert _text(of_hub) == _text(merged)


def _named(experiment: Path, directory: Path, base: str | None) -> Path:
    """A copy of an adapter that names another base."""
    directory.mkdir()
    for file in (experiment / "adapter").iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    content = json.loads((directory / "adapter_config.json").read_text())
    content["base_model_name_or_path"] = base
    (directory / "adapter_config.json").write_text(json.dumps(content))
    return directory


def test_a_base_that_is_not_here_is_one_sentence(
    experiment: Path, model_dir: Path, tmp_path: Path
) -> None:
    gone = _named(experiment, tmp_path / "gone", "/home/else/base")
    nobody = _named(experiment, tmp_path / "nobody", None)
    doubled = _named(experiment, tmp_path / "doubled", str(experiment))
    cases: list[tuple[Any, type[FullStackTransformerError], str]] = [
        (ServeArguments(gone, port=0), ModelError, "trained on /home/else/base, which is not here"),
        (TelegramBotArguments(checkpoint=gone), ModelError, "name the directory of that model"),
        (EvaluateArguments(nobody, model_dir), ModelError, "names no base_model_name_or_path"),
        (ServeArguments(doubled, port=0), ModelError, "is an adapter itself; merge it first"),
        (ServeArguments(gone, base="x", port=0), ModelError, "--base names x, which is not here"),
        (ServeArguments(model_dir, base="x", port=0), UsageError, "--base is for adapters"),
        (QuantizeArguments(gone), ModelError, "fst merge"),
        (ServeArguments(model_dir, more_models=(f"a={gone}",), port=0), ModelError, "not here"),
    ]
    for options, kind, words in cases:
        with pytest.raises(kind, match=words):
            check_first(options)


def test_the_bot_starts_its_service_with_the_base(
    experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    async def start(command: list[str]) -> Any:
        commands.append(command)
        raise ModelError("enough")

    monkeypatch.setattr(telegram, "_start_service", start)

    async def enter() -> None:
        async with telegram.own_service(experiment, "cpu", base="somewhere"):
            pass

    with pytest.raises(ModelError, match="enough"):
        asyncio.run(enter())
    assert commands[0][3:7] == ["serve", str(experiment), "--base", "somewhere"]
