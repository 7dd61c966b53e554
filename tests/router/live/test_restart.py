"""A router that is restarted under an open page, as processes on one listening socket.

Not covered: how a browser connects again (tests/router/page).
"""

from __future__ import annotations

import signal

import pytest

from runtime.sockets import listen
from tests.router.conftest import http_client
from tests.router.fakes import fake_workers, good
from tests.router.live.test_endpoints import opened
from tests.router.test_process import router_process, started

pytestmark = pytest.mark.process


async def test_a_page_gets_a_whole_document_of_the_router_that_follows() -> None:
    with listen("127.0.0.1", 0) as data, listen("127.0.0.1", 0) as management:
        sockets = ("--fd", str(data.fileno()), "--management-fd", str(management.fileno()))
        fds, port = (data.fileno(), management.fileno()), management.getsockname()[1]
        async with fake_workers(good) as (worker,), http_client(port) as client:
            flags = (*sockets, "--workers", worker.url)
            async with router_process(*flags, fds=fds) as process:
                await started(process)
                async with opened(client) as page:
                    await page.until(lambda now: any(worker.ready for worker in now.workers))
                    async with http_client(data.getsockname()[1]) as asking:
                        await asking.post("/v1/completions", json={"prompt": "x"})
                    before = await page.until(lambda now: len(now.decisions) == 1)
                    process.send_signal(signal.SIGTERM)
                    with pytest.raises(StopAsyncIteration):
                        await page.until(lambda now: False)
                assert await process.wait() == 0
            assert before.routers[0].name.endswith(f":{port}"), "two routers of one host have different names"
            async with router_process(*flags, fds=fds) as process:
                await started(process)
                async with opened(client) as page:
                    after = await page.until(lambda now: any(worker.ready for worker in now.workers))
                assert page.events[0] == "live"
                assert (before.totals.requests, after.totals.requests) == (1, 0)
                process.send_signal(signal.SIGKILL)
                await process.wait()
