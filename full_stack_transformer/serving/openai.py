"""OpenAI-compatible routes: `/v1/models` and `/v1/completions`, streamed and not."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from full_stack_transformer.errors import FullStackTransformerError
from full_stack_transformer.serving.bodies import body_schema, parse_body
from full_stack_transformer.serving.engine_worker import EngineWorker
from full_stack_transformer.serving.generation import (
    merged_pieces,
    options_of,
    submitted,
    wait_for_texts,
)
from full_stack_transformer.serving.schemas import (
    CompletionChoice,
    CompletionRequest,
    CompletionResponse,
    CompletionUsage,
    ErrorDetail,
    ErrorResponse,
    ModelCard,
    ModelList,
)


def make_openai_router(worker: EngineWorker) -> APIRouter:
    """The routes below `/v1`."""
    router = APIRouter(prefix="/v1", tags=["OpenAI-compatible"])
    started = int(time.time())

    @router.get("/models")
    async def list_models() -> ModelList:
        """The model that is served."""
        return ModelList(data=[ModelCard(id=worker.model.name, created=started)])

    @router.post(
        "/completions",
        response_model=CompletionResponse,
        openapi_extra=body_schema(CompletionRequest),
    )
    async def complete(request: Request) -> Response:
        """Continue a text; with `stream` as server-sent events."""
        body = await parse_body(request, CompletionRequest)
        head: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": worker.model.name,
        }
        if body.stream:
            return await _streaming_response(worker, body, head)
        with submitted(worker, body.prompt, options_of(body), body.n) as tickets:
            texts = await wait_for_texts(tickets, request)
            num_prompt_tokens = len(tickets[0].token_request.prompt_ids)
        before = body.prompt if body.echo else ""
        num_new_tokens = sum(text.num_tokens for text in texts)
        answer = CompletionResponse(
            **head,
            choices=[
                CompletionChoice(
                    index=index,
                    text=before + text.text,
                    finish_reason="stop" if text.finish_reason == "stop" else "length",
                )
                for index, text in enumerate(texts)
            ],
            usage=CompletionUsage(
                prompt_tokens=num_prompt_tokens,
                completion_tokens=num_new_tokens,
                total_tokens=num_prompt_tokens + num_new_tokens,
            ),
        )
        return JSONResponse(answer.model_dump())

    return router


async def _streaming_response(
    worker: EngineWorker, body: CompletionRequest, head: dict[str, Any]
) -> Response:
    events = _stream(worker, body, head)
    # The first event is made here: an impossible request then still gets its status.
    first = await anext(events)

    async def all_events() -> AsyncIterator[bytes]:
        yield first
        async for event in events:
            yield event

    return StreamingResponse(
        all_events(), media_type="text/event-stream", headers={"cache-control": "no-store"}
    )


async def _stream(
    worker: EngineWorker, body: CompletionRequest, head: dict[str, Any]
) -> AsyncIterator[bytes]:
    with submitted(worker, body.prompt, options_of(body), body.n) as tickets:
        if body.echo:
            for index in range(body.n):
                yield _event(_chunk(head, index, body.prompt, None))
        try:
            async for index, piece in merged_pieces(tickets):
                yield _event(_chunk(head, index, piece.text, piece.finish_reason))
        except FullStackTransformerError as error:
            # The status has been sent already; the stream itself says what happened.
            detail = ErrorDetail(message=str(error), type="server_error")
            yield _event(ErrorResponse(error=detail).model_dump())
            return
    yield b"data: [DONE]\n\n"


def _chunk(head: dict[str, Any], index: int, text: str, finish_reason: Any) -> dict[str, Any]:
    choice = CompletionChoice(index=index, text=text, finish_reason=finish_reason)
    return CompletionResponse(**head, choices=[choice]).model_dump(exclude={"usage"})


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()
