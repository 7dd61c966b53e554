"""Which host names the management port answers to, and that the data port answers to all.

Not covered: that `kvcluster top NAME` is answered through an API server with a public name
(tests/kvcluster/top/test_following.py), and that browsers send what they have to.
"""

from __future__ import annotations

import asyncio

import pytest

from router.settings import Settings
from runtime.http.hosts import PROGRAM_HEADERS, HostCheck, host_name
from runtime.settings import SettingsError
from tests.router.conftest import StartRouter


async def nothing(*_: object) -> None:
    """An application that answers nothing."""


@pytest.mark.parametrize(
    "header",
    [
        "127.0.0.1:9000", "10.1.2.3", "[::1]:9000", "[fd00::1]", "localhost:8443", "LOCALHOST", "my_router:9000",
        "rag-router.default.svc", "rag-router-0.rag-router.default.svc.cluster.local:9000", "page.localhost",
        "host.docker.internal:9000", "",
    ],
)  # fmt: skip
def test_names_that_nobody_else_can_own_are_taken(header: str) -> None:
    assert HostCheck(nothing, "").takes(host_name(header))


@pytest.mark.parametrize(
    "header",
    [
        "evil.example.com", "evil.example.com:9000", "127.0.0.1.nip.io", "localhost.example.com", "evilsvc.example",
        "svc.example.com", "127.0.0.1.", "rag.svc.evil.com:80",
    ],
)  # fmt: skip
def test_names_of_others_are_not(header: str) -> None:
    assert not HostCheck(nothing, "").takes(host_name(header))


@pytest.mark.parametrize(
    ("names", "taken", "refused"),
    [
        pytest.param("router.example.com", "Router.Example.com:80", "a.router.example.com", id="one"),
        pytest.param("a.example,.Example.com", "x.example.com", "example.com", id="all under one"),
        pytest.param("*", "anything.example", None, id="any"),
    ],
)
def test_further_names_are_a_setting(names: str, taken: str, refused: str | None) -> None:
    check = HostCheck(nothing, "", Settings.load(["--management-names", names]).management_names)
    assert check.takes(host_name(taken))
    assert refused is None or not check.takes(refused)


@pytest.mark.parametrize("wrong", ["http://router.example.com", "router:9000", "*.example.com"])
def test_what_is_no_name_is_refused(wrong: str) -> None:
    with pytest.raises(SettingsError, match="management-names"):
        Settings.load(["--management-names", wrong])


async def test_a_foreign_name_reads_nothing_of_the_management_port(start_router: StartRouter) -> None:
    foreign = {"host": "evil.example.com:9000"}
    async with start_router() as router:
        paths = ("/", "/live", "/live/events", "/metrics", "/workers", "/requests/events", "/health", "/none")
        answers = await asyncio.gather(*(router.management.get(path, headers=foreign) for path in paths))
        assert {answer.status_code for answer in answers} == {421}
        message = answers[0].json()["error"]["message"]
        assert "'evil.example.com'" in message
        assert "--management-names" in message
        assert (await router.management.post("/route/explain", headers=foreign, json={})).status_code == 421
        ours = {**foreign, **PROGRAM_HEADERS}
        assert (await router.management.get("/live", headers=ours)).status_code == 200
        assert (await router.client.get("/v1/models", headers=foreign)).status_code != 421
    async with start_router(management_names="evil.example.com") as router:
        assert (await router.management.get("/health", headers=foreign)).status_code == 200
