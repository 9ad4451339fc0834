"""Clients that ask a service without a pause, and what became of each request."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Outcome:
    """One streamed completion."""

    asked: float
    """By time.monotonic()."""
    ended: float = 0.0
    status: int = 0
    num_pieces: int = 0
    is_whole: bool = False
    error: str = ""
    """An event of the stream, or what httpx raised."""


@dataclass
class Load:
    """What clients have seen so far."""

    outcomes: list[Outcome] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """When each piece arrived."""
    has_ended: bool = False

    @property
    def failed(self) -> list[Outcome]:
        """Requests that did not end as they should."""
        return [one for one in self.outcomes if not one.is_whole]

    def pieces_between(self, begin: float, end: float) -> int:
        """Pieces that arrived then, most of one token."""
        return sum(begin <= one < end for one in self.times)


@asynccontextmanager
async def under_load(
    url: str,
    *,
    num_clients: int,
    length: int,
    prompts: Sequence[str] = ("The reader", "A small word"),
    headers: dict[str, str] | None = None,
) -> AsyncIterator[Load]:
    """Streams of `num_clients` clients inside the `with`; all have ended after it."""
    load = Load()

    async def client(http: httpx.AsyncClient, number: int) -> None:
        while not load.has_ended:
            number += num_clients
            body = {"model": "tiny-model", "prompt": prompts[number % len(prompts)]}
            load.outcomes.append(await _ask(http, body | {"max_tokens": length}, load))

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=120, limits=limits) as http:
        clients = [asyncio.create_task(client(http, number)) for number in range(num_clients)]
        try:
            yield load
        finally:
            load.has_ended = True
            await asyncio.gather(*clients)


async def _ask(http: httpx.AsyncClient, body: dict[str, Any], load: Load) -> Outcome:
    outcome = Outcome(time.monotonic())
    try:
        async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            outcome.status = answer.status_code
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    outcome.is_whole = True
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    if "choices" in event:
                        outcome.num_pieces += 1
                        load.times.append(time.monotonic())
                    outcome.error = event.get("error", {}).get("message", "")
                elif line:
                    outcome.error = line
    except httpx.HTTPError as error:
        outcome.error = repr(error)
    outcome.ended = time.monotonic()
    return outcome
