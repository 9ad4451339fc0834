"""HTTP routes of tasks: bodies, answers, and the form that a page shows. Knows no web framework and no model.

body ──rows──> rows ──model──> predictions ──reply──> fields of the answer
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

MAX_TEXT_CHARACTERS = 200_000
MAX_TEXTS = 64

Text = Annotated[str, StringConstraints(max_length=MAX_TEXT_CHARACTERS)]
FilledText = Annotated[Text, StringConstraints(min_length=1)]
ShortText = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Texts = Annotated[list[FilledText], Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True)]
MODEL_FIELD = Field(
    default=None, description="Name of a model of /v1/models; the first of the task without it."
)


class Body(BaseModel):
    """What every body keeps to: no unknown fields, no NaN, no conversions."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True, frozen=True)


class TextsRequest(Body):
    """Texts that each get a prediction."""

    texts: Texts = Field(description="Each gets a prediction.")
    model: ShortText | None = MODEL_FIELD


class Predictions(BaseModel):
    """One prediction for each text."""

    model: str
    predictions: list[Any]


@dataclass(frozen=True)
class FormField:
    """A field of a body, and which lines of the page's text area it gets."""

    name: str
    takes: Literal["line", "lines", "rest"]
    """line: the next line. lines: all remaining ones, as a list. rest: all remaining ones, as one text."""


@dataclass(frozen=True)
class Form:
    """What the playground shows for a model: one text area, one button, and a picture of the answer."""

    path: str
    """Of the route that is asked."""
    verb: str
    """On the button."""
    hint: str
    """In the empty text area."""
    show: Literal["scores", "guesses", "labels", "choice", "span", "matrix", "json"] = "json"
    """How the answer is drawn; json: as it is."""
    fields: tuple[FormField, ...] = (FormField("texts", "lines"),)


def rows_of_texts(body: Any) -> list[dict[str, Any]]:
    """A row for each text of a body."""
    return [{"text": text} for text in body.texts]


def reply_predictions(predictions: Sequence[Any]) -> dict[str, Any]:
    """The predictions as they are."""
    return {"predictions": list(predictions)}


@dataclass(frozen=True)
class Route:
    """A route that models of a task answer."""

    path: str
    summary: str
    """What it does, for the documentation page."""
    body: type[BaseModel] = TextsRequest
    """Has a field `model` beside those that `rows` reads."""
    answer: type[BaseModel] = Predictions
    """Has a field `model` beside those that `reply` fills."""
    rows: Callable[[Any], list[dict[str, Any]]] = rows_of_texts
    """The rows that a body asks for; raises ValueError("field: what is wrong with it")."""
    reply: Callable[[Sequence[Any]], dict[str, Any]] = reply_predictions
    """The fields of the answer, out of the predictions."""
    needs_vectors: bool = False
    """Whether predictions are {"embedding": vector}, so that a model that generates can answer too."""
