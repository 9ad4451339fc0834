"""`/v1/chat/completions`: the model's next turn."""

import asyncio
import dataclasses
import time
import uuid
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from full_stack_transformer.errors import RequestError
from full_stack_transformer.generation import chat as templates
from full_stack_transformer.serving.http.bodies import InvalidBodyError
from full_stack_transformer.serving.routes.completions import (
    check_stream_options,
    usage,
    with_format,
)
from full_stack_transformer.serving.routes.generation import (
    Exchange,
    FinishedText,
    Wanted,
    check_room,
    options_of_openai,
    submit,
    submitted,
    token_requests,
    wait_for_texts,
)
from full_stack_transformer.serving.routes.log_probabilities import chat_logprobs
from full_stack_transformer.serving.routes.streams import EventStream
from full_stack_transformer.serving.schemas import ChatCompletionRequest
from full_stack_transformer.serving.workers.engine_worker import Piece
from full_stack_transformer.serving.workers.models import ServedModel


async def answer_chat(
    request: Request, body: ChatCompletionRequest, model: ServedModel
) -> Response:
    """The answer, streamed or whole.

    Raises:
        RequestError: it can never be given.
        ServiceUnavailableError: not now.
    """
    check_stream_options(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidBodyError("top_logprobs: only possible with logprobs", "top_logprobs")
    if body.continue_final_message and body.messages[-1].role != "assistant":
        raise InvalidBodyError(
            "continue_final_message: the last message must be the assistant's",
            "continue_final_message",
        )
    check_room(request, model, body.num_choices)
    prompt_ids = await _encode(body, model)
    answer = _Answer(body, model, prompt_ids)
    wanted = await with_format(model, answer.wanted(), body.response_format)
    if body.stream:
        return answer.streamed(submit(request, model, wanted))
    with submitted(request, model, wanted) as exchange:
        texts = await wait_for_texts(exchange, request)
    return JSONResponse(answer.whole(texts))


async def _encode(body: ChatCompletionRequest, model: ServedModel) -> list[int]:
    messages = [
        templates.ChatMessage("system" if one.role == "developer" else one.role, one.text)
        for one in body.messages
    ]
    # A template is a program; it must not hold up the event loop.
    return await asyncio.to_thread(
        model.chat_template.encode,
        messages,
        model.tokenizer,
        continues=body.continue_final_message,
    )


class _Answer:
    """One request on its way to an answer."""

    def __init__(
        self, body: ChatCompletionRequest, model: ServedModel, prompt_ids: list[int]
    ) -> None:
        self._body = body
        self._model = model
        self._prompt_ids = prompt_ids
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model.name,
        }
        self._num_new_tokens = 0

    def wanted(self) -> list[Wanted]:
        """One continuation for each choice."""
        body, model = self._body, self._model
        room = model.engine.max_length - len(self._prompt_ids)
        if room < 1:
            raise RequestError(
                f"the model's context is {model.engine.max_length} tokens, but the messages have "
                f"{len(self._prompt_ids)}; shorten them"
            )
        max_tokens = body.max_completion_tokens or body.max_tokens or room
        num_scored = (body.top_logprobs or 0) if body.logprobs else None
        options = options_of_openai(body, max_tokens, num_scored)
        options = dataclasses.replace(options, stop_ids=model.turn_end_ids)
        return [
            Wanted(one, (*body.stops, *model.chat_template.stops))
            for one in token_requests(model, self._prompt_ids, options, body.num_choices)
        ]

    @property
    def _strips(self) -> bool:
        """A plain template ends with a colon; the space behind it is no part of the answer."""
        return self._model.chat_template.is_plain and not self._body.continue_final_message

    def whole(self, texts: list[FinishedText]) -> dict[str, Any]:
        """The answer at once."""
        strips = self._strips
        choices = [
            {
                "index": index,
                "message": {
                    "role": "assistant",
                    "content": text.text.lstrip() if strips else text.text,
                    "refusal": None,
                },
                "logprobs": self._logprobs(text.scored),
                "finish_reason": text.finish_reason,
            }
            for index, text in enumerate(texts)
        ]
        num_new_tokens = sum(text.num_tokens for text in texts)
        return {
            **self._head,
            "choices": choices,
            "usage": usage(len(self._prompt_ids), num_new_tokens),
        }

    def streamed(self, exchange: Exchange) -> EventStream:
        """The answer piece by piece."""
        self._head["object"] = "chat.completion.chunk"
        strips = [self._strips for _ in exchange.tickets]
        is_first = [True for _ in exchange.tickets]

        def chunk_of(index: int, piece: Piece) -> dict[str, Any] | None:
            self._num_new_tokens += piece.num_tokens
            text = piece.text.lstrip() if strips[index] else piece.text
            strips[index] = strips[index] and not text
            is_held_back = not text and not piece.scored and piece.finish_reason is None
            if is_held_back and not is_first[index]:
                return None
            delta: dict[str, Any] = {"role": "assistant"} if is_first[index] else {}
            if text or is_first[index]:
                delta["content"] = text
            is_first[index] = False
            choice = {
                "index": index,
                "delta": delta,
                "logprobs": self._logprobs(piece.scored),
                "finish_reason": piece.finish_reason,
            }
            chunk = {**self._head, "choices": [choice]}
            return chunk | {"usage": None} if self._body.includes_usage else chunk

        return EventStream(exchange, chunk_of, last=self._last)

    def _last(self) -> list[dict[str, Any]]:
        if not self._body.includes_usage:
            return []
        counts = usage(len(self._prompt_ids), self._num_new_tokens)
        return [{**self._head, "choices": [], "usage": counts}]

    def _logprobs(self, scored: Any) -> dict[str, Any] | None:
        return chat_logprobs(scored, self._model.token_texts) if self._body.logprobs else None
