"""Each command for a few seconds. Bounds of time are the commands' own business, on a quiet machine."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hardening import disconnects, hostile, overload, schema_fuzz, sigterm, soak
from tests.hardening.corpus import corpus
from tests.hardening.service import Service, hardening_service
from tests.logged_process import running_service


@pytest.fixture(scope="module")
def service(model_dir: Path) -> Iterator[Service]:
    # With its usual deadlines: on a busy machine a second may pass inside a client of these tests.
    with running_service(model_dir, *overload.SERVICE_OPTIONS) as (url, process):
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
