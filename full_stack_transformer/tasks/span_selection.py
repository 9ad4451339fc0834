"""Which part of a text answers a question, or that none does.

Rows: `question`, `context`, `answers`: [{"text": str, "start": character}], empty where there is none.
Predictions: {"answer": text, "start": character, "end": character, "score": probability}; without an answer
"" from 0 to 0.

A context longer than the model is read in overlapping windows. The mark before the question stands for
"no answer here" (Devlin et al. 2018, section 4.3).
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from pydantic import BaseModel, Field
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForQuestionAnswering

from full_stack_transformer.datasets.collators import Batch
from full_stack_transformer.errors import RowError
from full_stack_transformer.metrics.texts import answer_f1, exact_match, span_metrics
from full_stack_transformer.modelling.model_card import TaskWords
from full_stack_transformer.rows.fields import Columns, Row, field, only, place
from full_stack_transformer.tasks.bag_of_words import words
from full_stack_transformer.tasks.routes import (
    MODEL_FIELD,
    Body,
    FilledText,
    Form,
    FormField,
    Route,
    ShortText,
)
from full_stack_transformer.tasks.task import (
    Feature,
    Metrics,
    Prediction,
    RowTask,
    WindowTaskOptions,
    pad,
)

_NUM_ENDS = 20
_MAX_ANSWER_TOKENS = 64
_SENTENCE = re.compile(r"[^.!?\n]+[.!?]*")


class AnswerRequest(Body):
    """Body of `POST /answer`."""

    question: FilledText
    context: FilledText = Field(description="The text that holds the answer, or does not.")
    model: ShortText | None = MODEL_FIELD


class Answer(BaseModel):
    """Answer of `POST /answer`."""

    model: str
    answer: str = Field(description="A part of the context; empty where it holds none.")
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class _Candidate:
    score: float
    start: int
    end: int


class SpanSelection(RowTask):
    """See the module."""

    name = "span_selection"
    model_class = AutoModelForQuestionAnswering
    heads = ("ForQuestionAnswering",)
    options_class = WindowTaskOptions
    columns = Columns(("question", "context"), "answers")
    card = TaskWords("question-answering", "finds the answer in a text", fields="question, context")
    routes = (
        Route(
            "/answer",
            "The part of a text that answers a question.",
            body=AnswerRequest,
            answer=Answer,
            rows=lambda body: [{"question": body.question, "context": body.context}],
            reply=lambda predictions: predictions[0],
        ),
    )
    form = Form(
        "/answer",
        "Answer",
        "A question, then the text below it …",
        show="span",
        fields=(FormField("question", "line"), FormField("context", "rest")),
    )

    @classmethod
    def named(cls, row: Row) -> Row:
        """Rows of SQuAD."""
        answers = row.get("answers")
        if isinstance(answers, dict):  # as the hub has it: columns instead of rows
            starts = answers.get("answer_start") or answers.get("start") or []
            answers = [
                {"text": text, "start": start}
                for text, start in zip(answers["text"], starts, strict=True)
            ]
        elif isinstance(answers, list):
            answers = [
                {"text": one["text"], "start": one.get("start", one.get("answer_start"))}
                for one in answers
            ]
        return row if answers is None else {**row, "answers": answers}

    @classmethod
    def texts(cls, row: Row) -> Mapping[str, Any]:
        """Question and context."""
        return only(row, cls.columns.texts)

    @classmethod
    def learn(cls, rows: Sequence[Row], tokenizer: Any, options: WindowTaskOptions) -> Self:
        """Nothing, but some rows must have an answer."""
        if not any(row.get("answers") for row in rows):
            raise RowError(
                f"rows to learn from should have answers; all {len(rows):,} rows have none; name the right "
                "field with --label_column"
            )
        return cls(tokenizer, options)

    def label_counts(self, rows: Sequence[Row]) -> Counter[str]:
        """Whether there is an answer."""
        return Counter("an answer" if row.get("answers") else "no answer" for row in rows)

    def saved_options(self) -> dict[str, Any]:
        """How windows overlap."""
        return {"doc_stride": self.options.doc_stride}

    def features(self, rows: Sequence[Row]) -> list[Feature]:
        """One for each window, with `offsets`: the characters of each token of the context, else None."""
        features: list[Feature] = []
        for index, row in enumerate(rows):
            question = field(row, "question", str, self.name).strip()
            context = field(row, "context", str, self.name)
            answer = _answer(row)
            encoding = self.tokenizer(
                question,
                context,
                truncation="only_second",
                max_length=self.options.max_length,
                stride=self._stride(question, row),
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            for window in range(len(encoding["input_ids"])):
                feature: Feature = {name: encoding[name][window] for name in self.input_names}
                parts = encoding.sequence_ids(window)
                offsets = [
                    _without_spaces(context, *offset) if part == 1 else None
                    for offset, part in zip(encoding["offset_mapping"][window], parts, strict=True)
                ]
                feature["offsets"] = offsets
                if answer is not None:
                    feature["labels"] = _token_span(answer, offsets)
                features.append({**feature, "row": index})
        return features

    def collate(self, features: Sequence[Feature]) -> Batch:
        """`labels` are (B, 2): first and last token."""
        batch: Batch = {
            name: pad(
                [feature[name] for feature in features],
                self.tokenizer.pad_token_id if name == "input_ids" else 0,
            )
            for name in self.input_names
        }
        if all("labels" in feature for feature in features):
            batch["labels"] = torch.tensor([feature["labels"] for feature in features])
        return batch

    def forward(self, backbone: Any, batch: Batch) -> Tensor:
        """Scores of each token as the first and as the last one: (B, T, 2); -inf for padding.

        transformers' own loss lets padding take part, so that it depends on the other rows of a batch.
        """
        output = backbone(**{name: batch[name] for name in self.input_names})
        scores = torch.stack([output.start_logits, output.end_logits], dim=-1)
        is_padding = batch["attention_mask"] == 0
        return scores.masked_fill(is_padding[..., None], float("-inf"))

    def loss_sum(self, scores: Tensor, batch: Batch) -> Tensor:
        """Mean cross entropy of both ends."""
        ends = cross_entropy(scores.float(), batch["labels"], reduction="sum")
        return ends / 2

    def predictions(
        self, rows: Sequence[Row], features: Sequence[Feature], scores: Sequence[Tensor]
    ) -> list[Prediction]:
        """The best of all windows, or none where the mark for it scores higher in each window."""
        candidates: list[list[_Candidate]] = [[] for _ in rows]
        no_answer = [float("inf")] * len(rows)
        for feature, logits in zip(features, scores, strict=True):
            index = feature["row"]
            candidates[index] += _candidates(logits, feature["offsets"])
            no_answer[index] = min(no_answer[index], float(logits[0].sum()))
        return [
            _prediction(row["context"], found, none)
            for row, found, none in zip(rows, candidates, no_answer, strict=True)
        ]

    def metrics(self, rows: Sequence[Row], predictions: Sequence[Prediction]) -> Metrics:
        """Exact match and F1 on text."""
        expected = [[answer["text"] for answer in row["answers"]] for row in rows]
        return Metrics(span_metrics(expected, [one["answer"] for one in predictions]).scalars())

    def is_right(self, row: Row, prediction: Prediction) -> float:
        """1 where the answer is exact, else less than half of its F1."""
        expected = [answer["text"] for answer in row["answers"]]
        if exact_match(expected, prediction["answer"]) == 1.0:
            return 1.0
        return answer_f1(expected, prediction["answer"]) * 0.499

    def baselines(
        self, train_rows: Sequence[Row], rows: Sequence[Row]
    ) -> dict[str, list[Prediction]]:
        """The first sentence, and the one that has most words in common with the question."""
        first, by_words = [], []
        for row in rows:
            text = (_SENTENCE.match(row["context"]) or [""])[0].strip()
            first.append({"answer": text, "start": 0, "end": len(text), "score": 1.0})
            by_words.append(_sentence_like(row["question"], row["context"]))
        return {"majority": first, "words": by_words}

    def _stride(self, question: str, row: Row) -> int:
        """As told, but always less than the room that the question leaves."""
        encoding = self.tokenizer(question, add_special_tokens=False, verbose=False)
        num_question = len(encoding["input_ids"])
        num_marks = self.tokenizer.num_special_tokens_to_add(pair=True)
        room: int = self.options.max_length - num_question - num_marks
        if room < 2:
            raise RowError(
                f"{place(row)}the question has {num_question} tokens, which leaves no room for a context "
                f"in {self.options.max_length}"
            )
        stride: int = self.options.stride
        return min(stride, room - 1)


def _sentence_like(question: str, context: str) -> Prediction:
    wanted = set(words(question))
    best = max(
        _SENTENCE.finditer(context),
        key=lambda match: len(wanted & set(words(match.group()))),
        default=None,
    )
    text, start = ("", 0) if best is None else (best.group().strip(), best.start())
    return {"answer": text, "start": start, "end": start + len(text), "score": 1.0}


def _answer(row: Row) -> tuple[int, int] | None:
    """Characters of the first answer; (0, 0) for none; None where the row does not say."""
    answers = row.get("answers")
    if answers is None:
        return None
    if not isinstance(answers, list) or not all(map(_is_answer, answers)):
        raise RowError(
            f"{place(row)}the answers should be a list of objects with 'text', a str, and 'start', an int; "
            f"found {answers!r}"
        )
    if not answers:
        return (0, 0)
    text, start = answers[0]["text"], answers[0].get("start")
    if start is None:
        start = row["context"].find(text)
        if start < 0:
            raise RowError(f"{place(row)}the answer {text!r} is not in the context")
    if start < 0 or row["context"][start : start + len(text)] != text:
        raise RowError(
            f"{place(row)}the answer {text!r} should stand at character {start} of the context; found "
            f"{row['context'][max(0, start) : max(0, start) + len(text)]!r}"
        )
    # No token begins or ends with a space, so that no span would ever hold all of such an answer.
    return _without_spaces(row["context"], start, start + len(text))


def _is_answer(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("text"), str)
        and isinstance(value.get("start"), int | None)
    )


def _without_spaces(text: str, start: int, end: int) -> tuple[int, int]:
    """A token of byte-level BPE begins with the space before its word."""
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return (start, end)


def _token_span(
    answer: tuple[int, int], offsets: Sequence[tuple[int, int] | None]
) -> tuple[int, int]:
    """First and last token of the answer; the mark at 0 where the window does not hold all of it."""
    start, end = answer
    inside = [
        token
        for token, span in enumerate(offsets)
        if span is not None and span[0] < end and span[1] > start
    ]
    if start == end or not inside:
        return (0, 0)
    first, last = offsets[inside[0]], offsets[inside[-1]]
    assert first is not None
    assert last is not None
    if first[0] > start or last[1] < end:
        return (0, 0)
    return (inside[0], inside[-1])


def _candidates(logits: Tensor, offsets: Sequence[tuple[int, int] | None]) -> list[_Candidate]:
    """The best spans of a window: pairs of its best first and last tokens that may be one."""
    is_outside = torch.tensor([span is None or span[0] >= span[1] for span in offsets])
    inside = logits[: len(offsets)].masked_fill(is_outside[:, None], float("-inf"))
    count = min(_NUM_ENDS, len(offsets))
    starts, ends = (inside[:, side].topk(count).indices.tolist() for side in (0, 1))
    found = []
    for start in starts:
        for end in ends:
            first, last = offsets[start], offsets[end]
            if first and last and start <= end < start + _MAX_ANSWER_TOKENS:
                score = float(inside[start, 0] + inside[end, 1])
                if score > float("-inf"):
                    found.append(_Candidate(score, first[0], last[1]))
    return sorted(found, key=lambda one: -one.score)[:_NUM_ENDS]


def _prediction(context: str, found: Sequence[_Candidate], no_answer: float) -> Prediction:
    choices = [*sorted(found, key=lambda one: -one.score)[:_NUM_ENDS]]
    choices.append(_Candidate(no_answer, 0, 0))
    probabilities = torch.tensor([one.score for one in choices]).softmax(0)
    best = int(probabilities.argmax())
    start, end = choices[best].start, choices[best].end
    return {
        "answer": context[start:end],
        "start": start,
        "end": end,
        "score": float(probabilities[best]),
    }
