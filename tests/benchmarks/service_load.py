"""Streaming clients of any OpenAI-compatible server: how many tokens a second, and how soon.

Knows `/v1/completions` with `stream`, and no particular server.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tests.hardening.raw import quantile


@dataclass
class LoadFigures:
    """What some clients saw together."""

    num_clients: int
    num_tokens: int = 0
    seconds: float = 0.0
    first_token_seconds: list[float] = field(default_factory=list)
    inter_token_seconds: list[float] = field(default_factory=list)
    """Of each text: from its first to its last token, for each token after the first."""

    def summary(self) -> dict[str, float]:
        """Tokens a second, and milliseconds."""
        return {
            "tokens_per_second": round(self.num_tokens / self.seconds, 1),
            "first_token_p50_ms": round(1000 * quantile(self.first_token_seconds, 0.5), 1),
            "first_token_p95_ms": round(1000 * quantile(self.first_token_seconds, 0.95), 1),
            "inter_token_p50_ms": round(1000 * quantile(self.inter_token_seconds, 0.5), 2),
            "inter_token_p95_ms": round(1000 * quantile(self.inter_token_seconds, 0.95), 2),
        }


async def stream_with_clients(
    url: str,
    model: str,
    prompts: Sequence[str],
    *,
    num_clients: int,
    num_new_tokens: int,
    extra: dict[str, Any],
) -> LoadFigures:
    """Every prompt once, by so many clients at once."""
    figures = LoadFigures(num_clients)
    waiting = list(reversed(prompts))
    started = time.perf_counter()

    async def client() -> None:
        while waiting:
            body = {"model": model, "prompt": waiting.pop(), "max_tokens": num_new_tokens}
            body |= {"stream": True, "temperature": 0} | extra
            await _stream(url, body, figures)

    await asyncio.gather(*(client() for _ in range(num_clients)))
    figures.seconds = time.perf_counter() - started
    return figures


async def _stream(url: str, body: dict[str, Any], figures: LoadFigures) -> None:
    address = urlsplit(url)
    content = json.dumps(body).encode()
    asked = time.perf_counter()
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(content) + content
    )
    first = last = 0.0
    finish_reason = None
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        if "error" in chunk:
            raise RuntimeError(f"{url}: {chunk['error']}")
        for choice in chunk["choices"]:
            if choice.get("text"):
                last = time.perf_counter()
                first = first or last
            finish_reason = choice.get("finish_reason") or finish_reason
    writer.close()
    if finish_reason != "length":
        raise RuntimeError(f"{url}: a text ended with {finish_reason}, not at its length")
    num_tokens = body["max_tokens"]
    figures.num_tokens += num_tokens
    figures.first_token_seconds.append(first - asked)
    figures.inter_token_seconds.append((last - first) / (num_tokens - 1))
