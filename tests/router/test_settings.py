"""The router's settings: flags come before environment variables and those before defaults, errors name the setting,
and docs/router.md lists every flag, cause and reason.

Not covered: what each setting does, which is tested where it is used."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from router.core.retries import FailureCause
from router.settings import Settings
from runtime.kube.errors import ApiFailureCause
from runtime.kube.listwatch import Relist
from runtime.settings import SettingsError


def test_defaults() -> None:
    settings = Settings.load([])
    assert (settings.port, settings.management_port, settings.strategy) == (8000, 9000, "cache_aware")
    assert settings.workers == ()


def test_flags_come_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUTER_PORT", "1")
    monkeypatch.setenv("ROUTER_MANAGEMENT_PORT", "2")
    monkeypatch.setenv("ROUTER_WORKERS", "http://a:1,http://b:2/")
    settings = Settings.load(["--port", "3"])
    assert (settings.port, settings.management_port) == (3, 2)
    assert settings.workers == ("http://a:1", "http://b:2")


@pytest.mark.parametrize("variable", ["ROUTING_STRATEGY", "ROUTER_STRATEGY"])
def test_the_strategy_by_environment(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "round_robin")
    assert Settings.load([]).strategy == "round_robin"
    assert Settings.load(["--strategy", "least_loaded"]).strategy == "least_loaded"


def test_workers_by_flag() -> None:
    flags = ["--workers", "http://a:1,http://b:2", "--workers", "http://c:3"]
    assert Settings.load(flags).workers == ("http://a:1", "http://b:2", "http://c:3")


def test_workers_with_feeds_of_their_own() -> None:
    flags = ["--workers", "http://a:1/, feed=http://a:2/,http://b:1", "--workers", "http://c:3,feed=http://c:4"]
    assert Settings.load(flags).workers == (
        "http://a:1", "feed=http://a:2", "http://b:1", "http://c:3", "feed=http://c:4",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        pytest.param(["--strategy", "magic"], "cache_aware", id="unknown strategy"),
        pytest.param(["--port", "x"], "--port", id="port of no number"),
        pytest.param(["--port", "70000"], "--port", id="port too large"),
        pytest.param(["--workers", "a:1"], "http://host:port", id="worker without a scheme"),
        pytest.param(["--workers", "feed=http://a:1"], "follows no worker", id="feed without a worker"),
        pytest.param(["--workers", "http://a:1,feed=a:2"], "http://host:port", id="feed without a scheme"),
        pytest.param(
            ["--workers", "http://a:1,feed=http://a:2,feed=http://a:3"], "follows no worker", id="two feeds of a worker"
        ),
        pytest.param(["--profile", "none"], "llama-2-13b-a100-40gb", id="unknown profile"),
        pytest.param(["--speed", "0"], "--speed", id="speed of zero"),
        pytest.param(["--workers", "http://a:1", "--workers-file", "f"], "use one of them", id="workers and a file"),
        pytest.param(
            ["--workers", "http://a:1", "--kubernetes-service", "s"],
            "--workers and --kubernetes-service name 2 lists",
            id="workers and a Service",
        ),
        pytest.param(
            ["--workers-file", "f", "--kubernetes-service", "s"], "use one of them", id="a file and a Service"
        ),
        pytest.param(["--kubernetes-service", "Not_a_name"], "--kubernetes-service", id="Service of no valid name"),
        pytest.param(["--kubernetes-service", "a,b=c"], "--kubernetes-service", id="Service with a selector"),
        pytest.param(
            ["--kubernetes-service", "s", "--kubernetes-namespace", ".."],
            "--kubernetes-namespace",
            id="namespace of no valid name",
        ),
        pytest.param(
            ["--kubernetes-namespace", "ns"], "--kubernetes-namespace goes with", id="namespace without a Service"
        ),
        pytest.param(
            ["--kubernetes-kubeconfig", "f"], "--kubernetes-kubeconfig goes with", id="kubeconfig without a Service"
        ),
        pytest.param(["--drain-delay", "-1"], "--drain-delay", id="negative delay"),
    ],
)
def test_what_is_wrong_is_named(flags: list[str], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        Settings.load(flags)


# --- docs/router.md ---


DOCUMENT = (Path(__file__).parents[2] / "docs" / "router.md").read_text()


def test_every_flag_is_documented() -> None:
    flags = {"--" + name.replace("_", "-") for name in Settings.model_fields}
    rows = re.findall(r"^\| (`--[^|]*) \| ([^|]*)\|", DOCUMENT, re.MULTILINE)
    documented = {flag: defaults for flags_, defaults in rows for flag in re.findall(r"--[a-z-]+", flags_)}
    assert flags == set(documented)
    for name, field in Settings.model_fields.items():
        if isinstance(field.default, int | float | str) and not isinstance(field.default, bool):
            shown = documented["--" + name.replace("_", "-")]
            text = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
            assert re.search(rf"(^|\W){re.escape(text)}(\.0)?(\W|$)", shown), (name, field.default, shown)


def test_every_cause_is_documented() -> None:
    for name in [*FailureCause, *ApiFailureCause, *Relist]:
        assert f"`{name.value}`" in DOCUMENT, name
