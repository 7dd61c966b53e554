"""Which workers a set of EndpointSlices names.

Covered: conditions, ports, address families, endpoints in two slices, malformed objects. Not covered: lists and watches
(tests/runtime/kube) and what the router does with the workers (test_routing.py).
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from router.core.worker_state import Intake
from router.discovery.discovered import DiscoveredWorker, DiscoveredWorkers
from router.discovery.endpointslices import discovered_workers, read_slice
from tests.router.discovery.slices import PORTS, endpoint, endpoint_slice

FEED = (*PORTS, {"name": "feed", "port": 8101, "protocol": "TCP"})


def workers(*slices: dict[str, Any]) -> DiscoveredWorkers:
    """The workers, which do not depend on the order of the slices."""
    read = [read_slice(each) for each in slices]
    found = discovered_workers(read)
    for _ in range(3):
        random.shuffle(read)
        assert discovered_workers(read) == found
    return found


def test_a_ready_pod_is_a_worker() -> None:
    assert workers(endpoint_slice("a", endpoint("10.0.0.1", "w-1", ready=True, serving=True, terminating=False))) == {
        "http://10.0.0.1:8100": DiscoveredWorker(Intake.OPEN, None, "w-1", "uid-w-1")
    }


@pytest.mark.parametrize(
    ("conditions", "intake"),
    [
        pytest.param({}, Intake.OPEN, id="none"),
        pytest.param({"ready": None}, Intake.OPEN, id="ready unknown"),
        pytest.param({"ready": True}, Intake.OPEN, id="ready"),
        pytest.param({"ready": False}, Intake.CLOSED, id="not ready"),
        pytest.param({"ready": False, "serving": False, "terminating": False}, Intake.CLOSED, id="not serving"),
        pytest.param(
            {"ready": False, "serving": True, "terminating": True}, Intake.DRAINING, id="terminating, serving"
        ),
        pytest.param(
            {"ready": False, "serving": False, "terminating": True}, Intake.CLOSED, id="terminating, not serving"
        ),
        pytest.param({"ready": False, "terminating": True}, Intake.CLOSED, id="terminating"),
        pytest.param(
            {"ready": True, "serving": True, "terminating": True},
            Intake.DRAINING,
            id="terminating, published not ready",
        ),  # a Service that publishes not ready
        pytest.param({"ready": True, "serving": None, "terminating": None}, Intake.OPEN, id="ready, others unknown"),
    ],
)
def test_conditions(conditions: dict[str, bool | None], intake: Intake) -> None:
    found = workers(endpoint_slice("a", endpoint("10.0.0.1", "w-1", **conditions)))
    assert found == {"http://10.0.0.1:8100": DiscoveredWorker(intake, None, "w-1", "uid-w-1")}


@pytest.mark.parametrize(
    "harmless",
    [
        endpoint_slice("b"),
        endpoint_slice("b", endpoint("", addresses=[])),
        endpoint_slice("b", endpoint("10.0.0.9"), ports=None),
        endpoint_slice("b", endpoint("10.0.0.9"), ports=()),
        endpoint_slice("b", endpoint("10.0.0.9"), ports=[{"name": "http", "port": None}]),
        endpoint_slice("b", endpoint("10.0.0.9"), ports=[{"name": "http", "port": 8100, "protocol": "UDP"}]),
        endpoint_slice("b", endpoint("10.0.0.9"), ports=[{"name": "metrics", "port": 1}]),
        endpoint_slice("b", endpoint("10.0.0.9"), ports=[{"name": "", "port": 1}, {"name": "b", "port": 2}]),
        endpoint_slice("b", endpoint("10.0.0.9"), family="Carrier Pigeon"),
    ],
    ids=["empty", "no-address", "null-ports", "no-ports", "no-number", "udp", "other-port", "unnamed-of-two", "family"],
)
def test_slices_that_name_no_worker_do_no_harm(harmless: dict[str, Any]) -> None:
    assert list(workers(endpoint_slice("a", endpoint("10.0.0.1")), harmless)) == ["http://10.0.0.1:8100"]


@pytest.mark.parametrize(
    "ports",
    [
        pytest.param([{"port": 8000}], id="no name"),
        pytest.param([{"name": None, "port": 8000}], id="null"),
        pytest.param([{"name": "", "port": 8000}], id="empty"),
    ],
)
def test_the_only_port_needs_no_name(ports: list[dict[str, Any]]) -> None:
    assert list(workers(endpoint_slice("a", endpoint("10.0.0.1"), ports=ports))) == ["http://10.0.0.1:8000"]


def test_other_ports_are_left_aside() -> None:
    ports = [{"name": "metrics", "port": 1}, *PORTS, {"name": "grpc", "port": 2}]
    assert list(workers(endpoint_slice("a", endpoint("10.0.0.1"), ports=ports))) == ["http://10.0.0.1:8100"]


def test_a_port_for_the_feed() -> None:
    found = workers(endpoint_slice("a", endpoint("10.0.0.1", "w-1"), ports=FEED))
    assert found == {"http://10.0.0.1:8100": DiscoveredWorker(Intake.OPEN, "http://10.0.0.1:8101", "w-1", "uid-w-1")}


@pytest.mark.parametrize(
    ("family", "address", "url"),
    [
        ("IPv6", "fd00::1", "http://[fd00::1]:8100"),
        ("FQDN", "worker.example.com", "http://worker.example.com:8100"),
    ],
)
def test_other_families(family: str, address: str, url: str) -> None:
    assert list(workers(endpoint_slice("a", endpoint(address), family=family))) == [url]


def test_a_pod_with_addresses_of_two_families_is_one_worker_whichever_slice_changes_first() -> None:
    four = endpoint_slice("a", endpoint("10.0.0.1", "w-1", ready=False))
    for ready in (False, True):
        six = endpoint_slice("b", endpoint("fd00::1", "w-1", ready=ready), family="IPv6")
        assert workers(four, six) == {"http://10.0.0.1:8100": DiscoveredWorker(Intake.CLOSED, None, "w-1", "uid-w-1")}


def test_only_the_first_address_counts() -> None:
    found = workers(endpoint_slice("a", endpoint("", addresses=["10.0.0.1", "10.0.0.2"])))
    assert list(found) == ["http://10.0.0.1:8100"]


def test_an_endpoint_that_moves_between_slices_is_one_worker() -> None:
    here = endpoint_slice("a", endpoint("10.0.0.1", "w-1", ready=True))
    assert len(workers(here, endpoint_slice("b", endpoint("10.0.0.1", "w-1", ready=True)))) == 1
    leaving = endpoint_slice("b", endpoint("10.0.0.1", "w-1", ready=False, terminating=True))
    assert workers(here, leaving) == {"http://10.0.0.1:8100": DiscoveredWorker(Intake.CLOSED, None, "w-1", "uid-w-1")}


def test_an_address_that_passed_to_another_pod_is_the_new_pods() -> None:
    old = endpoint_slice("a", endpoint("10.0.0.1", "w-9", ready=False, terminating=True))
    new = endpoint_slice("b", endpoint("10.0.0.1", "w-1", ready=True))
    assert workers(old, new) == {"http://10.0.0.1:8100": DiscoveredWorker(Intake.OPEN, None, "w-1", "uid-w-1")}


def test_a_pod_that_got_another_address_is_at_the_one_that_serves() -> None:
    stale = endpoint_slice("a", endpoint("10.0.0.1", "w-1", ready=False))
    assert list(workers(stale, endpoint_slice("b", endpoint("10.0.0.2", "w-1", ready=True)))) == [
        "http://10.0.0.2:8100"
    ]


def test_what_is_no_pod_has_no_name() -> None:
    made = endpoint("10.0.0.1")
    made["targetRef"] = {"kind": "Node", "name": "n", "uid": "u"}
    assert workers(endpoint_slice("a", made)) == {"http://10.0.0.1:8100": DiscoveredWorker()}
