"""SIGTERM in the middle of work, again and again.

    python -m tests.hardening.sigterm --times 50

Each stream must end with [DONE] or with an error that says why, each whole answer must be whole, the exit
code must be 0 within the deadline, and no process may be left.
"""

import argparse
import asyncio
import json
import random
import re
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.hardening.raw import connected, post
from tests.hardening.service import Service, hardening_service
from tests.serving.tiny_model import make_tiny_model

_NUM_CLIENTS = 12
_SHUTDOWN_SECONDS = 1.0


@dataclass
class EndReport:
    """How requests ended."""

    ends: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    exit_codes: dict[str, int] = field(default_factory=dict)
    longest_seconds: float = 0.0

    def note(self, end: str) -> None:
        """Count an end."""
        self.ends[end] = self.ends.get(end, 0) + 1
        if end.startswith("truncated"):
            self.faults.append(end)


async def ask_until_end(service: Service, number: int, report: EndReport) -> None:
    """Ask over and over until the service takes no more connections."""
    chance = random.Random(number)
    while True:
        is_streamed = chance.random() < 0.6
        body: dict[str, Any] = {"prompt": "x", "max_tokens": chance.randrange(20, 120)}
        body |= {"stream": is_streamed, "min_tokens": body["max_tokens"]}
        try:
            async with connected(service.address) as (reader, writer):
                writer.write(post("/v1/completions", body))
                received = await reader.read(-1)
        except ConnectionError:
            # Refused, or waiting to be accepted when the end came: nothing had begun.
            report.note("not accepted")
            return
        report.note(_end_of(received, is_streamed))
        if not received:
            return


def _end_of(received: bytes, is_streamed: bool) -> str:
    head, _, body = received.partition(b"\r\n\r\n")
    if not received:
        return "not begun"
    if not head.startswith(b"HTTP/1.1 200"):
        status = head.split(b" ", 2)[1].decode()
        said = json.loads(body)["error"]["message"]
        return f"{status}: {said}"
    if not is_streamed:
        [length] = re.findall(rb"content-length: (\d+)", head.lower())
        return "whole" if len(body) == int(length) else "truncated answer"
    if not body.endswith(b"0\r\n\r\n"):
        return "truncated stream"
    if b"data: [DONE]" in body:
        return "streamed"
    found = re.findall(rb'"message":"([^"]*)"', body)
    return f"error event: {found[0].decode()}" if found else "truncated without a reason"


async def _work_then_stop(service: Service, seconds: float, report: EndReport) -> None:
    clients = [
        asyncio.create_task(ask_until_end(service, number, report))
        for number in range(_NUM_CLIENTS)
    ]
    await asyncio.sleep(seconds)
    service.process.send_signal(signal.SIGTERM)
    await asyncio.gather(*clients)


def stop_in_the_middle(model: Path, times: int) -> EndReport:
    """Start, work, stop, and look; so many times."""
    report, chance = EndReport(), random.Random(0)
    for _ in range(times):
        with hardening_service(model, "--shutdown_seconds", str(_SHUTDOWN_SECONDS)) as service:
            children = psutil.Process(service.process.pid).children(recursive=True)
            asyncio.run(_work_then_stop(service, chance.uniform(0.1, 1.0), report))
            started = time.perf_counter()
            exit_code = service.process.wait()
            report.longest_seconds = max(report.longest_seconds, time.perf_counter() - started)
            report.exit_codes[str(exit_code)] = report.exit_codes.get(str(exit_code), 0) + 1
            report.faults += [f"left: {child}" for child in children if child.is_running()]
            if "Traceback" in service.process.log:
                report.faults.append(service.process.log)
    return report


def holds(report: EndReport) -> bool:
    """Whether every end was a good one."""
    return not report.faults and set(report.exit_codes) == {"0"}


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        report = stop_in_the_middle(make_tiny_model(Path(directory)), options.times)
    print(json.dumps(vars(report), indent=2))
    return int(not holds(report) or report.longest_seconds > 10)


if __name__ == "__main__":
    sys.exit(main())
