"""Replicas on Ray against one service: speed, prefix caches, and what the death of a replica costs.

    python -m tests.benchmarks.replicas [--short]

`plain` is `fst serve`, `one` and `two` are replicas on a cluster of Ray, with a core each and a front before
them; they take turns (A B A B), and ratios are of the tokens/s that clients see. Then prompts with twenty
beginnings are asked of two replicas with --routing beginning and queue: the part of the prompts' tokens that
was not read again. Then one of two replicas is killed -9 under load. The last line is JSON, with aims.

Clients, front and Ray want cores of their own: on two cores two replicas cannot be faster than one. --short
is one run of two seconds each, without --routing queue.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import statistics
import string
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

from full_stack_transformer.machine import processor_name
from tests.benchmarks.machine import NUM_CORES, commit
from tests.logged_process import LoggedProcess
from tests.ray_nodes import RayNodes, ray_nodes
from tests.serving.balanced_load import Load, under_load
from tests.serving.tiny_model import make_tiny_model

# Tokens/s of one replica to `fst serve`, of two to one; how much oftener a beginning is found. For a model so
# small that Ray is most of the work, on two cores.
_AIMS = {"ray": 0.2, "two": 0.9, "prefix_hits": 1.2}
_NUM_BEGINNINGS, _NUM_EACH = 20, 4
_NUM_CLIENTS = 8
# Of the throughput before; the windows are long, as other work runs on such machines.
_PART_THAT_IS_BACK, _WINDOW_SECONDS = 0.8, 1.0


def main() -> None:
    """Measure, and print a line for each run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true", help="one run of two seconds each")
    is_short = parser.parse_args().short
    seconds, num_rounds = (2.0, 1) if is_short else (10.0, 5)
    with (
        tempfile.TemporaryDirectory(prefix="fst-replicas-") as place,
        ray_nodes(1, num_cpus=8) as nodes,
        contextlib.ExitStack() as stack,
    ):
        model = make_tiny_model(Path(place), max_length=1024)
        urls = _start_all(stack, model, nodes, compares_routing=not is_short)
        rates: dict[str, list[float]] = {"plain": [], "one": [], "two": []}
        for _ in range(num_rounds):
            for name, found in rates.items():
                found.append(asyncio.run(_tokens_per_second(urls[name], seconds)))
                print(f"{name}: {found[-1]:,.0f} tokens/s", flush=True)
        compared = ("two",) if is_short else ("two", "queue")
        hits = {name: asyncio.run(_prefix_hits(urls[name])) for name in compared}
        print(f"tokens of prompts not read again: {hits}", flush=True)
        death = asyncio.run(_death(urls["two"], nodes, seconds, waits=not is_short))
        print(f"a replica is killed: {death}", flush=True)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    print(f"{processor_name()}, {NUM_CORES} cores, ray {version('ray')}, commit {commit()}")
    ratios = {
        "ray": round(medians["one"] / medians["plain"], 3),
        "two": round(medians["two"] / medians["one"], 3),
    }
    if "queue" in hits:
        ratios["prefix_hits"] = round(hits["two"] / hits["queue"], 3)
    aims = {name: _AIMS[name] for name in ratios}
    report = {"benchmark": "replicas", "ratios": ratios, "aims": aims}
    print(json.dumps(report | {"prefix_hits": hits, "death": death}))


def _start_all(
    stack: contextlib.ExitStack, model: Path, nodes: RayNodes, *, compares_routing: bool
) -> dict[str, str]:
    """Addresses of the services, started at once."""
    on_ray = ("--ray_address", nodes.address)
    options: dict[str, tuple[str, ...]] = {
        "plain": (),
        "one": (*on_ray, "--replicas", "1"),
        "two": (*on_ray, "--replicas", "2"),
    }
    if compares_routing:
        options["queue"] = (*on_ray, "--replicas", "2", "--routing", "queue")
    with ThreadPoolExecutor(len(options)) as threads:
        entered = {
            name: threads.submit(stack.enter_context, _serving(model, nodes, *some))
            for name, some in options.items()
        }
        return {name: one.result() for name, one in entered.items()}


@contextlib.contextmanager
def _serving(model: Path, nodes: RayNodes, *options: str) -> Iterator[str]:
    command = [sys.executable, "-m", "full_stack_transformer", "serve", str(model), "--port", "0"]
    process = LoggedProcess([*command, "--device", "cpu", *options], "serving ", nodes.environment)
    try:
        address = re.search(r"http://[0-9.]+:[0-9]+", process.start())
        assert address is not None, process.log
        yield address.group()
    finally:
        process.kill()


async def _tokens_per_second(url: str, seconds: float) -> float:
    async with under_load(url, num_clients=_NUM_CLIENTS, length=200) as load:
        await asyncio.sleep(1)
        begin = time.monotonic()
        await asyncio.sleep(seconds)
        end = time.monotonic()
    assert not load.failed
    return load.pieces_between(begin, end) / (end - begin)


async def _prefix_hits(url: str) -> float:
    """The part of the tokens of prompts that replicas had read before."""
    dice = random.Random(0)
    beginnings = [
        "".join(dice.choices(string.ascii_lowercase, k=500)) for _ in range(_NUM_BEGINNINGS)
    ]
    prompts = [f"{text} {number}" for number in range(_NUM_EACH) for text in beginnings]
    before = await _cache_counts(url)
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        for start in range(0, len(prompts), 4):
            bodies = [
                {"model": "tiny-model", "prompt": prompt, "max_tokens": 4}
                for prompt in prompts[start : start + 4]
            ]
            answers = await asyncio.gather(
                *(http.post("/v1/completions", json=body) for body in bodies)
            )
            assert {answer.status_code for answer in answers} == {200}
    after = await _cache_counts(url)
    return round((after[0] - before[0]) / (after[1] - before[1]), 3)


async def _cache_counts(url: str) -> tuple[float, float]:
    async with httpx.AsyncClient(base_url=url) as http:
        text = (await http.get("/metrics")).text

    def total(name: str) -> float:
        lines = re.findall(rf"^vllm:prefix_cache_{name}_total\{{.*\}} (\S+)$", text, re.MULTILINE)
        return sum(map(float, lines))

    return total("hits"), total("queries")


async def _death(url: str, nodes: RayNodes, seconds: float, *, waits: bool) -> dict[str, Any]:
    """What clients feel when one of two replicas is killed."""
    port = url.rpartition(":")[2]
    replicas = [
        process
        for process in nodes.nodes[0].workers
        if f"ServeReplica:fst-{port}:" in process.cmdline()[0]
    ]
    assert len(replicas) == 2
    async with under_load(url, num_clients=_NUM_CLIENTS, length=200) as load:
        await asyncio.sleep(seconds + 1)
        killed = time.monotonic()
        replicas[0].kill()
        replaced = await _seconds_until_two(url, killed) if waits else None
        await asyncio.sleep(seconds + 2 * _WINDOW_SECONDS)
        end = time.monotonic()
    before = load.pieces_between(killed - seconds, killed) / seconds
    return {
        "requests": len(load.outcomes),
        "failed_in_flight": sum(one.asked <= killed for one in load.failed),
        "with_error_event": sum(one.status == 200 and bool(one.error) for one in load.failed),
        "failed_after": sum(one.asked > killed for one in load.failed),
        "seconds_until_throughput_is_back": _seconds_until_back(load, killed, end, before),
        "seconds_until_replaced": replaced,
    }


async def _seconds_until_two(url: str, since: float) -> float:
    await asyncio.sleep(1)
    async with httpx.AsyncClient(base_url=url) as http:
        while (await http.get("/metrics")).text.count("\ntgi_queue_size{") < 2:
            await asyncio.sleep(0.2)
    return round(time.monotonic() - since, 1)


def _seconds_until_back(load: Load, killed: float, end: float, before: float) -> float | None:
    """When a window begins with nearly the throughput from before; none if none does."""
    wanted = _PART_THAT_IS_BACK * before * _WINDOW_SECONDS
    begin = killed
    while begin + _WINDOW_SECONDS < end:
        if load.pieces_between(begin, begin + _WINDOW_SECONDS) >= wanted:
            return round(begin - killed, 1)
        begin += 0.1
    return None


if __name__ == "__main__":
    main()
