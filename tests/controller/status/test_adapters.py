"""LoRA adapters in the status: the figures, the condition AdaptersReady, and what an engine refuses.

Not covered: how a router learns of them (tests/router/test_models.py).
"""

from __future__ import annotations

from typing import Any

import pytest

from controller.api.model import KVClusterSpec
from controller.status.compute import compute
from controller.status.observed import Observed
from controller.status.report import ModelReport, parse_report
from tests.controller.status.support import NOW, conditions, observed, reasons, report

SPEC = KVClusterSpec.model_validate(
    {
        "model": {"name": "m", "adapters": [{"name": "sql", "source": "acme/sql"}, {"name": "law", "source": "x"}]},
        "workers": {"replicas": 4},
    }
)


def seen(*models: ModelReport, second: ModelReport | None = None, **changes: Any) -> Observed:
    """Two routers that report these models; the second one another, if given."""
    reports = {
        "rag-router-a": report(models=models),
        "rag-router-b": report(models=models if second is None else (second,)),
    }
    return observed(**{"reports": reports, "spec": SPEC, **changes})


def model(sql: int, law: int, **lacking_law: str) -> ModelReport:
    """On so many of four workers; `lacking_law`: why it is missing, by worker."""
    missing = {name.replace("_", "-"): why for name, why in lacking_law.items()}
    return ModelReport("m", 4, {"sql": sql, "law": law}, {"law": missing} if missing else {})


def test_without_adapters_nothing_is_said_of_them() -> None:
    status = compute(observed(), None, NOW)
    assert "adapters" not in status
    assert "AdaptersReady" not in {item["type"] for item in status["conditions"]}


def test_all_are_loaded() -> None:
    found = conditions(seen(model(4, 4)))["AdaptersReady"]
    assert (found["status"], found["reason"]) == ("True", "AdaptersLoaded")
    assert found["message"] == "All 4 workers have all 2 adapters loaded."
    assert compute(seen(model(4, 4)), None, NOW)["adapters"] == {
        "summary": "2/2",
        "loaded": 2,
        "wanted": 2,
        "each": [{"name": "sql", "workers": 4}, {"name": "law", "workers": 4}],
    }


def test_one_is_being_loaded() -> None:
    status = seen(model(4, 1, rag_worker_1=""))
    found = conditions(status)["AdaptersReady"]
    assert (found["status"], found["reason"]) == ("False", "AdaptersLoading")
    assert found["message"] == "Adapter law is loaded on 1 of 4 ready workers."
    assert reasons(status)["Degraded"] == "False/AsExpected"
    assert compute(status, None, NOW)["adapters"]["summary"] == "1/2"


def test_what_an_engine_refuses_is_quoted_and_degrades_the_cluster() -> None:
    found = conditions(seen(model(4, 2, rag_worker_2="No adapter found for x", rag_worker_1="")))
    words = "Adapter law is loaded on 2 of 4 ready workers; rag-worker-2 says: No adapter found for x."
    assert (found["AdaptersReady"]["reason"], found["AdaptersReady"]["message"]) == ("AdapterRefused", words)
    assert (found["Degraded"]["reason"], found["Degraded"]["message"]) == ("AdapterRefused", words)
    assert found["Ready"]["status"] == "True"


def test_the_router_that_sees_an_adapter_on_the_fewest_workers_counts() -> None:
    status = compute(seen(model(4, 4), second=model(4, 3)), None, NOW)
    assert [each["workers"] for each in status["adapters"]["each"]] == [4, 3]


def test_other_models_of_the_router_are_listed_and_do_not_count() -> None:
    other = ModelReport("other", 9, {"sql": 9})
    assert compute(seen(model(4, 4), other), None, NOW)["models"] == "m, other"
    assert reasons(seen(other, model(4, 4)))["AdaptersReady"] == "True/AdaptersLoaded"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param(
            {"reports": {"rag-router-a": "no answer", "rag-router-b": "no answer"}}, "RouterUnreachable", id="mute"
        ),
        pytest.param({"pods": ()}, "NoWorkers", id="no pods"),
    ],
)
def test_it_is_unknown_while_no_router_tells(changes: dict[str, Any], reason: str) -> None:
    before = compute(seen(model(4, 4)), None, NOW)
    status = seen(model(4, 4), **changes)
    assert reasons(status)["AdaptersReady"] == f"Unknown/{reason}"
    assert compute(status, before, NOW)["adapters"] == before["adapters"]


def test_a_router_without_a_ready_worker_of_the_model_knows_nothing() -> None:
    assert reasons(seen())["AdaptersReady"] == "Unknown/NoWorkers"


def test_the_report_of_a_router_is_read() -> None:
    body = b"""{"strategy": "cache_aware", "workers": {"known": 1, "ready": 1, "matching": 1}, "models": [
        {"name": "m", "names": [], "workers": 1, "ready": 1, "matching": 1, "adapters": {"sql": 1},
         "missing": {"law": {"w": "why"}}}]}"""
    assert parse_report(body).models == (ModelReport("m", 1, {"sql": 1}, {"law": {"w": "why"}}),)
