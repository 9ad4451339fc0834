"""Whether an engine gives what the model gives here: token ids, greedy tokens, the chat template.

The reference is transformers with fp32 arithmetic, and weights rounded to the type of the export.
"""

import json
import logging
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel as Backbone

from full_stack_transformer.arguments.exporting import ExportArguments
from full_stack_transformer.errors import ModelError, UsageError
from full_stack_transformer.exporting import llama_cpp_worker
from full_stack_transformer.exporting.gguf_tokenizer import Vocabulary
from full_stack_transformer.exporting.hostile_texts import hostile_texts
from full_stack_transformer.exporting.source import Source
from full_stack_transformer.modelling.backbones import context_length

logger = logging.getLogger(__name__)

NUM_NEW_TOKENS = 16
_MAX_PROMPT_TOKENS = 32
_NUM_FRAMED_TEXTS = 100
# Two engines add in different orders: logits this near are the same (their spread is about 10).
_TIE = 2e-3
# Engines compute with activations of 16 bits beside weights of 16 bits.
_TIES = {"float32": _TIE, "float16": 0.05, "bfloat16": 0.25}
_ROUNDED = ("q8_0", "q4_0")


@dataclass(frozen=True)
class Questions:
    """What an engine is asked."""

    texts: list[str]
    prompts: list[list[int]]


def questions_for(
    source: Source, arguments: ExportArguments, *, normalized: bool = False
) -> Questions:
    """Hostile texts, and the first tokens of some of them as prompts.

    Args:
        source: the model.
        arguments: how many.
        normalized: bring the texts into Unicode's form NFC first.
    """
    tokenizer = source.tokenizer
    texts = hostile_texts(arguments.num_check_texts, tokenizer.control_tokens)
    if normalized:
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    longest = min(_MAX_PROMPT_TOKENS, context_length(source.backbone.config) - NUM_NEW_TOKENS)
    if longest < 1:
        raise UsageError(
            f"the model's context of {longest + NUM_NEW_TOKENS} tokens is too short for the check; pass "
            "--no_check"
        )
    prompts = [
        tokenizer.encode_after_begin(text)[:longest]
        for text in hostile_texts(arguments.num_check_prompts, tokenizer.control_tokens, seed=1)
    ]
    return Questions(texts, prompts)


# ---------------------------------------------------------------------- comparisons


def compare_ids(
    source: Source, texts: Sequence[str], found: Sequence[Sequence[int]], engine: str
) -> str:
    """A line of the report.

    Raises:
        ModelError: the ids of a text differ.
    """
    wrong = []
    for text, ids in zip(texts, found, strict=True):
        expected = source.tokenizer.encode_text(text)
        if list(ids) != expected:
            wrong.append((text, expected, list(ids)))
    if wrong:
        text, expected, ids = min(wrong, key=lambda one: len(one[0]))
        raise ModelError(
            f"{engine} encodes {len(wrong):,} of {len(texts):,} texts differently: {text!r:.100} gives "
            f"{ids[:12]}, here {expected[:12]}; the file is not written (--no_check writes it)"
        )
    return f"token ids of {len(texts):,} texts are equal"


def compare_continuations(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    found: Sequence[Sequence[int]],
    dtype: str,
    engine: str,
) -> str:
    """A line of the report: greedy tokens are those of the largest logits.

    All tokens of a continuation are looked at in one pass: each must be the best one after those before it,
    which is the same as decoding again, and shows where two tokens are equally good.

    Raises:
        ModelError: a token is another one, with full weights.
    """
    num_equal = num_ties = num_tokens = 0
    worst = 0.0
    for prompt, tokens in zip(prompts, found, strict=True):
        ids = torch.tensor([[*prompt, *tokens]])
        with torch.inference_mode():
            logits = backbone(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        lacks = logits.max(dim=1).values - chosen
        best = logits.argmax(dim=1).tolist()
        num_tokens += len(tokens)
        num_equal += sum(map(int.__eq__, best, tokens))
        num_ties += int(((lacks > 0) & (lacks <= _TIES.get(dtype, 0.0))).sum())
        worst = max(worst, float(lacks.max()))
    if dtype in _ROUNDED:
        return f"{num_equal / num_tokens:.1%} of {num_tokens:,} greedy tokens are those of the full weights"
    if num_equal + num_ties < num_tokens:
        raise ModelError(
            f"{engine} chooses {num_tokens - num_equal - num_ties:,} of {num_tokens:,} greedy tokens that "
            f"are not the best here (by up to {worst:.3g} in their logits); the file is not written "
            "(--no_check writes it)"
        )
    ties = f", {num_ties} of them tied within {worst:.1g}" if num_ties else ""
    return f"{num_tokens:,} greedy tokens after {len(prompts)} prompts are equal{ties}"


def compare_templates(source: Source, found: str | None, engine: str) -> str:
    """A line of the report.

    Raises:
        ModelError: the chat template differs.
    """
    expected = None if source.template.is_plain else source.template.source
    if found != expected:
        raise ModelError(f"{engine} reads another chat template than that of {source.name}")
    if expected is None:
        return "there is no chat template"
    return f"the {len(expected.encode()):,} bytes of the chat template are equal"


def in_type(backbone: Backbone, dtype: str) -> Backbone:
    """The backbone with weights rounded to a type of 16 bits, changed in place; it computes in fp32."""
    if dtype in ("float16", "bfloat16"):
        for weight in backbone.parameters():
            if weight.dim() > 1:
                weight.data = weight.data.to(getattr(torch, dtype)).float()
    return backbone


# ---------------------------------------------------------------------- llama.cpp


def check_gguf(
    source: Source, file: Path, vocabulary: Vocabulary, *, dtype: str, arguments: ExportArguments
) -> None:
    """Compare llama.cpp's answers with ours; logs a line each.

    Raises:
        ModelError: they differ, or llama.cpp cannot read the file.
        UsageError: the interpreter of --check_python lacks llama-cpp-python.
    """
    python = _python_with_llama_cpp(arguments)
    if python is None:
        logger.warning(
            "%s is NOT checked: llama-cpp-python is not installed here (pip install llama-cpp-python, or "
            "name an interpreter that has it with --check_python)",
            arguments.output,
        )
        return
    asked = questions_for(source, arguments, normalized=vocabulary.normalizes)
    framed = asked.texts[:_NUM_FRAMED_TEXTS]
    answers = _ask(python, file, asked, framed)
    engine = f"llama.cpp (llama-cpp-python {answers['version']})"
    lines = [compare_ids(source, asked.texts, answers["ids"], engine)]
    for text, ids in zip(framed, answers["framed_ids"], strict=True):
        expected = [*source.tokenizer.prefix_ids, *source.tokenizer.encode_text(text)]
        if ids != expected:
            raise ModelError(
                f"{engine} puts other tokens around {text!r:.60}: {ids[:9]}, here {expected[:9]}"
            )
    backbone = in_type(source.backbone, dtype)
    lines.append(
        compare_continuations(backbone, asked.prompts, answers["continuations"], dtype, engine)
    )
    lines.append(compare_templates(source, answers["template"], engine))
    for line in lines:
        logger.info("checked with %s: %s", engine, line)
    if vocabulary.normalizes:
        logger.warning(
            "llama.cpp does not bring texts into Unicode's form NFC, as this tokenizer does: do it before"
        )


def _python_with_llama_cpp(arguments: ExportArguments) -> str | None:
    python = str(arguments.check_python or sys.executable)
    probe = "import importlib.util as u, sys; sys.exit(u.find_spec('llama_cpp') is None)"
    try:
        code = subprocess.run([python, "-c", probe], check=False).returncode
    except OSError as error:
        raise UsageError(f"--check_python {python} cannot be run: {error.strerror}") from error
    if code and arguments.check_python is not None:
        raise UsageError(f"--check_python {python} has no llama-cpp-python")
    return None if code else python


def _ask(python: str, file: Path, asked: Questions, framed: list[str]) -> dict[str, Any]:
    questions = {
        "file": str(file),
        "texts": asked.texts,
        "framed_texts": framed,
        "prompts": asked.prompts,
        "num_tokens": NUM_NEW_TOKENS,
        "num_threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory(prefix="fst-check-") as place:
        paths = [Path(place, name) for name in ("questions.json", "answers.json")]
        paths[0].write_text(json.dumps(questions), encoding="utf-8")
        done = subprocess.run(
            [python, llama_cpp_worker.__file__, *map(str, paths)],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode or not paths[1].is_file():
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise ModelError(f"llama.cpp cannot read the exported file: {reason}")
        answers: dict[str, Any] = json.loads(paths[1].read_text(encoding="utf-8"))
        return answers
