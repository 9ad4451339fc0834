"""Clients that go away at random moments: in the head, the body, the queue, the stream.

    python -m tests.hardening.disconnects --number 1000

Afterwards no slot, no place in the queue, no descriptor and no task may be missing.
"""

import argparse
import asyncio
import contextlib
import json
import random
import socket
import struct
import sys
import time
from typing import Any

from tests.hardening.raw import ask_raw, connected, post
from tests.hardening.service import Service, hardening_service

_NUM_AT_ONCE = 24
_MAX_SECONDS_TO_SETTLE = 60.0


async def go_away(service: Service, number: int) -> str:
    """One client; says how it went."""
    chance = random.Random(number)
    is_streamed = chance.random() < 0.6
    body: dict[str, Any] = {"prompt": "x" * chance.randrange(1, 60), "max_tokens": 60}
    body |= {"stream": is_streamed, "n": chance.choice((1, 1, 1, 3)), "seed": number}
    data = post("/v1/completions", body, close=False)
    is_cut = chance.random() < 0.2
    async with connected(service.address) as (reader, writer):
        with contextlib.suppress(ConnectionError):
            writer.write(data[: chance.randrange(len(data))] if is_cut else data)
            await writer.drain()
            if is_cut:
                await asyncio.sleep(chance.uniform(0, 0.05))
            else:
                with contextlib.suppress(TimeoutError, asyncio.IncompleteReadError):
                    async with asyncio.timeout(chance.uniform(0, 0.4)):
                        await reader.readexactly(chance.randrange(1, 20_000))
        if chance.random() < 0.5:  # with a reset instead of a quiet end
            raw = writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
    return "cut" if is_cut else "streamed" if is_streamed else "whole"


async def many(service: Service, number: int) -> dict[str, Any]:
    """Send them, and see what is left."""
    answer = await ask_raw(
        service.address, post("/v1/completions", {"prompt": "x", "max_tokens": 2})
    )
    assert answer.status == 200
    files_before = await asyncio.to_thread(service.num_files)
    places = asyncio.Semaphore(_NUM_AT_ONCE)
    kinds: dict[str, int] = {}

    async def one(index: int) -> None:
        async with places:
            kind = await go_away(service, index)
        kinds[kind] = kinds.get(kind, 0) + 1

    await asyncio.gather(*map(one, range(number)))
    left = await asyncio.to_thread(settled, service, files_before)
    answer = await ask_raw(
        service.address, post("/v1/completions", {"prompt": "x", "max_tokens": 2})
    )
    return {"clients": kinds, **left, "serves_after": answer.status == 200}


def settled(service: Service, files_before: int) -> dict[str, Any]:
    """What is still held once everything should be free."""
    until = time.perf_counter() + _MAX_SECONDS_TO_SETTLE
    while True:
        left = {
            "num_running": service.metric("vllm:num_requests_running"),
            "num_waiting": service.metric("vllm:num_requests_waiting"),
            "num_tasks": service.metric("fst_http_tasks") - 1,  # the one that answers
            "num_files": service.num_files() - files_before,
        }
        # The connection that asked for the metrics may be open still.
        if time.perf_counter() > until or (
            not any(list(left.values())[:3]) and left["num_files"] <= 1
        ):
            return left
        time.sleep(0.2)


def holds(report: dict[str, Any]) -> bool:
    """Whether nothing leaked."""
    return bool(
        report["serves_after"]
        and not report["num_running"]
        and not report["num_waiting"]
        and not report["num_tasks"]
        and report["num_files"] <= 1
    )


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=1000)
    parser.add_argument("--model")
    options = parser.parse_args()
    with hardening_service(options.model, "--max_batch_size", "8") as service:
        report = asyncio.run(many(service, options.number))
        print(json.dumps(report, indent=2))
    return int(not holds(report))


if __name__ == "__main__":
    sys.exit(main())
