"""HTTP as bytes: send anything, and see whatever comes back."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

_TIMEOUT_SECONDS = 60.0
_SLICE_BYTES = 256 << 10


@dataclass(frozen=True)
class RawAnswer:
    """What a connection gave."""

    status: int | None
    """None when no answer came."""
    head: bytes
    body: bytes
    was_reset: bool
    seconds: float
    """Until the first byte of the answer, or the end."""

    @property
    def num_bytes(self) -> int:
        """Head and body."""
        return len(self.head) + len(self.body)


@contextlib.asynccontextmanager
async def connected(
    address: tuple[str, int],
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection that is closed at the end, whatever the end is."""
    reader, writer = await asyncio.open_connection(*address, limit=1 << 20)
    try:
        yield reader, writer
    except BaseException:
        writer.transport.abort()
        raise
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def ask_raw(
    address: tuple[str, int], data: bytes | Sequence[bytes], *, pause_seconds: float = 0.05
) -> RawAnswer:
    """Send bytes, in several parts with pauses where a sequence is given, and read one answer."""
    parts = [data] if isinstance(data, bytes) else list(data)
    started = time.perf_counter()
    head = body = b""
    was_reset = False
    seconds = 0.0
    async with connected(address) as (reader, writer):
        sending = asyncio.create_task(_send(writer, parts, pause_seconds))
        try:
            async with asyncio.timeout(_TIMEOUT_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
                seconds = time.perf_counter() - started
                while head.startswith(b"HTTP/1.1 1"):
                    head = await reader.readuntil(b"\r\n\r\n")
                body = await _read_body(reader, head)
        except asyncio.IncompleteReadError as error:
            head = head or error.partial
        except (ConnectionResetError, BrokenPipeError):
            was_reset = True
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
    status = int(head.split(b" ", 2)[1]) if head.startswith(b"HTTP/1.1 ") else None
    return RawAnswer(status, head, body, was_reset, seconds or time.perf_counter() - started)


async def _send(writer: asyncio.StreamWriter, parts: Sequence[bytes], pause_seconds: float) -> None:
    for place, part in enumerate(parts):
        if place:
            await asyncio.sleep(pause_seconds)
        # In slices: asyncio moves all that is left of a buffer after each piece that it sends.
        for start in range(0, len(part), _SLICE_BYTES):
            writer.write(part[start : start + _SLICE_BYTES])
            await writer.drain()


async def _read_body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    lowered = head.lower()
    if b"transfer-encoding: chunked" in lowered:
        body = b""
        while True:
            size = int((await reader.readline()).strip() or b"0", 16)
            chunk = await reader.readexactly(size + 2)
            if not size:
                return body
            body += chunk[:-2]
    for line in lowered.split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return await reader.readexactly(int(line.partition(b":")[2]))
    return b""


def post(path: str, body: object, *headers: str, close: bool = True) -> bytes:
    """A POST request with a JSON body, or with bytes as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: localhost", f"content-length: {len(content)}"]
    lines += ["content-type: application/json", *headers]
    lines += ["connection: close"] if close else []
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def get(path: str) -> bytes:
    """A GET request."""
    return f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()


def quantile(values: Sequence[float], part: float) -> float:
    """The value below which this part of the values lies; NaN of nothing."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


async def watch_health(address: tuple[str, int], seconds: list[float]) -> None:
    """Ask /health over and over until cancelled, and note how long each answer took."""
    while True:
        answer = await ask_raw(address, get("/health"))
        assert answer.status == 200, answer
        seconds.append(answer.seconds)
        await asyncio.sleep(0.02)
