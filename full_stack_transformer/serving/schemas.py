"""The bodies of the HTTP API: what clients may send, with bounds on everything.

Parsed with `model_validate_json` in strict mode; NaN and infinities are refused. A value that means "not
given" is left out: null, what is empty, and the neutral values of fields of OpenAI's, vLLM's and llama.cpp's
requests, also of those that are not built here. Knows nothing of models or of the web framework; the answers
of OpenAI's routes are declared with each route.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import BaseModel, Discriminator, Field, StringConstraints, Tag, model_validator

from full_stack_transformer.arguments.sampling import (
    DECLARED,
    MAX_LOGIT_BIAS,
    MAX_SEED,
    SamplingKeywords,
)
from full_stack_transformer.tasks import routes
from full_stack_transformer.tasks.catalogue import DEFAULT_TASK
from full_stack_transformer.tasks.routes import Body, ShortText, Text

# What the routes of tasks keep to as well.
MAX_TEXT_CHARACTERS = routes.MAX_TEXT_CHARACTERS
MAX_PROMPT_TOKENS = 131_072
# OpenAI's limits.
MAX_PROMPTS = 2048
MAX_SEQUENCES = 128
MAX_MESSAGES = 1000
_MAX_TOKEN_ID = 2**31 - 1

TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, le=_MAX_TOKEN_ID)]],
    Field(min_length=1, max_length=MAX_PROMPT_TOKENS, fail_fast=True),
]
IgnoredWords = Annotated[list[ShortText], Field(max_length=64, fail_fast=True)]


# ---------------------------------------------------------------------- what means "not given"

# Which values of a field mean "not given", beside null and what is empty: these, or those for which a
# function of value and body is true.
Neutral = tuple[Any, ...] | Callable[[Any, Mapping[str, Any]], bool]


def _any(value: Any, body: Mapping[str, Any]) -> bool:
    return True


# In llama.cpp's order, with the names and letters of its versions.
_SAMPLERS = (
    *("penalties", "dry", "top_n_sigma", "top_k", "tfs_z", "typ_p", "typical_p", "top_p", "min_p"),
    *("xtc", "temperature"),
)
_SAMPLERS_BY_LETTERS = ("edskypmxt", "edkypmxt", "dkypmxt", "kfypmt")


def _is_default_order(value: Any, body: Mapping[str, Any]) -> bool:
    """Whether llama.cpp's samplers stand in its order, with those that exist here."""
    if not isinstance(value, list):
        return value in _SAMPLERS_BY_LETTERS
    has_all = all(one in value for one in ("top_k", "top_p", "min_p", "temperature"))
    return has_all and value == [one for one in _SAMPLERS if one in value]


def _is_off(value: Any, body: Mapping[str, Any]) -> bool:
    """Whether no tool is asked for: without tools the model cannot choose one."""
    return value == "none" or (value == "auto" and not (body.get("tools") or body.get("functions")))


def _ignored(names: str) -> dict[str, Neutral]:
    return dict.fromkeys(names.split(), _any)


# Fields of a chat's and of a completion's body that other services know and this one has not.
_FOREIGN: Mapping[str, Neutral] = {
    # OpenAI's
    **_ignored("user metadata store service_tier safety_identifier prompt_cache_key"),
    **_ignored("prompt_cache_retention reasoning_effort verbosity parallel_tool_calls"),
    **dict.fromkeys(("tools", "functions", "audio", "prediction", "web_search_options"), ()),
    **dict.fromkeys(("tool_choice", "function_call"), _is_off),
    "modalities": (["text"],),
    # vLLM's
    **_ignored("include_reasoning"),
    **dict.fromkeys(("documents", "chat_template", "chat_template_kwargs"), ()),
    **_ignored(
        "request_id priority cache_salt guided_decoding_backend spaces_between_special_tokens"
    ),
    **dict.fromkeys(("use_beam_search", "early_stopping", "ignore_eos"), (False,)),
    **dict.fromkeys(("include_stop_str_in_output", "return_token_ids"), (False,)),
    **dict.fromkeys(("return_tokens_as_token_ids",), (False,)),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), ()),
    **dict.fromkeys(("guided_whitespace_pattern", "structured_outputs", "bad_words"), ()),
    **dict.fromkeys(("stop_token_ids", "allowed_token_ids", "logits_processors"), ()),
    **dict.fromkeys(("prompt_logprobs", "truncate_prompt_tokens", "prompt_embeds"), ()),
    **dict.fromkeys(("kv_transfer_params", "vllm_xargs", "mm_processor_kwargs"), ()),
    **dict.fromkeys(("thinking_token_budget", "repetition_detection"), ()),
    "length_penalty": (1,),
    "skip_special_tokens": (True,),
    # llama.cpp's; what belongs to a sampler that is off changes nothing
    **_ignored(
        "cache_prompt id_slot slot_id n_keep n_discard n_cache_reuse min_keep timings_per_token"
    ),
    **_ignored("return_progress t_max_prompt_ms sse_ping_interval penalize_nl grammar_lazy"),
    **_ignored("mirostat_tau mirostat_eta dynatemp_exponent xtc_threshold dry_base"),
    **_ignored("dry_allowed_length dry_penalty_last_n dry_sequence_breakers adaptive_decay"),
    **dict.fromkeys(("mirostat", "dynatemp_range", "xtc_probability", "dry_multiplier"), (0,)),
    **dict.fromkeys(("n_probs", "n_indent"), (0,)),
    **dict.fromkeys(("t_max_predict_ms", "top_n_sigma", "adaptive_target"), (0, -1)),
    **dict.fromkeys(("return_tokens", "post_sampling_probs", "backend_sampling"), (False,)),
    **dict.fromkeys(("grammar", "grammar_triggers", "preserved_tokens", "json_schema"), ()),
    **dict.fromkeys(("image_data", "multimodal_data", "lora", "response_fields"), ()),
    "tfs_z": (1,),
    "repeat_last_n": (-1, 64),
    "samplers": _is_default_order,
}
# llama.cpp's names of fields that exist here.
_ALIASES = {"n_predict": "max_tokens", "repeat_penalty": "repetition_penalty", "typ_p": "typical_p"}


def _is_one_of(value: Any, neutral: tuple[Any, ...]) -> bool:
    # For Python True is 1.
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)


class TolerantBody(Body):
    """A body, or a part of one, without what means "not given"."""

    neutral: ClassVar[Mapping[str, Neutral]] = {}
    """Of the fields here; null and what is empty mean "not given" where the default is null."""
    foreign: ClassVar[Mapping[str, Neutral]] = {}
    """Of other services' fields. Other values than these would change the answer and are refused."""
    aliases: ClassVar[Mapping[str, str]] = {}
    """Other names of fields."""

    @model_validator(mode="before")
    @classmethod
    def _keep_what_is_given(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        own = {field.alias or name: field for name, field in cls.model_fields.items()}
        kept = {}
        for name, value in body.items():
            target = cls.aliases.get(name, name)
            if target in own:
                field = own[target]
                means_nothing = (value is None and not field.is_required()) or (
                    field.default is None and isinstance(value, (str, list, dict)) and not value
                )
                neutral: Neutral = cls.neutral.get(target, ())
            else:
                means_nothing = name in cls.foreign and value in (None, "", [], {})
                neutral = cls.foreign.get(name, ())
            if not (means_nothing or _is_neutral(neutral, value, body)):
                kept[name] = value
        for name in kept.keys() & cls.aliases.keys():
            # Where both names are given and differ, this one stays, and is refused.
            target = cls.aliases[name]
            if kept.get(target, kept[name]) == kept[name]:
                kept[target] = kept.pop(name)
        return kept


def _is_neutral(neutral: Neutral, value: Any, body: Mapping[str, Any]) -> bool:
    return neutral(value, body) if callable(neutral) else _is_one_of(value, neutral)


# ---------------------------------------------------------------------- bodies


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


class _SamplingBody(TolerantBody):
    """A body with sampling parameters."""

    neutral = {"top_k": (-1,), "seed": (-1,), "max_tokens": (-1,), "max_completion_tokens": (-1,)}  # noqa: RUF012

    def given(self) -> SamplingKeywords:
        """The sampling parameters that the body gives, under their own names."""
        given: dict[str, Any] = {}
        for field in type(self).model_fields:
            name, value = _PARAMETER_OF_FIELD.get(field, field), getattr(self, field)
            if name in DECLARED and value is not None:
                # Any number of 64 bits seeds other services.
                given[name] = value & MAX_SEED if name == "seed" else value
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
    seed: int | None = _sampling("seed", ge=-(2**63))
    model: ShortText | None = Field(
        default=None, description="Name of a model of /v1/models; the first one without it."
    )


class GeneratedTextsResponse(BaseModel):
    """Answer of `POST /generated_texts/`: the continuations, without the seed text."""

    texts: list[str]


class StreamOptions(TolerantBody):
    """What a stream contains in addition to the text."""

    foreign = _ignored("include_obfuscation")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(
        default=None, description="vLLM's: with include_usage, every piece has it."
    )


class JsonSchemaFormat(TolerantBody):
    """A JSON schema with its name, as OpenAI wraps it."""

    name: ShortText = "answer"
    description: Text | None = Field(default=None, description="Accepted and ignored.")
    json_schema: dict[str, Any] | bool = Field(default_factory=dict, alias="schema")
    strict: bool | None = Field(default=None, description="Accepted and ignored: it is kept to.")


class ResponseFormat(TolerantBody):
    """What the text must look like."""

    foreign: ClassVar[Mapping[str, Neutral]] = {"schema": (), "grammar": (), "format": ()}

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchemaFormat | None = None
    regex: Annotated[str, StringConstraints(min_length=1, max_length=10_000)] | None = Field(
        default=None, description="A regular expression that the whole text matches; an addition."
    )


class OpenAIBody(_SamplingBody):
    """What completions and chats share; null always means the default."""

    foreign = _FOREIGN
    aliases = _ALIASES

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
    seed: int | None = _sampling("seed", ge=-(2**63))
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

    @property
    def num_choices(self) -> int:
        """Texts that are wanted for each prompt."""
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def includes_usage_of_pieces(self) -> bool:
        """Whether every piece of a stream says the number of tokens of its text so far."""
        options = self.stream_options
        return bool(options and options.include_usage and options.continuous_usage_stats)


# ---------------------------------------------------------------------- prompts and inputs


def _kind_of_texts(given: Any) -> str | None:
    """Which of the forms below a prompt has, so that errors are about that form."""
    if isinstance(given, str):
        return "<text>"
    if not isinstance(given, list) or not given:
        return None
    if isinstance(given[0], int):
        return "<ids>"
    return "<lists>" if isinstance(given[0], list) else "<texts>"


def _texts(text: Any) -> Any:
    """A text, token ids, or a list of either."""
    some = Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)
    choose = Discriminator(
        _kind_of_texts,
        custom_error_type="no_texts",
        custom_error_message="should be a text, a list of token ids, or a list of texts or of such lists",
    )
    return Annotated[
        Annotated[text, Tag("<text>")]
        | Annotated[TokenIds, Tag("<ids>")]
        | Annotated[list[text], some, Tag("<texts>")]
        | Annotated[list[TokenIds], some, Tag("<lists>")],
        choose,
    ]


class CompletionRequest(OpenAIBody):
    """Body of `POST /v1/completions`, as OpenAI defines it, with additions."""

    # One candidate is what everybody gets who does not ask for more.
    neutral = OpenAIBody.neutral | {"best_of": (1,), "logprobs": (False,)}
    foreign: ClassVar[Mapping[str, Neutral]] = {
        **_FOREIGN,
        **dict.fromkeys(("add_special_tokens", "add_generation_prompt"), (True,)),
        "top_logprobs": (0,),
        "continue_final_message": (False,),
    }
    aliases = _ALIASES | {"max_completion_tokens": "max_tokens"}

    prompt: _texts(Text) = Field(  # type: ignore[valid-type]
        default="", description="A text, token ids, or a list of either."
    )
    max_tokens: int | None = _sampling(
        "max_new_tokens",
        ge=0,
        description="Maximum number of new tokens; 0 only to score a text, with echo.",
    )
    best_of: int | None = Field(default=None, ge=1, le=MAX_SEQUENCES)
    echo: bool | None = False
    logprobs: int | None = Field(default=None, ge=0, le=20)
    suffix: Text | None = Field(default=None, description="Refused: texts are only continued.")


class ContentPart(TolerantBody):
    """A part of a message's text."""

    foreign = _ignored("cache_control") | {"annotations": ()}

    type: Literal["text"]
    text: Text


def _kind_of_content(given: Any) -> str | None:
    if isinstance(given, str):
        return "<text>"
    return "<parts>" if isinstance(given, list) else None


class ChatMessage(TolerantBody):
    """One turn of a conversation; of an answer that comes back, what it was sent with is ignored."""

    foreign = _ignored("name reasoning reasoning_content cache_control") | dict.fromkeys(
        ("refusal", "tool_calls", "function_call", "tool_call_id", "audio", "annotations"), ()
    )

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[Text, Tag("<text>")]
        | Annotated[
            list[ContentPart], Field(max_length=MAX_MESSAGES, fail_fast=True), Tag("<parts>")
        ],
        Discriminator(
            _kind_of_content,
            custom_error_type="no_content",
            custom_error_message="should be a text, or a list of parts of the type text",
        ),
    ]

    @model_validator(mode="before")
    @classmethod
    def _say_nothing(cls, message: Any) -> Any:
        """An answer may be without a text."""
        if isinstance(message, dict) and message.get("role") == "assistant":
            return message | {"content": message.get("content") or ""}
        return message

    @property
    def text(self) -> str:
        """The whole text of the message."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


def _asks_for_an_answer(value: Any, body: Mapping[str, Any]) -> bool:
    """vLLM wants false where an answer is continued."""
    return value is not bool(body.get("continue_final_message"))


class ChatCompletionRequest(OpenAIBody):
    """Body of `POST /v1/chat/completions`, as OpenAI defines it, with the same additions."""

    foreign: ClassVar[Mapping[str, Neutral]] = {
        **_FOREIGN,
        **_ignored("reasoning_format parse_tool_calls thinking_forced_open"),
        **dict.fromkeys(("echo", "add_special_tokens"), (False,)),
        "best_of": (1,),
        "suffix": (),
        "add_generation_prompt": _asks_for_an_answer,
    }
    neutral = OpenAIBody.neutral | {
        "top_logprobs": lambda value, body: value == 0 and not body.get("logprobs")
    }

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


class EmbeddingRequest(TolerantBody):
    """Body of `POST /v1/embeddings`, as OpenAI defines it."""

    foreign: ClassVar[Mapping[str, Neutral]] = {
        **_ignored("user request_id priority cache_salt"),
        **dict.fromkeys(("truncate_prompt_tokens", "additional_data", "mm_processor_kwargs"), ()),
        **dict.fromkeys(("normalize", "use_activation", "add_special_tokens"), (True,)),
        "embed_dtype": ("float32",),
        "endianness": ("native", "little"),
        "embd_normalize": (2,),
    }

    model: ShortText | None = None
    input: _texts(Annotated[Text, StringConstraints(min_length=1)])  # type: ignore[valid-type]
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = Field(
        default=None, ge=1, le=1_000_000, description="Refused unless it is the model's width."
    )


AdapterName = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]*$", min_length=1, max_length=128),
]


class LoadAdapterRequest(TolerantBody):
    """Body of `POST /v1/load_lora_adapter`, as vLLM defines it."""

    foreign: ClassVar[Mapping[str, Neutral]] = {"is_3d_lora_weight": (False,)}

    lora_name: AdapterName = Field(description="Name of the new model.")
    lora_path: ShortText = Field(
        description="Its directory, below the one that --adapters_root names."
    )
    load_inplace: bool | None = Field(
        default=False, description="Replace an adapter of this name, if there is one."
    )
    base_model_name: ShortText | None = Field(
        default=None,
        description="An addition: the model that it stands beside, where several are served.",
    )


class UnloadAdapterRequest(TolerantBody):
    """Body of `POST /v1/unload_lora_adapter`, as vLLM defines it."""

    foreign: ClassVar[Mapping[str, Neutral]] = _ignored("lora_int_id")

    lora_name: AdapterName = Field(description="Name of the model.")


class Health(BaseModel):
    """Answer of `GET /health`."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Answer of `GET /ready`."""

    status: Literal["ready", "stopping"]
    num_running: int | None = Field(default=None, description="Left out without a key.")
    num_waiting: int | None = Field(default=None, description="Left out without a key.")


class ServedModelFacts(BaseModel):
    """What is known of one model that is served."""

    model: str
    parent: str | None = Field(default=None, description="The model that an adapter stands beside.")
    task: str = Field(default=DEFAULT_TASK, description="What the model was trained for.")
    checkpoint: str = Field(description="Name of the file or directory that was opened.")
    step: int | None
    validation_loss: float | None
    context_tokens: int
    computed_by: str
    key_value_memory: dict[str, int | str] | None = Field(
        default=None,
        description="Memory that the keys and values of texts share: type, blocks, tokens, bytes.",
    )
    draft_model: dict[str, str | bool] | None = Field(
        default=None,
        description="What guesses the next tokens: model, what computes it, whether it has failed.",
    )
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
    chat_sampling: dict[str, float] = Field(
        default_factory=dict, description="The same for an answer in a chat."
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
