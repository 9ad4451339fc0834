"""What the service takes: after its start, after many chats at once, after a long one, under a limit or not.

    python -m tests.hardening.memory --model MODEL --weights_dtype int8 --group_bytes 2e9

Prints resident memory. Under a limit (a control group, which root can make, or `ulimit -v`) fewer texts are
computed at once; every stream must still end as it ends alone, byte for byte, and the process must live.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.hardening.service import Service
from tests.logged_process import LoggedProcess

_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUPS_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Limits:
    """Bytes that the service may have; 0 for no limit."""

    group_bytes: int = 0
    """Of the memory of its control group."""
    address_bytes: int = 0
    """Of its address space."""


@contextlib.contextmanager
def limited_service(
    model: Path, limits: Limits, *options: str, num_threads: int = 1
) -> Iterator[Service]:
    """`fst serve` under limits.

    Raises:
        OSError: this process may make no control group.
    """
    words = [sys.executable, "-m", "full_stack_transformer", "serve", str(model)]
    words += ["--port", "0", "--device", "cpu", *options]
    with contextlib.ExitStack() as stack:
        before = ""
        if limits.group_bytes:
            group = stack.enter_context(_control_group(limits.group_bytes))
            before += f"echo $$ > {group}/cgroup.procs && "
        if limits.address_bytes:
            before += f"ulimit -v {limits.address_bytes // 1024} && "
        environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
        command = ["bash", "-c", f"{before}exec {shlex.join(words)}"]
        process = LoggedProcess(command, "serving ", environment)
        stack.callback(process.kill)
        address = re.search(r"http://[0-9.]+:[0-9]+", process.start())
        assert address is not None
        yield Service(address.group(), process)


@contextlib.contextmanager
def _control_group(num_bytes: int) -> Iterator[Path]:
    """A group below our own, for this long; of the version that limits memory here."""
    lines = [line.split(":", 2) for line in _OWN_GROUPS.read_text().splitlines()]
    own = {names: path.lstrip("/") for _, names, path in lines}
    if "memory" in own:
        parent, limit = _GROUPS_ROOT / "memory" / own["memory"], "memory.limit_in_bytes"
    else:
        parent, limit = _GROUPS_ROOT / own.get("", ""), "memory.max"
    group = parent / f"fst_memory_{os.getpid()}"
    group.mkdir()
    try:
        (group / limit).write_text(str(num_bytes))
        yield group
    finally:
        while True:  # the last process may still be leaving
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.05)


@dataclass
class Report:
    """Megabytes of resident memory, and what came out."""

    started_megabytes: float
    after_chats_megabytes: float = 0.0
    after_long_chat_megabytes: float = 0.0
    num_blocks: float = 0.0
    num_put_back: float = 0.0
    num_wrong: int = 0
    """Streams that ended otherwise than alone."""
    warnings: tuple[str, ...] = ()


def measure(
    service: Service,
    *,
    num_chats: int,
    num_tokens: int,
    num_new: int,
    num_long_tokens: int = 0,
    checks: bool = True,
) -> Report:
    """Streams of so many tokens at once, each of its own prompt, and then a long one.

    Args:
        service: that is asked.
        num_chats: streams at once.
        num_tokens: of each, prompt and answer together.
        num_new: of the answer.
        num_long_tokens: of the long one; 0 for none.
        checks: compare each with what comes alone.
    """
    report = Report(service.memory_bytes() / 1e6)
    with httpx.Client(base_url=service.url, timeout=3600) as client:
        model = client.get("/v1/models").json()["data"][0]["id"]
        bodies = [
            _body(model, number, num_tokens - num_new, num_new) for number in range(num_chats)
        ]
        with ThreadPoolExecutor(num_chats) as threads:
            together = list(threads.map(lambda body: _stream(service.url, body), bodies))
        report.after_chats_megabytes = service.memory_bytes() / 1e6
        if num_long_tokens:
            long = _body(model, 99, num_long_tokens - 20, 20)
            assert _stream(service.url, long)[1] == "length"
            report.after_long_chat_megabytes = service.memory_bytes() / 1e6
        if checks:
            report.num_wrong = sum(
                found != _stream(service.url, body)
                for found, body in zip(together, bodies, strict=True)
            )
        report.num_wrong += sum(reason != "length" for _, reason in together)
    report.num_blocks = service.metric("fst_kv_blocks")
    report.num_put_back = service.metric("vllm:num_preemptions_total")
    lines = service.process.log.splitlines()
    report.warnings = tuple(line for line in lines if "memory holds" in line)
    return report


def _body(model: str, number: int, num_prompt: int, num_new: int) -> dict[str, Any]:
    """Token ids, so that their number is known on any vocabulary of at least 250."""
    return {
        "model": model,
        "prompt": [20 + (17 * place * (number + 3)) % 230 for place in range(num_prompt)],
        "max_tokens": num_new,
        "min_tokens": num_new,
        "temperature": 0.8,
        "seed": number,
        "stream": True,
    }


def _stream(url: str, body: dict[str, Any]) -> tuple[str, str | None]:
    """Text and finish reason, read by a connection of its own."""
    text, reason = "", None
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=3600) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                [choice] = event["choices"]
                text += choice["text"]
                reason = choice["finish_reason"] or reason
    return text, reason


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a stream was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--weights_dtype", default="auto")
    parser.add_argument("--kv_dtype", default="auto")
    parser.add_argument("--num_chats", type=int, default=32)
    parser.add_argument("--num_tokens", type=int, default=1000)
    parser.add_argument("--num_new", type=int, default=100)
    parser.add_argument("--num_long_tokens", type=int, default=8000)
    parser.add_argument("--group_bytes", type=float, default=0)
    parser.add_argument("--address_bytes", type=float, default=0)
    parser.add_argument("--checks", action=argparse.BooleanOptionalAction, default=True)
    given = parser.parse_args(words)
    limits = Limits(int(given.group_bytes), int(given.address_bytes))
    options = ("--weights_dtype", given.weights_dtype, "--kv_dtype", given.kv_dtype)
    more = ("--request_timeout_seconds", "3600")
    with limited_service(given.model, limits, *options, *more, num_threads=2) as service:
        report = measure(
            service,
            num_chats=given.num_chats,
            num_tokens=given.num_tokens,
            num_new=given.num_new,
            num_long_tokens=given.num_long_tokens,
            checks=given.checks,
        )
    print(json.dumps(vars(given) | asdict(report), indent=2, default=str))
    return int(report.num_wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
