"""`/v1/embeddings`: the mean of what the model makes of a text's tokens, at length one.

The token that begins a document is the same in all texts; it counts where there is no other.
"""

import base64
import time
from collections.abc import Sequence
from typing import Any

import torch
from fastapi import Request
from fastapi.responses import JSONResponse, Response

from full_stack_transformer.errors import RequestError
from full_stack_transformer.serving.bodies import InvalidBodyError
from full_stack_transformer.serving.generation import encode, unless_gone
from full_stack_transformer.serving.models import ServedModel
from full_stack_transformer.serving.schemas import EmbeddingRequest


async def answer_embeddings(
    request: Request, body: EmbeddingRequest, model: ServedModel
) -> Response:
    """A vector for each text.

    Raises:
        RequestError: it can never be given.
        ServiceUnavailableError: not now.
    """
    state = request.app.state
    state.worker.check_room(model.engine, 1)
    token_ids = [await encode(model, text) for text in _inputs(body)]
    longest = max(map(len, token_ids))
    if longest > model.engine.max_length:
        raise RequestError(
            f"the model's context is {model.engine.max_length} tokens, but a text has {longest}; shorten it"
        )
    deadline = time.monotonic() + state.request_timeout_seconds
    states = await unless_gone(
        request.receive, state.worker.hidden_states(model.name, model.engine, token_ids, deadline)
    )
    width = states[0].shape[-1]
    if body.dimensions not in (None, width):
        raise InvalidBodyError(f"dimensions: this model's vectors have {width}", "dimensions")
    begin_id = model.tokenizer.begin_id
    words = [
        one[1:] if ids[0] == begin_id and len(ids) > 1 else one
        for one, ids in zip(states, token_ids, strict=True)
    ]
    means = torch.stack([one.float().mean(dim=0) for one in words])
    vectors = torch.nn.functional.normalize(means, dim=-1)
    num_tokens = sum(map(len, token_ids))
    return JSONResponse(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": _written(vector, body)}
                for index, vector in enumerate(vectors)
            ],
            "model": model.name,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
    )


def _inputs(body: EmbeddingRequest) -> Sequence[str | list[int]]:
    given: Any = body.input
    return [given] if isinstance(given, str) or isinstance(given[0], int) else given


def _written(vector: torch.Tensor, body: EmbeddingRequest) -> list[float] | str:
    if body.encoding_format == "base64":
        return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
    values: list[float] = vector.tolist()
    return values
