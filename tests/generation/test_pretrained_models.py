"""Pretrained models are asked as their own tokenizers say, and compute as transformers does."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import Sequence, TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from full_stack_transformer.arguments.models import EvaluateArguments
from full_stack_transformer.datasets.corpus import DatasetDirectory
from full_stack_transformer.evaluation.run import measured
from full_stack_transformer.generation.text_generator import TextGenerator
from full_stack_transformer.modelling.model_directory import open_model
from full_stack_transformer.tokenization.document_tokenizer import open_saved_tokenizer
from tests.serving.tiny_model import make_tiny_model

TEXT = "the small reader"
# What tokenizers of families put around a text.
FORMS = {
    "nothing, as SmolLM2": None,
    "a begin token, as Llama": "[DOC_START] $A",
    "two tokens, as ChatGLM": "[DOC_START] [PAD] $A",
    "both ends, as a text-to-text model": "[DOC_START] $A [DOC_END]",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("pretrained"))


def as_pretrained(trained: Path, target: Path, form: str | None) -> Path:
    """The model as if it came from elsewhere: without a word of who made it."""
    shutil.copytree(trained, target)
    config = json.loads((target / "tokenizer_config.json").read_text())
    config = {key: value for key, value in config.items() if "full_stack" not in key}
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    (target / "description.json").unlink()
    backend = Tokenizer.from_file(str(target / "tokenizer.json"))
    names = [name for name in ("[DOC_START]", "[DOC_END]", "[PAD]") if name in (form or "")]
    backend.post_processor = (
        TemplateProcessing(single=form, special_tokens=[(n, backend.token_to_id(n)) for n in names])
        if form
        else Sequence([])
    )
    backend.save(str(target / "tokenizer.json"))
    return target


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_text_begins_as_its_tokenizer_says(
    trained: Path, tmp_path: Path, form: str | None
) -> None:
    directory = as_pretrained(trained, tmp_path / "model", form)
    tokenizer, theirs = open_saved_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    expected = theirs(TEXT)["input_ids"]
    if expected[-1] == tokenizer.end_id:  # a prompt has no end
        expected = expected[:-1]
    assert tokenizer.encode_prompt(TEXT) == expected
    assert tokenizer.encode_prompt("") == tokenizer.prefix_ids or [tokenizer.begin_id]
    # What was made here frames a text as its documents were.
    assert open_saved_tokenizer(trained).prefix_ids == [tokenizer.begin_id]


def test_without_a_tokenizer_json_the_configuration_says_it(trained: Path, tmp_path: Path) -> None:
    """As OPT's and GPT-2's directories are."""
    model = json.loads((trained / "tokenizer.json").read_text())
    vocabulary = model["model"]["vocab"] | {
        one["content"]: one["id"] for one in model["added_tokens"]
    }
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    merges = [" ".join(pair) for pair in model["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = {
        "bos_token": "[DOC_START]",
        "eos_token": "[DOC_END]",
        "tokenizer_class": "GPT2Tokenizer",
    }
    for adds in (True, False):
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps(config | {"add_bos_token": adds})
        )
        expected = AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"]
        assert open_saved_tokenizer(tmp_path).encode_prompt(TEXT) == expected


@pytest.mark.parametrize("form", list(FORMS.values())[:2], ids=list(FORMS)[:2])
def test_scores_and_vectors_are_those_of_the_bare_model(
    trained: Path, tmp_path: Path, form: str | None
) -> None:
    directory = as_pretrained(trained, tmp_path / "model", form)
    generator = TextGenerator.open(directory, device="cpu", weights_dtype="float32")
    ids = AutoTokenizer.from_pretrained(directory)(TEXT)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        output = model(torch.tensor([ids]), output_hidden_states=True)
    expected = output.logits[0].log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    scored = generator.score(TEXT)
    found = [token.log_probability for token in scored.tokens]
    assert found == pytest.approx(expected.tolist(), abs=1e-3)
    assert scored.start + "".join(token.text for token in scored.tokens) == TEXT
    states = output.hidden_states[-1][0][0 if form is None else 1 :]
    assert generator.embed([TEXT])[0] == pytest.approx(states.mean(0).numpy(), abs=1e-3)
    for short in ("", "t"):
        assert (
            generator.score(short).start
            + "".join(token.text for token in generator.score(short).tokens)
            == short
        )
        assert len(generator.embed([short])[0]) == 64


def test_the_harness_gets_what_its_own_model_gets(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from full_stack_transformer.evaluation.harness_model import HarnessModel

    directory = as_pretrained(trained, tmp_path / "model", None)
    ours = HarnessModel(open_model(directory, device="cpu"), num_slots=2, weights_dtype="float32")
    theirs = HFLM(str(directory), device="cpu", dtype="float32", batch_size=1)
    pairs = [("the small", " reader"), ("", "the corpus"), ("the small ", "reader word")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    rolling = [Instance("loglikelihood_rolling", {}, (TEXT,), 0)]
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    assert [one for pair in ours.loglikelihood(requests) for one in pair] == pytest.approx(
        [one for pair in expected for one in pair], abs=1e-3
    )
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(
        theirs.loglikelihood_rolling(rolling, disable_tqdm=True), abs=1e-3
    )


def test_a_dataset_is_measured_as_the_tokenizer_says(
    model_dir: Path, dataset: DatasetDirectory, tmp_path: Path
) -> None:
    """Without the begin token that the model has never seen before a text."""
    directory = as_pretrained(model_dir, tmp_path / "model", None)
    found = measured(
        EvaluateArguments(model=directory, dataset_dir=dataset.directory, device="cpu")
    )
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    begin_id = open_saved_tokenizer(directory).begin_id
    losses: list[float] = []
    for sample in dataset.valid.gather(range(len(dataset.valid))):
        ids = torch.tensor(sample[1:] if sample[0] == begin_id else sample)
        with torch.inference_mode():
            scores = model(ids[None]).logits[0, :-1]
        losses += torch.nn.functional.cross_entropy(scores, ids[1:], reduction="none").tolist()
    assert found["num_target_tokens"] == len(losses)
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
