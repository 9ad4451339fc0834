"""`/v1/completions`: texts continued, scored, or both; and the native `/generated_texts/`."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel

from full_stack_transformer.generation.requests import Piece
from full_stack_transformer.generation.sampling import ScoredToken
from full_stack_transformer.generation.token_requests import TokenRequest
from full_stack_transformer.serving.http.bodies import InvalidBodyError, body_schema, parse_body
from full_stack_transformer.serving.routes.answering import (
    OpenAIAnswer,
    Usage,
    check_room,
    encode,
    naming,
    submit,
    wait_for_texts,
)
from full_stack_transformer.serving.routes.log_probabilities import LogprobsWriter, joined
from full_stack_transformer.serving.schemas import (
    CompletionRequest,
    GeneratedTextsRequest,
    GeneratedTextsResponse,
)
from full_stack_transformer.serving.workers.models import ServedModels
from full_stack_transformer.serving.workers.served import ServedModel


class CompletionLogprobs(BaseModel):
    """Log-probabilities in the form of completions: one entry for each token in every list."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One continuation, or a piece of it when streamed."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None


class CompletionResponse(BaseModel):
    """Answer of `POST /v1/completions`, whole or one piece of the stream; for the documentation."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


def make_native_router(models: ServedModels) -> APIRouter:
    """The native route."""
    router = APIRouter(tags=["native"])

    @router.post(
        "/generated_texts/",
        response_model=GeneratedTextsResponse,
        openapi_extra=body_schema(GeneratedTextsRequest),
    )
    async def generated_texts(request: Request) -> GeneratedTextsResponse:
        """Continue a text; fewer tokens than asked for where the context has less room."""
        body = await parse_body(request, GeneratedTextsRequest)
        model = models.find(body.model)
        check_room(request, model, body.num_return_sequences)
        wanted = model.conventions.requests(
            (await encode(model, [body.seed_text], "seed_text"))[0],
            body.given(),
            max_length=model.engine.max_length,
            num_sequences=body.num_return_sequences,
            clips=True,
        )
        with submit(request, model, wanted) as exchange:
            texts = await wait_for_texts(exchange, request)
        restore = model.tokenizer.after_decoding
        return GeneratedTextsResponse(texts=[restore(text.text) for text in texts])

    return router


def add_completion_route(router: APIRouter, models: ServedModels) -> None:
    """OpenAI's route."""

    @router.post(
        "/completions",
        response_model=CompletionResponse,
        openapi_extra=body_schema(CompletionRequest),
    )
    async def complete(request: Request) -> Response:
        """Continue a text; with `stream` as server-sent events."""
        body = await parse_body(request, CompletionRequest)
        model = models.find(body.model)
        _check(body)
        answer = _CompletionAnswer(body, model)
        check_room(request, model, len(answer.prompts) * answer.num_candidates)
        prompt_ids = await encode(model, answer.prompts, "prompt")
        return await answer.send(
            request, answer.wanted(prompt_ids), num_prompt_tokens=sum(map(len, prompt_ids))
        )


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


class _CompletionAnswer(OpenAIAnswer):
    """One request on its way to an answer."""

    def __init__(self, body: CompletionRequest, model: ServedModel) -> None:
        super().__init__(
            body, model, prefix="cmpl", kind="text_completion", chunk_kind="text_completion"
        )
        self.prompts = _prompts(body)
        self.num_candidates = max(body.num_choices, body.best_of or 1)
        self._body = body
        self._prompt_ids: list[list[int]] = []
        self._writers: dict[int, LogprobsWriter] = {}

    def wanted(self, prompt_ids: list[list[int]]) -> list[TokenRequest]:
        """The candidates of the first prompt, then those of the second …"""
        self._prompt_ids = prompt_ids
        wanted: list[TokenRequest] = []
        for index, ids in enumerate(prompt_ids):
            with naming("prompt", index, of=len(prompt_ids)):
                wanted += self._candidates(ids)
                self._model.engine.check(wanted[-1])
        return wanted

    def _candidates(self, prompt_ids: list[int]) -> list[TokenRequest]:
        body, given = self._body, self._body.given()
        num_scored = body.logprobs
        if num_scored is None and self.num_candidates > body.num_choices:
            num_scored = 0  # to tell which are the best
        only_scores = body.max_tokens == 0
        if only_scores:
            given["max_new_tokens"] = None
        first, *others = self._model.conventions.requests(
            prompt_ids,
            given,
            max_length=self._model.engine.max_length,
            num_sequences=self.num_candidates,
            num_log_probabilities=num_scored,
        )
        if body.echo and body.logprobs is not None:
            first = dataclasses.replace(first, num_prompt_log_probabilities=body.logprobs)
        return [_without_new_tokens(one) if only_scores else one for one in (first, *others)]

    def choices(self, texts: list[Piece]) -> list[dict[str, Any]]:
        """The best candidates of each prompt."""
        choices: list[dict[str, Any]] = []
        for prompt_index in range(len(self.prompts)):
            first = prompt_index * self.num_candidates
            candidates = texts[first : first + self.num_candidates]
            scored_prompt = candidates[0].scored_prompt
            if self.num_candidates > self._body.num_choices:
                candidates = sorted(candidates, key=_mean_log_probability, reverse=True)
            for text in candidates[: self._body.num_choices]:
                text = dataclasses.replace(text, scored_prompt=scored_prompt)
                choices.append(self._choice(len(choices), prompt_index, text))
        return choices

    def _choice(self, index: int, prompt_index: int, text: Piece) -> dict[str, Any]:
        before = self._echoed(prompt_index)
        logprobs = None
        if self._body.logprobs is not None:
            writer = LogprobsWriter(self._model.tokenizer)
            parts = self._prompt_logprobs(writer, prompt_index, text.scored_prompt)
            logprobs = joined(*parts, writer.scored(text.scored))
        return {
            "index": index,
            "text": before + text.text,
            "logprobs": logprobs,
            "finish_reason": text.finish_reason,
        }

    def streamed_choice(
        self, index: int, text: str, piece: Piece, *, is_first: bool
    ) -> dict[str, Any]:
        """What is new of a choice; the first piece has the prompt where it is echoed."""
        parts = []
        if is_first:
            self._writers[index] = LogprobsWriter(self._model.tokenizer)
            prompt_index = index // self.num_candidates
            text = self._echoed(prompt_index) + text
            parts += self._prompt_logprobs(self._writers[index], prompt_index, piece.scored_prompt)
        parts.append(self._writers[index].scored(piece.scored))
        return {
            "index": index,
            "text": text,
            "logprobs": None if self._body.logprobs is None else joined(*parts),
            "finish_reason": piece.finish_reason,
        }

    def _prompt_logprobs(
        self, writer: LogprobsWriter, prompt_index: int, scored: Sequence[ScoredToken]
    ) -> list[dict[str, list[Any]]]:
        if not self._body.echo or self._body.logprobs is None:
            return []
        ids, prompt = self._prompt_ids[prompt_index], self.prompts[prompt_index]
        # What was put before a text here is no part of what was sent. What comes first then has no
        # log-probability, as with OpenAI.
        num_added = len(self._model.tokenizer.prefix_ids) if isinstance(prompt, str) else 0
        if not prompt:
            return []
        first = ids[num_added : num_added + 1]
        return [*map(writer.unscored, first), writer.scored(scored[num_added:])]

    def _echoed(self, prompt_index: int) -> str:
        if not self._body.echo:
            return ""
        prompt = self.prompts[prompt_index]
        return prompt if isinstance(prompt, str) else self._model.tokenizer.decode(prompt)


def _without_new_tokens(request: TokenRequest) -> TokenRequest:
    """Only to score the prompt."""
    return dataclasses.replace(
        request,
        sampling=dataclasses.replace(request.sampling, max_new_tokens=0, min_new_tokens=0),
        num_prompt_log_probabilities=request.num_prompt_log_probabilities or 0,
    )


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def _mean_log_probability(text: Piece) -> float:
    return sum(token.log_probability for token in text.scored) / max(1, len(text.scored))
