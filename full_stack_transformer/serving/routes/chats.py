"""`/v1/chat/completions`: the model's next turn."""

import asyncio
from collections.abc import Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel

from full_stack_transformer.generation.requests import Piece
from full_stack_transformer.generation.sampling import ScoredToken
from full_stack_transformer.serving.http.bodies import InvalidBodyError, body_schema, parse_body
from full_stack_transformer.serving.routes.answering import OpenAIAnswer, Usage, check_room
from full_stack_transformer.serving.routes.log_probabilities import chat_logprobs
from full_stack_transformer.serving.schemas import ChatCompletionRequest
from full_stack_transformer.serving.workers.models import ServedModels
from full_stack_transformer.serving.workers.served import ServedModel
from full_stack_transformer.tokenization import chat as templates
from full_stack_transformer.tokenization.template_process import time_limit

# A long conversation takes a hundredth of a second, and other chats wait for it.
_SECONDS_FOR_TEMPLATE = 5.0


class TokenLogprob(BaseModel):
    """One token with its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TokenLogprob):
    """A token of an answer and its alternatives."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities in the form of chats."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletionResponse(BaseModel):
    """Answer of `POST /v1/chat/completions`, for the documentation: the route writes the same without it."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


def add_chat_route(router: APIRouter, models: ServedModels) -> None:
    """The route."""

    @router.post(
        "/chat/completions",
        response_model=ChatCompletionResponse,
        openapi_extra=body_schema(ChatCompletionRequest),
    )
    async def chat(request: Request) -> Response:
        """The model's next turn in a chat; with `stream` as server-sent events."""
        body = await parse_body(request, ChatCompletionRequest)
        model = models.find(body.model)
        answer = _ChatAnswer(body, model)
        _check(body)
        check_room(request, model, body.num_choices)
        # A template is a program; it must not hold up the event loop.
        prompt_ids = await asyncio.to_thread(_prompt_ids, body, model)
        wanted = model.conventions.requests(
            prompt_ids,
            body.given(),
            max_length=model.engine.max_length,
            num_sequences=body.num_choices,
            is_chat=True,
            num_log_probabilities=(body.top_logprobs or 0) if body.logprobs else None,
        )
        return await answer.send(request, wanted, num_prompt_tokens=len(prompt_ids))


def _check(body: ChatCompletionRequest) -> None:
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidBodyError("top_logprobs: only possible with logprobs", "top_logprobs")
    if body.continue_final_message and body.messages[-1].role != "assistant":
        raise InvalidBodyError(
            "continue_final_message: the last message must be the assistant's",
            "continue_final_message",
        )


def _prompt_ids(body: ChatCompletionRequest, model: ServedModel) -> list[int]:
    """What the model's template makes of a chat."""
    with time_limit(_SECONDS_FOR_TEMPLATE):
        return model.conventions.template.encode(
            _messages(body), model.tokenizer, continues=body.continue_final_message
        )


def _messages(body: ChatCompletionRequest) -> list[templates.ChatMessage]:
    return [
        {"role": "system" if one.role == "developer" else one.role, "content": one.text}
        for one in body.messages
    ]


class _ChatAnswer(OpenAIAnswer):
    """One request on its way to an answer."""

    def __init__(self, body: ChatCompletionRequest, model: ServedModel) -> None:
        super().__init__(
            *(body, model),
            prefix="chatcmpl",
            kind="chat.completion",
            chunk_kind="chat.completion.chunk",
        )
        self._has_logprobs = bool(body.logprobs)
        self._strips = model.conventions.strips_answers(continues=body.continue_final_message)
        self._with_text: set[int] = set()

    def choices(self, texts: list[Piece]) -> list[dict[str, Any]]:
        """The answers."""
        return [
            {
                "index": index,
                "message": {
                    "role": "assistant",
                    "content": text.text.lstrip() if self._strips else text.text,
                    "refusal": None,
                },
                "logprobs": self._logprobs(text.scored),
                "finish_reason": text.finish_reason,
            }
            for index, text in enumerate(texts)
        ]

    def shown_text(self, index: int, piece: Piece) -> str:
        """Without white space before the answer, where the template asks for it."""
        if not self._strips or index in self._with_text:
            return piece.text
        text = piece.text.lstrip()
        if text:
            self._with_text.add(index)
        return text

    def streamed_choice(
        self, index: int, text: str, piece: Piece, *, is_first: bool
    ) -> dict[str, Any]:
        """What is new of an answer; the first piece names its role."""
        delta: dict[str, Any] = {"role": "assistant"} if is_first else {}
        if text or is_first:
            delta["content"] = text
        return {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(piece.scored),
            "finish_reason": piece.finish_reason,
        }

    def _logprobs(self, scored: Sequence[ScoredToken]) -> dict[str, Any] | None:
        return chat_logprobs(scored, self._model.tokenizer) if self._has_logprobs else None
