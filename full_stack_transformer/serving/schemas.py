"""The bodies of the HTTP API: what a stranger may send, with bounds on everything.

Parsed with `model_validate_json` in strict mode; NaN, infinities and unknown fields are refused.
Knows nothing of models or of the web framework.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

MAX_TEXT_CHARACTERS = 200_000
MAX_NEW_TOKENS = 8192
MAX_SEQUENCES = 16
MAX_SEED = 2**63 - 1

Text = Annotated[str, StringConstraints(max_length=MAX_TEXT_CHARACTERS)]
ShortText = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True, frozen=True)


class GeneratedTextsRequest(_Body):
    """Body of `POST /generated_texts/`."""

    seed_text: Text = Field(
        default="", description="Text to continue; empty starts a new document."
    )
    ignored_words: list[ShortText] = Field(
        default_factory=list, max_length=64, description="Words that must not appear."
    )
    generation_max_len: int = Field(
        default=64, ge=1, le=MAX_NEW_TOKENS, description="Tokens to add, at most."
    )
    temperature: float = Field(
        default=0.7,
        ge=0,
        le=100,
        description="0 takes the likeliest token, 1 the model's probabilities.",
    )
    top_k: int = Field(
        default=0, ge=0, le=1_000_000, description="Choose among the k likeliest tokens; 0 for all."
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Choose among the likeliest tokens of this probability.",
    )
    repetition_penalty: float = Field(
        default=1.0, gt=0, le=10, description="Divides the scores of tokens that already occurred."
    )
    num_return_sequences: int = Field(
        default=1, ge=1, le=MAX_SEQUENCES, description="Independent continuations."
    )
    seed: int | None = Field(
        default=None, ge=0, le=MAX_SEED, description="The same seed gives the same texts."
    )


class GeneratedTextsResponse(BaseModel):
    """Answer of `POST /generated_texts/`: the continuations, without the seed text."""

    texts: list[str]


class CompletionRequest(_Body):
    """Body of `POST /v1/completions`, as OpenAI defines it; `top_k` and `repetition_penalty` are ours."""

    model: ShortText
    prompt: Text = ""
    max_tokens: int = Field(default=16, ge=1, le=MAX_NEW_TOKENS)
    temperature: float = Field(default=1.0, ge=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, le=1_000_000)
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)
    n: int = Field(default=1, ge=1, le=MAX_SEQUENCES)
    stop: Annotated[list[ShortText], Field(max_length=16)] | ShortText | None = None
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    stream: bool = False
    echo: bool = False
    user: ShortText | None = Field(default=None, description="Accepted and ignored.")


class CompletionChoice(BaseModel):
    """One continuation, or a piece of it when streamed."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None


class CompletionUsage(BaseModel):
    """Tokens read and made."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionResponse(BaseModel):
    """Answer of `POST /v1/completions`, whole or one piece of the stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage | None = None


class ModelCard(BaseModel):
    """One entry of `GET /v1/models`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "full_stack_transformer"


class ModelList(BaseModel):
    """Answer of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """Answer of `GET /health`."""

    status: Literal["ok"] = "ok"


class Version(BaseModel):
    """Answer of `GET /version`: which package serves which model."""

    package_version: str
    model: str
    description: dict[str, Any] = Field(
        description="The model directory's description: step, validation loss, dataset."
    )


class ErrorDetail(BaseModel):
    """What went wrong, in OpenAI's shape."""

    message: str
    type: str
    code: str | None = None
    param: str | None = None


class ErrorResponse(BaseModel):
    """Body of every answer that is an error."""

    error: ErrorDetail
