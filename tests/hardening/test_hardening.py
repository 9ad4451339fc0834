"""Each command for a few seconds. Bounds of time are the commands' own business, on a quiet machine."""

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hardening import disconnects, hostile, memory, overload, schema_fuzz, sigterm, soak
from tests.hardening.corpus import corpus
from tests.hardening.service import (
    Service,
    adapter_options,
    hardening_service,
    write_small_adapter,
)
from tests.logged_process import running_service


@pytest.fixture(scope="module")
def service(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    # With its usual deadlines: on a busy machine a second may pass inside a client of these tests.
    root = tmp_path_factory.mktemp("adapters")
    write_small_adapter(root, model_dir)
    options = adapter_options(root)
    with running_service(model_dir, *overload.SERVICE_OPTIONS, *options) as (url, process):
        yield Service(url, process)
        assert process.stop() == 0
        assert "Traceback" not in process.log


def test_hundreds_of_hostile_requests_get_short_answers(model_dir: Path) -> None:
    requests = corpus()
    assert len(requests) >= 300
    with hardening_service(model_dir) as service:
        report = asyncio.run(hostile.send_corpus(service, requests))
        assert service.process.stop() == 0
    assert report.faults == []
    assert report.health_seconds
    assert "Traceback" not in service.process.log


def test_bodies_that_nearly_fit_get_short_answers(service: Service) -> None:
    report = asyncio.run(schema_fuzz.send_near_misses(service, 60))
    assert report.faults == []
    assert {"200", "400", "422"} <= set(report.statuses)


def test_clients_that_go_away_leave_nothing_behind(service: Service) -> None:
    report = asyncio.run(disconnects.many(service, 60))
    assert disconnects.holds(report), report


@pytest.mark.skipif(sys.platform != "linux", reason="needs ulimit -v")
def test_little_memory_loses_nobody(model_dir: Path) -> None:
    """32 streams in an address space of 2 GB, with blocks for two texts."""
    limits = memory.Limits(address_bytes=2_000_000_000)
    with memory.limited_service(model_dir, limits, "--kv_memory", "300kB") as service:
        report = memory.measure(service, num_chats=32, num_tokens=90, num_new=25)
        assert service.process.stop() == 0
    assert report.num_wrong == 0
    assert any("memory holds" in line for line in report.warnings)


def test_overload_is_refused_and_slow_sockets_hurt_nobody(service: Service) -> None:
    report = asyncio.run(overload.measure(service, 1.5, 50, factor=6))
    assert report["others"] == []
    assert report["num_served"] > 0


def test_mixed_load_is_served(service: Service) -> None:
    report = asyncio.run(soak.soak(service, 3))
    assert set(report.statuses) <= {"200", "400", "404", "429", "went away"}


def test_sigterm_in_the_middle_truncates_nothing(model_dir: Path) -> None:
    report = sigterm.stop_in_the_middle(model_dir, 1)
    assert sigterm.holds(report), report
