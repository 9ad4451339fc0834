"""`/v1/completions`: texts continued, scored, or both."""

import asyncio
import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from full_stack_transformer.serving.http.bodies import InvalidBodyError
from full_stack_transformer.serving.routes.generation import (
    Exchange,
    FinishedText,
    Wanted,
    check_room,
    encode,
    options_of_openai,
    submit,
    submitted,
    token_requests,
    wait_for_texts,
)
from full_stack_transformer.serving.routes.log_probabilities import (
    CompletionLogprobsWriter,
    cut_at,
    joined,
)
from full_stack_transformer.serving.routes.streams import EventStream
from full_stack_transformer.serving.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    ResponseFormat,
)
from full_stack_transformer.serving.workers.constraints import (
    Constraint,
    any_of,
    grammar_of,
    make_vocabulary,
)
from full_stack_transformer.serving.workers.engine_worker import Piece
from full_stack_transformer.serving.workers.models import ServedModel


async def answer_completion(
    request: Request, body: CompletionRequest, model: ServedModel
) -> Response:
    """The answer, streamed or whole.

    Raises:
        RequestError: it can never be given.
        ServiceUnavailableError: not now.
    """
    _check(body)
    answer = _Answer(body, model)
    check_room(request, model, len(answer.prompts) * answer.num_candidates)
    prompt_ids = [await encode(model, prompt) for prompt in answer.prompts]
    wanted = await with_format(model, answer.wanted(prompt_ids), body.response_format)
    if body.stream:
        exchange = submit(request, model, wanted)
        return answer.streamed(exchange)
    with submitted(request, model, wanted) as exchange:
        texts = await wait_for_texts(exchange, request)
    return JSONResponse(answer.whole(texts))


def _check(body: CompletionRequest) -> None:
    if body.suffix:
        raise InvalidBodyError(
            "suffix: not supported, texts are only continued at their end; leave it out", "suffix"
        )
    if body.max_tokens == 0 and not body.echo:
        raise InvalidBodyError("max_tokens: 0 is only possible with echo", "max_tokens")
    if body.best_of is not None and body.best_of < body.num_choices:
        raise InvalidBodyError("best_of: must not be smaller than n", "best_of")
    if body.stream and (body.best_of or 1) > body.num_choices:
        raise InvalidBodyError(
            "best_of: the best ones are only known at the end; do not stream", "best_of"
        )
    check_stream_options(body)


def check_stream_options(body: CompletionRequest | ChatCompletionRequest) -> None:
    """Refuse options of a stream for what is no stream."""
    if body.stream_options is not None and not body.stream:
        raise InvalidBodyError("stream_options: only possible with stream", "stream_options")


class _Answer:
    """One request on its way to an answer."""

    def __init__(self, body: CompletionRequest, model: ServedModel) -> None:
        self.prompts = _prompts(body)
        self.num_candidates = max(body.num_choices, body.best_of or 1)
        self._body = body
        self._model = model
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.name,
        }
        self._prompt_ids: list[list[int]] = []
        self._num_new_tokens = 0

    def wanted(self, prompt_ids: list[list[int]]) -> list[Wanted]:
        """The candidates of the first prompt, then those of the second …"""
        body, self._prompt_ids = self._body, prompt_ids
        max_tokens = 16 if body.max_tokens is None else body.max_tokens
        num_scored = body.logprobs
        if num_scored is None and self.num_candidates > body.num_choices:
            num_scored = 0  # to tell which are the best
        options = options_of_openai(body, max_tokens, num_scored)
        wanted = []
        for ids in prompt_ids:
            requests = token_requests(self._model, ids, options, self.num_candidates)
            for number, one in enumerate(requests):
                scores_prompt = body.echo and number == 0
                num_prompt = body.logprobs if scores_prompt else None
                if not max_tokens:
                    num_prompt = num_prompt or 0
                one = dataclasses.replace(one, num_prompt_log_probabilities=num_prompt)
                wanted.append(Wanted(one, body.stops))
        return wanted

    def whole(self, texts: list[FinishedText]) -> dict[str, Any]:
        """The answer at once."""
        choices: list[dict[str, Any]] = []
        for number in range(len(self.prompts)):
            first = number * self.num_candidates
            candidates = texts[first : first + self.num_candidates]
            scored_prompt = candidates[0].scored_prompt
            if self.num_candidates > self._body.num_choices:
                candidates = sorted(candidates, key=_mean_log_probability, reverse=True)
            for text in candidates[: self._body.num_choices]:
                text.scored_prompt = scored_prompt
                choices.append(self._choice(len(choices), number, text))
        self._num_new_tokens = sum(text.num_tokens for text in texts)
        return {**self._head, "choices": choices, "usage": self._usage()}

    def _choice(self, index: int, prompt_number: int, text: FinishedText) -> dict[str, Any]:
        before = self._echoed(prompt_number)
        logprobs = None
        if self._body.logprobs is not None:
            writer = self._writer()
            parts = [*self._prompt_logprobs(writer, prompt_number, text.scored_prompt)]
            logprobs = joined(
                *parts, cut_at(len(before) + len(text.text), writer.scored(text.scored))
            )
        return {
            "index": index,
            "text": before + text.text,
            "logprobs": logprobs,
            "finish_reason": text.finish_reason,
        }

    def streamed(self, exchange: Exchange) -> EventStream:
        """The answer piece by piece."""
        writers = [self._writer() for _ in exchange.tickets]
        num_sent = [0 for _ in exchange.tickets]

        def chunk_of(number: int, piece: Piece) -> dict[str, Any] | None:
            self._num_new_tokens += piece.num_tokens
            prompt_number = number // self.num_candidates
            text, parts = piece.text, []
            is_held_back = not text and not piece.scored and piece.finish_reason is None
            if is_held_back and num_sent[number]:
                return None
            if not num_sent[number]:
                text = self._echoed(prompt_number) + text
                parts += self._prompt_logprobs(writers[number], prompt_number, piece.scored_prompt)
            num_sent[number] += 1
            parts.append(writers[number].scored(piece.scored))
            return self._chunk(
                {
                    "index": number,
                    "text": text,
                    "logprobs": None if self._body.logprobs is None else joined(*parts),
                    "finish_reason": piece.finish_reason,
                }
            )

        return EventStream(exchange, chunk_of, last=self._last)

    def _last(self) -> list[dict[str, Any]]:
        if not self._body.includes_usage:
            return []
        return [{**self._head, "choices": [], "usage": self._usage()}]

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._head, "choices": [choice]}
        return chunk | {"usage": None} if self._body.includes_usage else chunk

    def _writer(self) -> CompletionLogprobsWriter:
        return CompletionLogprobsWriter(self._model.tokenizer, self._model.token_texts)

    def _prompt_logprobs(
        self, writer: CompletionLogprobsWriter, prompt_number: int, scored: Sequence[Any]
    ) -> list[dict[str, list[Any]]]:
        if not self._body.echo or self._body.logprobs is None:
            return []
        ids = self._prompt_ids[prompt_number]
        # The token that begins a document was put before a text here; it is no part of what was sent.
        is_text = isinstance(self.prompts[prompt_number], str)
        return [*([] if is_text else [writer.unscored(ids[0])]), writer.scored(scored)]

    def _echoed(self, prompt_number: int) -> str:
        if not self._body.echo:
            return ""
        prompt = self.prompts[prompt_number]
        return prompt if isinstance(prompt, str) else self._model.tokenizer.decode(prompt)

    def _usage(self) -> dict[str, int]:
        num_prompt = sum(map(len, self._prompt_ids))
        return usage(num_prompt, self._num_new_tokens)


def usage(num_prompt_tokens: int, num_new_tokens: int) -> dict[str, int]:
    """Tokens read and made."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_new_tokens,
        "total_tokens": num_prompt_tokens + num_new_tokens,
    }


async def with_format(
    model: ServedModel, wanted: list[Wanted], response_format: ResponseFormat | None
) -> list[Wanted]:
    """The same continuations, each held to the format.

    Raises:
        RequestError: the format cannot be followed.
    """
    if response_format is None or response_format.type == "text":
        return wanted
    # Compiling a large schema takes a second.
    return await asyncio.to_thread(_held, model, wanted, response_format)


def _held(
    model: ServedModel, wanted: list[Wanted], response_format: ResponseFormat
) -> list[Wanted]:
    grammar = grammar_of(response_format)
    vocabulary = make_vocabulary(model.tokenizer)
    held = []
    for one in wanted:
        constraint = Constraint(grammar, vocabulary, one.request.stop_ids)
        forbids = any_of(one.request.forbids, constraint.forbids)
        held.append(
            dataclasses.replace(one, request=dataclasses.replace(one.request, forbids=forbids))
        )
    return held


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def _mean_log_probability(text: FinishedText) -> float:
    return sum(one.log_probability for one in text.scored) / max(1, len(text.scored))
