"""`fst evaluate --conversations FILE`: the model's own answers, beside those that a file expects.

    conversation ──> messages before its last answer ──model──> an answer, greedy, until it ends
                     its last answer ─────────────────────────> is it the same?

An answer is right if it equals the expected one after SQuAD's normalisation (Rajpurkar et al. 2016): without
case, punctuation, the articles a, an and the, and with single spaces.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from full_stack_transformer.arguments.models import EvaluateArguments
from full_stack_transformer.conversations.files import (
    RefusedRows,
    find_files,
    read_conversations,
)
from full_stack_transformer.conversations.messages import ANSWERER, Conversation
from full_stack_transformer.errors import RowError
from full_stack_transformer.evaluation.bootstrap import bootstrap_intervals
from full_stack_transformer.evaluation.interleaving import interleaved
from full_stack_transformer.generation.requests import Piece
from full_stack_transformer.generation.text_generator import TextGenerator
from full_stack_transformer.metrics.texts import normalized_answer
from full_stack_transformer.storage import make_directories, write_text

logger = logging.getLogger(__name__)

ANSWERS_FILE_NAME = "answers.jsonl"
_SECONDS_BETWEEN_LINES = 30.0


@dataclass(frozen=True)
class Answer:
    """What a model answered, and what was expected."""

    conversation: Conversation
    expected: str
    text: str
    ended: bool
    """By itself, and not at the limit of tokens."""

    @property
    def is_right(self) -> bool:
        """Whether it equals the expected one after normalisation."""
        return normalized_answer(self.text) == normalized_answer(self.expected)

    @property
    def contains_it(self) -> bool:
        """Whether the words of the expected one occur in it, in a row."""
        return f" {normalized_answer(self.expected)} " in f" {normalized_answer(self.text)} "

    def as_json(self) -> dict[str, Any]:
        """A conversation as files have them, with the model's answer as the last one."""
        messages = [*self.conversation.messages[:-1], {"role": ANSWERER, "content": self.text}]
        kind = {"kind": self.conversation.kind} if self.conversation.kind else {}
        facts = {"expected": self.expected, "is_right": self.is_right, "ended": self.ended}
        return {"messages": messages, **kind, **facts}


def evaluate_answers(arguments: EvaluateArguments) -> dict[str, Any]:
    """What `fst evaluate` prints of the answers of a model, or of two.

    Raises:
        RowError: a conversation does not end with an answer of text.
        DocumentsError: a file cannot be read.
        ModelError: there is no model.
    """
    asked = read_questions(arguments.conversations)
    found = _figures_of(arguments, asked, ANSWERS_FILE_NAME)
    if arguments.compare is None:
        return found
    base = replace(arguments, model=arguments.compare, base=None)
    both = {"base": _figures_of(base, asked, f"base_{ANSWERS_FILE_NAME}"), "tuned": found}
    logger.info("%s", _table(both))
    return both


def _figures_of(
    arguments: EvaluateArguments, asked: Sequence[Conversation], file_name: str
) -> dict[str, Any]:
    """What one model answers; keeps its answers in --output_dir."""
    started = time.perf_counter()
    generator = TextGenerator.open(
        arguments.model,
        base=arguments.base,
        device=arguments.device,
        weights_dtype=arguments.weights_dtype,
        kv_dtype=arguments.kv_dtype,
        num_slots=arguments.batch_size,
    )
    answers = answer(
        generator,
        asked,
        at_once=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
    )
    seconds = time.perf_counter() - started
    logger.info("%s: %s answers in %.1f s", arguments.model, f"{len(answers):,}", seconds)
    if arguments.output_dir is not None:
        make_directories(arguments.output_dir)
        lines = [json.dumps(one.as_json(), ensure_ascii=False) for one in answers]
        write_text(arguments.output_dir / file_name, "".join(f"{line}\n" for line in lines))
    return figures(answers, num_resamples=arguments.num_resamples)


def read_questions(paths: Sequence[Path]) -> list[Conversation]:
    """Conversations that end with an answer of text.

    Raises:
        RowError: one does not, or there is none.
        DocumentsError: a file cannot be read.
    """
    found = [
        conversation
        for path in find_files(paths, "--conversations")
        for conversation in read_conversations(path, RefusedRows())
    ]
    for one in found:
        last = one.messages[-1]
        if last["role"] != ANSWERER or not last["content"].strip() or len(one.messages) < 2:
            raise RowError(
                f"{one.place}: the last of two or more messages should be the {ANSWERER}'s, the answer that "
                f"is expected; found the role {last['role']!r}"
            )
    if not found:
        raise RowError(f"--conversations {' '.join(map(str, paths))}: there is no conversation")
    return found


def answer(
    generator: TextGenerator,
    asked: Sequence[Conversation],
    *,
    at_once: int,
    max_new_tokens: int,
    temperature: float = 0.0,
) -> list[Answer]:
    """The answer to the messages before the last one of each conversation, several at once.

    Raises:
        RequestError: a conversation does not fit into the model's context, or its template refuses it.
    """

    def start(conversation: Conversation) -> Iterator[tuple[int, Piece]]:
        messages: Any = conversation.messages[:-1]
        prompt_ids = generator.template.encode(messages, generator.model.tokenizer)
        return generator.pieces(
            prompt_ids,
            is_chat=True,
            clips=True,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=0,
        )

    texts = [""] * len(asked)
    reasons: list[str | None] = [None] * len(asked)
    told = time.monotonic()
    starts = [partial(start, one) for one in asked]
    for index, (_, piece) in interleaved(starts, at_once=at_once):
        texts[index] += piece.text
        reasons[index] = piece.finish_reason
        if time.monotonic() - told > _SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            logger.info("%s of %s answers", f"{sum(map(bool, reasons)):,}", f"{len(asked):,}")
    return [
        Answer(one, one.messages[-1]["content"], text.strip(), reasons[index] == "stop")
        for index, (one, text) in enumerate(zip(asked, texts, strict=True))
    ]


def figures(answers: Sequence[Answer], *, num_resamples: int) -> dict[str, Any]:
    """Shares of right answers, and of those that ended by themselves; also for each kind of conversation."""
    content: dict[str, Any] = {"number_of_answers": len(answers), **_shares(answers)}
    if num_resamples:
        right = np.array([one.is_right for one in answers], dtype=float)

        def exact_match(indices: NDArray[np.int64] | slice) -> dict[str, float]:
            return {"exact_match": float(right[indices].mean())}

        found = bootstrap_intervals(exact_match, len(answers), num_resamples=num_resamples, seed=0)
        content["intervals"] = {name: asdict(ends) for name, ends in found.items()}
    kinds = sorted({one.conversation.kind for one in answers} - {""})
    if kinds:
        content["kinds"] = {
            kind: {"number_of_answers": len(of_kind), **_shares(of_kind)}
            for kind in kinds
            for of_kind in [[one for one in answers if one.conversation.kind == kind]]
        }
    return content


def _shares(answers: Sequence[Answer]) -> dict[str, float]:
    return {
        "exact_match": sum(one.is_right for one in answers) / len(answers),
        "contains_expected": sum(one.contains_it for one in answers) / len(answers),
        "ended_by_itself": sum(one.ended for one in answers) / len(answers),
    }


def _table(both: Mapping[str, dict[str, Any]]) -> str:
    """The shares of two models, side by side."""
    lines = [f"{'':<30}{'answers':>9}{'base':>9}{'tuned':>9}"]

    def add(name: str, key: str, found: Sequence[Mapping[str, Any]]) -> None:
        shares = "".join(f"{100 * one[key]:7.1f} %" for one in found)
        lines.append(f"{name:<30}{found[0]['number_of_answers']:9,}{shares}")

    for key in ("exact_match", "contains_expected", "ended_by_itself"):
        add(key.replace("_", " "), key, list(both.values()))
    for kind in next(iter(both.values())).get("kinds", {}):
        of_kind = [one["kinds"][kind] for one in both.values()]
        add(f"  exact match of {kind}", "exact_match", of_kind)
    return "\n".join(lines)
