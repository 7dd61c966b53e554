"""Engines that somebody else runs: what the operator makes, what the manifest refuses, and what the status says.

Not covered: an API server's part (tests/kube/operator/test_external.py), the router's (tests/router).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from controller.api.external import External
from controller.api.load import ManifestError, validate_manifest
from controller.api.model import Engine, EngineType, KVClusterSpec, Model
from controller.local.desired_processes import LocalModeError, check
from controller.status.compute import compute
from router.settings import Settings
from tests.controller.objects.support import objects
from tests.controller.status.support import NOW, ROUTERS, conditions, deployment, observed, report

PODS = {"selector": {"matchLabels": {"app": "llama"}}, "ports": [8000, 8001], "feedPort": 8101}
SPEC: dict[str, Any] = {"model": {"name": "m"}, "engine": {"type": "external", "external": PODS}}
THEIRS: dict[str, Any] = {
    "model": {"name": "m"}, "engine": {"type": "external"}, "gateway": {"inferencePoolRef": {"name": "llama"}},
}  # fmt: skip


def settings(made: dict[str, Any]) -> Settings:
    environment = made["ConfigMap/rag-router"]["data"]
    flags = {name.removeprefix("ROUTER_").lower().replace("_", "-"): value for name, value in environment.items()}
    return Settings.load([f"--{name}={value}" for name, value in flags.items()])


def rights(made: dict[str, Any]) -> set[str]:
    return {resource for rule in made["Role/rag-router"]["rules"] for resource in rule["resources"]}


def test_routers_and_services_are_made_and_nothing_that_would_touch_the_pods() -> None:
    everything = {"networkPolicy": {"enabled": True}, "monitoring": {"podMonitor": True}}
    made = objects(**SPEC, **everything)
    assert {name for name in made if "worker" in name} == {"Service/rag-worker", "Service/rag-worker-8001"}
    first, second = (made[f"Service/rag-worker{end}"]["spec"] for end in ("", "-8001"))
    assert first["selector"] == second["selector"] == {"app": "llama"}
    assert {port["name"]: port["port"] for port in first["ports"]} == {"http": 8000, "feed": 8101}
    assert [port["port"] for port in second["ports"]] == [8001]
    assert settings(made).kubernetes_service == ("rag-worker", "rag-worker-8001")
    assert settings(made).tokenizer == "m"
    assert rights(made) == {"endpointslices"}


def test_a_pool_of_our_own_selects_their_pods() -> None:
    made = objects(**SPEC, gateway={"inferencePool": True})
    pool = made["InferencePool/rag-worker"]["spec"]
    assert pool["selector"] == {"matchLabels": {"app": "llama"}}
    assert [port["number"] for port in pool["targetPorts"]] == [8000, 8001]
    assert settings(made).objectives_pool == "rag-worker"
    assert rights(made) == {"endpointslices", "inferenceobjectives", "inferencepools"}


def test_a_pool_of_theirs_names_the_workers_and_is_not_made() -> None:
    route = {"parentRefs": [{"name": "front"}]}
    made = objects(**{**THEIRS, "gateway": {**THEIRS["gateway"], **route}})
    assert not {name for name in made if "worker" in name or name.startswith("InferencePool")}
    assert made["HTTPRoute/rag-router-gateway"]["spec"]["rules"][0]["backendRefs"][0]["name"] == "llama"
    assert "Service/rag-router-picker" in made
    told = settings(made)
    assert (told.inference_pool, told.kubernetes_service, told.mode) == ("llama", (), "both")
    assert rights(made) == {"endpointslices", "inferenceobjectives", "inferencepools", "pods"}


@pytest.mark.parametrize(
    ("spec", "field", "words"),
    [
        pytest.param({"engine": {"type": "external"}}, "engine.external", "needs the pods", id="no pods"),
        pytest.param({**SPEC, "gateway": THEIRS["gateway"]}, "gateway.inferencePoolRef", "the pool says", id="two"),
        pytest.param({"engine": {"external": PODS}}, "engine.external", "external alone", id="another engine"),
        pytest.param({"gateway": THEIRS["gateway"]}, "gateway.inferencePoolRef", "external alone", id="a pool"),
        pytest.param({"engine": SPEC["engine"]}, "model.name", "name of the model", id="no model"),
        pytest.param({**SPEC, "workers": {"replicas": 2}}, "workers.replicas", "runs no engines", id="replicas"),
        pytest.param({**SPEC, "workers": {"nodeSelector": {"a": "b"}}}, "workers.nodeSelector", "remove", id="nodes"),
        pytest.param({**SPEC, "autoscaling": {"min": 1, "max": 2}}, "autoscaling", "remove", id="autoscaling"),
        pytest.param(
            {**SPEC, "engine": {**SPEC["engine"], "image": "vllm"}}, "engine.image", "runs no engines", id="image"
        ),
        pytest.param(
            {**SPEC, "engine": {**SPEC["engine"], "args": ["--dtype=half"]}}, "engine.args[0]", "render", id="args"
        ),
        pytest.param(
            {**THEIRS, "router": {"serves": [{"cluster": "b"}]}}, "router.serves", "have no others", id="other clusters"
        ),
        pytest.param(
            {**SPEC, "engine": {"type": "external", "external": {**PODS, "selector": {"matchLabels": {}}}}},
            "engine.external.selector.matchLabels", "at least one label", id="no labels",
        ),
        pytest.param(
            {**SPEC, "engine": {"type": "external", "external": {**PODS, "feedPort": 8000}}},
            "engine.external.feedPort", "port of the engines", id="the feed at an engine's port",
        ),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_refused(spec: dict[str, Any], field: str, words: str) -> None:
    head = {"apiVersion": "kvcluster.dev/v1alpha1", "kind": "KVCluster", "metadata": {"name": "rag"}}
    with pytest.raises(ManifestError) as refused:
        validate_manifest({**head, "spec": spec})
    (problem,) = refused.value.problems
    assert problem.path == f"spec.{field}"
    assert words in problem.message


def test_what_changes_how_chats_are_rendered_reaches_the_routers() -> None:
    engine = {**SPEC["engine"], "args": ["--chat-template=/models/chat.jinja"]}
    assert settings(objects(**{**SPEC, "engine": engine})).chat_template == Path("/models/chat.jinja")


def test_local_mode_has_no_pods(make_manifest: Any) -> None:
    with pytest.raises(LocalModeError, match="only a cluster has"):
        check(make_manifest(**SPEC))


EXTERNAL = KVClusterSpec(
    model=Model(name="m"), engine=Engine(type=EngineType.EXTERNAL, external=External.model_validate(PODS))
)


def told(known: int, ready: int, *, matching: int = 0, history: int = 0, **changes: Any) -> Any:
    """What the status rests on where both routers tell this of the workers."""
    figures = {"workers_known": known, "workers_ready": ready, "workers_matching": matching, "workers_history": history}
    answer = report(**figures, view_age_seconds=None)
    seen = observed({"rag-router-a": answer, "rag-router-b": answer}, spec=EXTERNAL, external=True, pods=ROUTERS)
    return dataclasses.replace(seen, deployments={"router": deployment("router", 1)}, workers_wanted=None, **changes)


@pytest.mark.parametrize(
    ("seen", "kind", "state", "words"),
    [
        pytest.param(told(0, 0), "WorkersAvailable", "False/NoPodMatches", "app=llama", id="no pod"),
        pytest.param(told(0, 0), "Ready", "False/NoPodMatches", "not answered", id="no pod, so not ready"),
        pytest.param(told(2, 0), "WorkersAvailable", "False/NotReachable", "All 2 workers", id="none reachable"),
        pytest.param(told(2, 1), "WorkersAvailable", "True/SomeReady", "1 of 2", id="one of two"),
        pytest.param(told(2, 2), "WorkersAvailable", "True/AllReady", "2 of 2", id="all"),
        pytest.param(told(2, 2), "Ready", "True/Serving", "2 of 2", id="ready"),
        pytest.param(told(2, 1), "Progressing", "False/Complete", "", id="their rollouts are not ours"),
        pytest.param(told(2, 2, matching=2), "CacheViewFresh", "True/Fresh", "all 2 workers", id="agents"),
        pytest.param(told(2, 2, history=2), "CacheViewFresh", "Unknown/OwnHistory", "2 of 2", id="no agents"),
        pytest.param(told(2, 2, history=1), "CacheViewFresh", "False/Mismatch", "0 of 2", id="one of another model"),
        pytest.param(
            observed({}, spec=EXTERNAL, external=True, pods=()),
            "WorkersAvailable", "Unknown/NoRouter", "", id="no router",
        ),
        pytest.param(
            observed({"rag-router-a": "no answer"}, spec=EXTERNAL, external=True, pods=ROUTERS),
            "WorkersAvailable", "Unknown/RouterUnreachable", "rag-router-a", id="a silent router",
        ),
    ],
)  # fmt: skip
def test_conditions_say_what_the_routers_tell(seen: Any, kind: str, state: str, words: str) -> None:
    found = conditions(seen)[kind]
    assert f"{found['status']}/{found['reason']}" == state
    assert words in found["message"]


def test_the_status_counts_the_workers_that_the_routers_know() -> None:
    status = compute(told(3, 2), None, NOW)
    assert status["workers"]["summary"] == "2/3"
    assert "selector" not in status, "there is nothing to scale"
