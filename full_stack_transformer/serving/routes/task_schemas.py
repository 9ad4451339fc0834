"""The bodies of the routes of other tasks: what a stranger may send, and what is answered."""

from typing import Annotated, Any

from pydantic import BaseModel, Field, StringConstraints

from full_stack_transformer.serving.schemas import MAX_PROMPTS, Body, ShortText, Text

_MAX_CHOICES = 32
FilledText = Annotated[Text, StringConstraints(min_length=1)]
Texts = Annotated[list[FilledText], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
_MODEL = Field(
    default=None, description="Name of a model of /v1/models; the first of the task without it."
)


class TextsRequest(Body):
    """Body of `POST /fill_mask`, `/label`, `/embed` and `/similarity`."""

    texts: Texts = Field(description="Each gets a prediction.")
    model: ShortText | None = _MODEL


class ClassifyRequest(Body):
    """Body of `POST /classify`."""

    texts: Texts = Field(description="Each gets a class.")
    text_pairs: Texts | None = Field(
        default=None,
        description="The second text of each, for models that compare two.",
    )
    model: ShortText | None = _MODEL


class ChooseRequest(Body):
    """Body of `POST /choose`."""

    text: Text = Field(description="What one of the choices goes on with, or answers.")
    choices: Annotated[
        list[FilledText], Field(min_length=2, max_length=_MAX_CHOICES, fail_fast=True)
    ]
    model: ShortText | None = _MODEL


class AnswerRequest(Body):
    """Body of `POST /answer`."""

    question: FilledText
    context: FilledText = Field(description="The text that holds the answer, or does not.")
    model: ShortText | None = _MODEL


class Predictions(BaseModel):
    """Answer of `POST /classify`, `/fill_mask` and `/label`: one prediction for each text."""

    model: str
    predictions: list[Any]


class Choice(BaseModel):
    """Answer of `POST /choose`."""

    model: str
    choice: int = Field(description="Number of the likeliest, from 0.")
    scores: list[float] = Field(description="The probability of each.")


class Answer(BaseModel):
    """Answer of `POST /answer`."""

    model: str
    answer: str = Field(description="A part of the context; empty where it holds none.")
    start: int
    end: int
    score: float


class Embeddings(BaseModel):
    """Answer of `POST /embed`."""

    model: str
    embeddings: list[list[float]]


class Similarities(BaseModel):
    """Answer of `POST /similarity`: cosines (texts, texts)."""

    model: str
    similarity: list[list[float]]
