"""What the API server and the operator refuse of a KVCluster with engine type external is the same, field by field.

The rules are evaluated as in the fake API server. Not covered: arguments of the engine, which only the operator looks
at (a rule over each item of a list is not modelled there), and the other rules (tests/kube/operator/test_bad_input).
"""

from __future__ import annotations

from typing import Any

import pytest
from pydantic.alias_generators import to_camel

from controller.api.crd import crd
from controller.api.external import ENGINE_FIELDS, WORKER_FIELDS
from controller.api.load import validate_manifest
from controller.api.problems import ManifestError
from tests.kube.apiserver.cel import broken_rules
from tests.kube.apiserver.normalization import fill_defaults
from tests.kube.apiserver.schema import structural
from tests.kube.apiserver.validation import validate

SCHEMA = structural(crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
PODS = {"selector": {"matchLabels": {"app": "llama"}}, "ports": [8000]}
SAMPLES: dict[tuple[str, str], tuple[Any, ...]] = {
    ("engine", "image"): ("vllm",),
    ("engine", "imagePullPolicy"): ("Always",),
    ("engine", "speed"): (2.0,),
    ("engine", "generator"): ("echo",),
    ("engine", "seed"): (1,),
    ("engine", "meanOutputTokens"): (64,),
    ("engine", "dataParallel"): ({"size": 2},),
    ("engine", "cpuCache"): ({"size": "1Gi"},),
    ("engine", "maxLoras"): (4,),
    ("engine", "env"): ([{"name": "A", "value": "b"}],),
    ("workers", "replicas"): (2,),
    ("workers", "resources"): ({"requests": {"cpu": "1"}}, {"limits": {"nvidia.com/gpu": "1"}}),
    ("workers", "nodeSelector"): ({"gpu": "a100"},),
    ("workers", "tolerations"): ([{"key": "gpu"}],),
    ("workers", "affinity"): ({"podAffinity": {}},),
    ("workers", "topologySpreadConstraints"): ([{"maxSkew": 1}],),
    ("workers", "priorityClassName"): ("high",),
    ("workers", "podMetadata"): ({"labels": {"team": "a"}}, {"annotations": {"note": "b"}}),
    ("workers", "volumes"): ([{"name": "v", "emptyDir": {}}],),
    ("workers", "volumeMounts"): ([{"name": "v", "mountPath": "/v"}],),
    ("workers", "runtimeClassName"): ("nvidia",),
    ("workers", "securityContext"): ({"runAsUser": 1},),
    ("model", "adapters"): ([{"name": "a", "source": "org/a"}],),
}
"""Values that are not the defaults."""


def manifest(part: str = "engine", name: str = "type", value: Any = "external") -> dict[str, Any]:
    spec: dict[str, Any] = {"engine": {"type": "external", "external": PODS}, "model": {"name": "m"}}
    spec[part] = {**spec.get(part, {}), name: value}
    return {
        "apiVersion": "kvcluster.dev/v1alpha1", "kind": "KVCluster", "metadata": {"name": "rag"}, "spec": spec,
    }  # fmt: skip


def refused(given: dict[str, Any]) -> list[str]:
    """Where the API server finds something to refuse."""
    fill_defaults(given, SCHEMA)
    return [cause.field for cause in (*validate(given, SCHEMA), *broken_rules(given, None, SCHEMA))]


def test_there_is_a_sample_of_every_field_that_means_nothing() -> None:
    fields = {("engine", to_camel(name)) for name in ENGINE_FIELDS}
    fields |= {("workers", to_camel(name)) for name in WORKER_FIELDS}
    assert SAMPLES.keys() == fields | {("model", "adapters")}


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        pytest.param(*place, value, id=f"{place[1]}-{number}")
        for place, values in SAMPLES.items()
        for number, value in enumerate(values)
    ],
)
def test_both_refuse_what_means_nothing(part: str, name: str, value: Any) -> None:
    with pytest.raises(ManifestError) as error:
        validate_manifest(manifest(part, name, value))
    assert [problem.path for problem in error.value.problems] == [f"spec.{part}.{name}"]
    assert refused(manifest(part, name, value)) in ([f"spec.{part}"], [f"spec.{part}.{name}"])


def test_both_refuse_a_selector_without_labels() -> None:
    external = {**PODS, "selector": {"matchLabels": {}}}
    with pytest.raises(ManifestError) as error:
        validate_manifest(manifest("engine", "external", external))
    assert [problem.path for problem in error.value.problems] == refused(manifest("engine", "external", external))


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        pytest.param("engine", "type", "external", id="nothing more"),
        pytest.param("engine", "args", ["--chat-template=/a", "--chat-template-content-format"], id="chats"),
        pytest.param("workers", "drainSeconds", 30, id="drain"),
        pytest.param("workers", "nodeSelector", {}, id="no selector"),
        pytest.param("workers", "resources", {"requests": {}}, id="no resources"),
        pytest.param("workers", "podMetadata", {"labels": {}}, id="no metadata"),
    ],
)
def test_both_take_what_means_something_or_says_nothing(part: str, name: str, value: Any) -> None:
    validate_manifest(manifest(part, name, value))
    assert refused(manifest(part, name, value)) == []
