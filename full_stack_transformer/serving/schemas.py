"""The bodies of the HTTP API: what clients may send, with bounds on everything.

Parsed with `model_validate_json` in strict mode; NaN, infinities and unknown fields are refused. Fields of
OpenAI's that change nothing here are accepted and ignored, by name. Knows nothing of models or of the web
framework; the answers of OpenAI's routes are declared with each route.
"""

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, Field, StringConstraints

from full_stack_transformer.arguments.sampling import DECLARED, MAX_LOGIT_BIAS, SamplingKeywords
from full_stack_transformer.tasks import routes
from full_stack_transformer.tasks.catalogue import DEFAULT_TASK
from full_stack_transformer.tasks.routes import Body, ShortText, Text

# What the routes of tasks keep to as well.
MAX_TEXT_CHARACTERS, MAX_PROMPTS = routes.MAX_TEXT_CHARACTERS, routes.MAX_TEXTS
MAX_PROMPT_TOKENS = 131_072
MAX_SEQUENCES = 16
MAX_MESSAGES = 1000
_MAX_TOKEN_ID = 2**31 - 1

TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, le=_MAX_TOKEN_ID)]],
    Field(min_length=1, max_length=MAX_PROMPT_TOKENS, fail_fast=True),
]
IgnoredWords = Annotated[list[ShortText], Field(max_length=64, fail_fast=True)]


# OpenAI's names, and those of the native route, for the parameters that have others there.
_PARAMETER_OF_FIELD = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "generation_max_len": "max_new_tokens",
}


def _sampling(name: str, **changed: Any) -> Any:
    """A sampling parameter with its meaning and bounds; left out or null, the model decides.

    `x-unit` is for pages that draw a form from the schema.
    """
    declared = DECLARED[name].metadata
    bounds: dict[str, Any] = {}
    if "least" in declared:
        bounds = {"gt" if declared["above"] else "ge": declared["least"], "le": declared["most"]}
    if name.endswith("_tokens") or name == "top_k":
        bounds["json_schema_extra"] = {"x-unit": "tokens"}
    return Field(**({"default": None, "description": declared["help"]} | bounds | changed))


class _SamplingBody(Body):
    """A body with sampling parameters."""

    def given(self) -> SamplingKeywords:
        """The sampling parameters that the body gives, under their own names."""
        given: dict[str, Any] = {}
        for field in type(self).model_fields:
            name, value = _PARAMETER_OF_FIELD.get(field, field), getattr(self, field)
            if name in DECLARED and value is not None:
                given[name] = value
        if "stop" in given:
            stop = given["stop"]
            given["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        if "ignored_words" in given:
            given["ignored_words"] = tuple(given["ignored_words"])
        if "logit_bias" in given:
            biases = given["logit_bias"]
            given["logit_bias"] = {int(token_id): value for token_id, value in biases.items()}
        return cast(SamplingKeywords, given)


class GeneratedTextsRequest(_SamplingBody):
    """Body of `POST /generated_texts/`."""

    seed_text: Text = Field(
        default="", description="Text to continue; empty starts a new document."
    )
    ignored_words: IgnoredWords | None = _sampling("ignored_words")
    generation_max_len: int | None = _sampling("max_new_tokens")
    temperature: float | None = _sampling("temperature")
    top_k: int | None = _sampling("top_k")
    top_p: float | None = _sampling("top_p")
    repetition_penalty: float | None = _sampling("repetition_penalty")
    num_return_sequences: int = Field(
        default=1, ge=1, le=MAX_SEQUENCES, description="Number of independent continuations."
    )
    seed: int | None = _sampling("seed")
    model: ShortText | None = Field(
        default=None, description="Name of a model of /v1/models; the first one without it."
    )


class GeneratedTextsResponse(BaseModel):
    """Answer of `POST /generated_texts/`: the continuations, without the seed text."""

    texts: list[str]


class StreamOptions(Body):
    """What a stream contains in addition to the text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(default=None, description="Accepted and ignored.")


class JsonSchemaFormat(Body):
    """A JSON schema with its name, as OpenAI wraps it."""

    name: ShortText = "answer"
    description: Text | None = Field(default=None, description="Accepted and ignored.")
    json_schema: dict[str, Any] | bool = Field(default_factory=dict, alias="schema")
    strict: bool | None = Field(default=None, description="Accepted and ignored: it is kept to.")


class ResponseFormat(Body):
    """What the text must look like."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchemaFormat | None = None
    regex: Annotated[str, StringConstraints(min_length=1, max_length=10_000)] | None = Field(
        default=None, description="A regular expression that the whole text matches; an addition."
    )


class OpenAIBody(_SamplingBody):
    """What completions and chats share; null always means the default."""

    model: ShortText | None = None
    temperature: float | None = _sampling("temperature")
    top_p: float | None = _sampling("top_p")
    presence_penalty: float | None = _sampling("presence_penalty")
    frequency_penalty: float | None = _sampling("frequency_penalty")
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, StringConstraints(pattern="^[0-9]{1,9}$")],
                Annotated[float, Field(ge=-MAX_LOGIT_BIAS, le=MAX_LOGIT_BIAS)],
            ],
            Field(max_length=1024),
        ]
        | None
    ) = _sampling("logit_bias")
    n: int | None = Field(
        default=1,
        ge=1,
        le=MAX_SEQUENCES,
        description="Number of independent continuations.",
        json_schema_extra={"x-unit": "texts"},
    )
    stop: Annotated[list[ShortText], Field(max_length=16, fail_fast=True)] | ShortText | None = (
        _sampling("stop")
    )
    seed: int | None = _sampling("seed")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = Field(
        default=None, description="A format that the text follows."
    )
    # Additions
    top_k: int | None = _sampling("top_k")
    min_p: float | None = _sampling("min_p")
    typical_p: float | None = _sampling("typical_p")
    repetition_penalty: float | None = _sampling("repetition_penalty")
    ignored_words: IgnoredWords | None = _sampling("ignored_words")
    min_tokens: int | None = _sampling("min_new_tokens")
    # Accepted and ignored
    user: Text | None = Field(default=None, description="Accepted and ignored.")
    metadata: dict[str, Any] | None = Field(default=None, description="Accepted and ignored.")
    store: bool | None = Field(default=None, description="Accepted and ignored.")
    service_tier: ShortText | None = Field(default=None, description="Accepted and ignored.")
    safety_identifier: ShortText | None = Field(default=None, description="Accepted and ignored.")
    prompt_cache_key: ShortText | None = Field(default=None, description="Accepted and ignored.")

    @property
    def num_choices(self) -> int:
        """Texts that are wanted for each prompt."""
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(OpenAIBody):
    """Body of `POST /v1/completions`, as OpenAI defines it, with additions."""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    ) = Field(default="", description="A text, token ids, or a list of either.")
    max_tokens: int | None = _sampling(
        "max_new_tokens",
        ge=0,
        description="Maximum number of new tokens; 0 only to score a text, with echo.",
    )
    best_of: int | None = Field(default=None, ge=1, le=MAX_SEQUENCES)
    echo: bool | None = False
    logprobs: int | None = Field(default=None, ge=0, le=20)
    suffix: Text | None = Field(default=None, description="Refused: texts are only continued.")


class ContentPart(Body):
    """A part of a message's text."""

    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[ContentPart], Field(max_length=MAX_MESSAGES, fail_fast=True)]
    name: ShortText | None = Field(default=None, description="Accepted and ignored.")

    @property
    def text(self) -> str:
        """The whole text of the message."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatCompletionRequest(OpenAIBody):
    """Body of `POST /v1/chat/completions`, as OpenAI defines it, with the same additions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_tokens: int | None = _sampling("max_new_tokens")
    max_completion_tokens: int | None = _sampling(
        "max_new_tokens", description="OpenAI's newer name of max_tokens."
    )
    continue_final_message: bool = Field(
        default=False,
        description="An addition: the last message is the beginning of an answer; continue it.",
    )
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    reasoning_effort: ShortText | None = Field(default=None, description="Accepted and ignored.")
    verbosity: ShortText | None = Field(default=None, description="Accepted and ignored.")
    parallel_tool_calls: bool | None = Field(default=None, description="Accepted and ignored.")
    modalities: list[Literal["text"]] | None = Field(default=None, description="Only text.")


class EmbeddingRequest(Body):
    """Body of `POST /v1/embeddings`, as OpenAI defines it."""

    model: ShortText | None = None
    input: (
        Annotated[Text, StringConstraints(min_length=1)]
        | TokenIds
        | Annotated[
            list[Annotated[Text, StringConstraints(min_length=1)]],
            Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True),
        ]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = Field(
        default=None, ge=1, le=1_000_000, description="Refused unless it is the model's width."
    )
    user: Text | None = Field(default=None, description="Accepted and ignored.")


class Health(BaseModel):
    """Answer of `GET /health`."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Answer of `GET /ready`."""

    status: Literal["ready", "stopping"]
    num_running: int
    num_waiting: int


class ServedModelFacts(BaseModel):
    """What is known of one model that is served."""

    model: str
    task: str = Field(default=DEFAULT_TASK, description="What the model was trained for.")
    checkpoint: str = Field(description="Name of the file or directory that was opened.")
    step: int | None
    validation_loss: float | None
    context_tokens: int
    computed_by: str
    has_chat_template: bool = Field(
        default=False, description="Whether the model has a chat template."
    )
    control_tokens: list[str] = Field(
        default_factory=list,
        description="Names of the tokens that are not text, as log-probabilities name them.",
    )
    form: dict[str, Any] | None = Field(
        default=None,
        description="Route, fields and words of a form for this model; null for one that continues texts.",
    )
    sampling: dict[str, float] = Field(
        default_factory=dict,
        description="Sampling parameters of a request that leaves them out.",
    )
    num_swaps: int = Field(description="How often --watch has replaced it.")
    loaded_at: int = Field(description="Seconds since 1970.")
    description: dict[str, Any] = Field(
        description="The model directory's description: step, validation loss, dataset."
    )


class Version(BaseModel):
    """Answer of `GET /version`: which package serves which models."""

    package_version: str
    model: str = Field(description="The first of the models.")
    description: dict[str, Any] = Field(
        description="The model directory's description: step, validation loss, dataset."
    )
    models: list[ServedModelFacts] = Field(default_factory=list)


class ErrorDetail(BaseModel):
    """What went wrong, in OpenAI's shape."""

    message: str
    type: str
    code: str | None = None
    param: str | None = None


class ErrorResponse(BaseModel):
    """Body of every answer that is an error."""

    error: ErrorDetail
