"""A real Prometheus process for tests."""

from __future__ import annotations

import asyncio
import math
import shutil
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from runtime.sockets import listen
from tests.processes import eventually

START_SECONDS = 120.0


def binary() -> str | None:
    """Where Prometheus is; None when it is not installed."""
    return shutil.which("prometheus")


class Prometheus:
    """Questions to a running Prometheus."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def _get(self, path: str, **params: Any) -> Any:
        answer = await self._client.get(f"/api/v1/{path}", params=params)
        content = answer.json()
        assert content["status"] == "success", content
        return content["data"]

    async def points(self, expression: str, seconds: float) -> list[float]:
        """Every value, not NaN, of all series of a query over the last so many seconds, one a second."""
        [[end, _]] = [(await self._get("query", query="time()"))["result"]]
        data = await self._get("query_range", query=expression, start=end - seconds, end=end, step=1)
        values = [float(value) for series in data["result"] for _, value in series["values"]]
        return [value for value in values if not math.isnan(value)]

    async def _instant(self, expression: str) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = (await self._get("query", query=expression))["result"]
        return result

    async def value(self, expression: str) -> float:
        """The one value of a query."""
        [series] = await self._instant(expression)
        return float(series["value"][1])

    async def values(self, expression: str, label: str) -> dict[str, float]:
        """Values of a query by the value of a label that tells its series apart; without those that are NaN."""
        series = await self._instant(expression)
        values = {each["metric"].get(label, ""): float(each["value"][1]) for each in series}
        assert len(values) == len(series), series
        return {name: value for name, value in values.items() if not math.isnan(value)}

    async def has_scraped_since_now(self) -> None:
        """Returns when every target has been scraped after the call."""
        [[now, _]] = [(await self._get("query", query="time()"))["result"]]

        async def later() -> bool:
            return await self.value("min(timestamp(up))") > now

        await eventually(later, "every target is scraped again")

    async def alerts(self) -> set[str]:
        """Names of the alerts that fire now."""
        alerts = (await self._get("alerts"))["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    async def rules(self) -> list[dict[str, Any]]:
        """Every rule, with its health and its alerts."""
        return [rule for group in (await self._get("rules"))["groups"] for rule in group["rules"]]

    async def families(self) -> set[str]:
        """Names of all metrics that targets described, with or without samples."""
        return set(await self._get("metadata"))

    async def label_values(self, selector: str, label: str) -> set[str]:
        """Values of a label on the series of a selector."""
        return set(await self._get(f"label/{label}/values", **{"match[]": selector}))

    async def ready(self) -> bool:
        try:
            return (await self._client.get("/-/ready")).status_code == 200
        except httpx.HTTPError:
            return False


@asynccontextmanager
async def running(config: dict[str, Any], folder: Path) -> AsyncIterator[Prometheus]:
    """Prometheus with this configuration, from entering to leaving."""
    executable = binary()
    assert executable is not None
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with listen("127.0.0.1", 0) as listener:
        address = "{}:{}".format(*listener.getsockname())
    process = await asyncio.create_subprocess_exec(
        executable,
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
        "--log.level=warn",
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=STDOUT,
    )
    assert process.stdout is not None
    log = asyncio.create_task(process.stdout.read())
    try:
        async with httpx.AsyncClient(base_url=f"http://{address}", timeout=30, trust_env=False) as client:
            prometheus = Prometheus(client)

            async def up() -> bool:
                assert process.returncode is None, (await log).decode()
                return await prometheus.ready()

            await eventually(up, "Prometheus is ready", START_SECONDS)
            yield prometheus
    finally:
        if process.returncode is None:
            process.terminate()
        await log
        await process.wait()
