"""Routers that ask one another what they have let through, over HTTP.

Not covered: what that does to a key's rates over time (tests/router/core/test_shared_rates.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import aiohttp
import httpx
import orjson
import pytest
from fastapi import FastAPI, Response

from router.live.peers import AddressesUnknown, PeerAddress, StaticRouters
from router.server.key_file import KeyFile
from router.server.rate_exchange import PATH, RateExchange
from runtime.http.server import HttpServer
from runtime.sockets import listen
from tests.router.conftest import MovedClock, StartRouter
from tests.router.fakes import fake_workers, good

KEY = "sk-0123456789abcdef"
BEARER = {"authorization": f"Bearer {KEY}"}


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_bytes(orjson.dumps({"keys": [{"key": KEY, "tenant": "team-a", "requests_per_minute": 10}]}))
    return path


async def test_what_one_router_lets_through_the_other_counts(start_router: StartRouter, keys: Path) -> None:
    clock = MovedClock()
    settings = {"api_keys_file": keys, "clock": clock, "ready": 0}
    async with fake_workers(good) as workers, start_router(workers, **settings) as first:
        peers = str(first.management.base_url).rstrip("/")
        async with start_router(workers, peers=peers, **settings) as second:
            await first.client.get("/v1/models", headers=BEARER)
            await second.router.rates.exchange()
            for _ in range(4):
                await first.client.get("/v1/models", headers=BEARER)
            clock.now += 1.0
            await second.router.rates.exchange()
            response = await second.client.get("/v1/models", headers=BEARER)
            assert response.headers["x-ratelimit-remaining-requests"] == "4"
            assert second.metric("rate_peers") == 1
            said = (await second.management.get(PATH)).text
            assert KEY not in said
            assert orjson.loads(said)["keys"] != {}


async def test_without_api_keys_there_is_nothing_to_tell(start_router: StartRouter) -> None:
    async with start_router() as router:
        assert (await router.management.get(PATH)).json()["keys"] == {}


class Unlisted:
    """No list of routers can be read."""

    async def addresses(self) -> Sequence[PeerAddress]:
        raise AddressesUnknown("their EndpointSlices cannot be read")

    async def close(self) -> None: ...


async def test_routers_that_do_not_answer_or_answer_nonsense_are_named_once(
    keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app = FastAPI()
    app.add_api_route("/broken" + PATH, lambda: Response("[]"), methods=["GET"])
    app.add_api_route("/large" + PATH, lambda: Response(b"x" * (5 * 2**20)), methods=["GET"])
    server = HttpServer(app, listen("127.0.0.1", 0))
    await server.start()
    base = f"http://127.0.0.1:{server.port}"
    clock = MovedClock()
    file = KeyFile(keys, clock)
    async with aiohttp.ClientSession() as session:
        urls = [f"{base}/broken", f"{base}/large", f"{base}/none"]
        exchange = RateExchange(file, StaticRouters(urls), session, instance="own", clock=clock)
        for _ in range(2):
            await exchange.exchange()
        said = [record.getMessage() for record in caplog.records if record.getMessage() == "rates_not_shared"]
        assert len(said) == len(urls)
        assert exchange.peers() == 0
        unlisted = RateExchange(file, Unlisted(), session, instance="own", clock=clock)
        await unlisted.exchange()
        assert unlisted.peers() == 0
    await server.stop(0)


async def test_a_router_does_not_count_its_own_use_twice(keys: Path) -> None:
    clock = MovedClock()
    file = KeyFile(keys, clock)
    app = FastAPI()
    server = HttpServer(app, listen("127.0.0.1", 0))
    await server.start()
    ((_, limiter),) = file.keys.values()
    async with aiohttp.ClientSession() as session, httpx.AsyncClient(trust_env=False) as client:
        url = f"http://127.0.0.1:{server.port}"
        exchange = RateExchange(file, StaticRouters([url]), session, instance="own", clock=clock)
        exchange.add_to(app)
        for _ in range(3):
            limiter.arrive(clock())
            clock.now += 0.9
            await exchange.exchange()
        assert (await client.get(url + PATH)).json()["instance"] == "own"
        assert exchange.peers() == 0
        assert limiter.used_requests == 3
        assert limiter.requests is not None
        assert limiter.requests.level(clock()) == pytest.approx(7 + 2.7 / 6)
    await server.stop(0)
