"""What the API server refuses before the operator sees it: with the field named, and words that say what to do.

Not covered: what only the model refuses, and the status then says (tests/controller); that CEL rules and model agree
for every rule (tests/controller/test_agreement.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import pytest_asyncio
import yaml

from controller.api.load import validate_manifest
from controller.api.problems import ManifestError
from tests.kube.operator.support import ROOT, Cluster

pytestmark = [pytest.mark.process, pytest.mark.asyncio(loop_scope="module")]

VLLM = {"engine": {"type": "vllm"}, "model": {"name": "m"}}

REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a negative number of workers": ({"workers": {"replicas": -1}}, "spec.workers.replicas", "0"),
    "a number that is a string": ({"workers": {"replicas": "4"}}, "spec.workers.replicas", "integer"),
    "no blocks": ({"cache": {"blocks": 0}}, "spec.cache.blocks", "1"),
    "an unknown strategy": ({"router": {"strategy": "fastest"}}, "spec.router.strategy", "cache_aware"),
    "an unknown profile": ({"model": {"profile": "gpu"}}, "spec.model.profile", "llama-2-13b-a100-40gb"),
    "a speed of nothing": ({"engine": {"speed": 0}}, "spec.engine.speed", "0"),
    "an autoscaler without an end": ({"autoscaling": {"min": 2}}, "spec.autoscaling.max", "Required"),
    "min above max": ({"autoscaling": {"min": 5, "max": 2}}, "spec.autoscaling.min", "lower min or raise max"),
    "keda without Prometheus": (
        {"autoscaling": {"type": "keda", "max": 2}}, "spec.autoscaling.prometheusAddress", "set prometheusAddress",
    ),
    "vllm without a model": ({"engine": {"type": "vllm"}}, "spec.model.name", "set spec.model.name"),
    "vllm with the emulator's fields": (
        {**VLLM, "engine": {"type": "vllm", "speed": 2}}, "spec.engine", "remove them for engine type vllm",
    ),
    "a request that the cache cannot hold": (
        {"cache": {"blocks": 10}, "model": {"maxModelLen": 1000}}, "spec.model.maxModelLen", "raise spec.cache.blocks",
    ),
    "a flag that a field sets": ({"engine": {"args": ["--speed=2"]}}, "spec.engine.args[0]", "use spec.model"),
    "a flag of ours": ({"engine": {"args": ["--port", "80"]}}, "spec.engine.args[0]", "remove it"),
    "an engine of several engines": (
        {"engine": {"args": ["--data_parallel_rank=2"]}}, "spec.engine.args[0]", "set spec.engine.dataParallel.size",
    ),
    "no engine in a worker": (
        {"engine": {"dataParallel": {"size": 0}}}, "spec.engine.dataParallel.size", "greater than or equal to 1",
    ),
    "an engine without a prefix cache": (
        {"engine": {"args": ["--no-enable-prefix-caching"]}}, "spec.engine.args[0]", "remove it",
    ),
    "an engine with TLS": ({"engine": {"args": ["--ssl-keyfile", "k"]}}, "spec.engine.args[0]", "spec.router.ingress"),
    "an engine with a key": ({"engine": {"args": ["--api-key=x"]}}, "spec.engine.args[0]", "in front of the routers"),
    "a key by a variable": (
        {"engine": {"env": [{"name": "VLLM_API_KEY", "value": "x"}]}}, "spec.engine.env[0].name",
        "in front of the routers",
    ),
    "a variable of ours": ({"model": {"env": [{"name": "WORKER_PORT"}]}}, "spec.model.env[0].name", "remove it"),
    "a family that there is not": ({"network": {"ipFamilies": ["IPv5"]}}, "spec.network.ipFamilies[0]", "IPv6"),
    "one stack of two families": (
        {"network": {"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4", "IPv6"]}},
        "spec.network.ipFamilies", "ask for PreferDualStack",
    ),
    "a family given twice": ({"network": {"ipFamilies": ["IPv4"] * 2}}, "spec.network.ipFamilies", "remove one"),
    "a class of load balancers without one": (
        {"router": {"service": {"loadBalancerClass": "example.com/lb"}}},
        "spec.router.service.loadBalancerClass", "set type to LoadBalancer",
    ),
    "no worker without KEDA": ({"autoscaling": {"min": 0, "max": 1}}, "spec.autoscaling.min", "needs type keda"),
    "an autoscaler that does not see the queue": (
        {"autoscaling": {"max": 2}, "router": {"flowControl": {"enabled": True}}},
        "spec.autoscaling.type", "use type keda",
    ),
    "no worker beside those of others": (
        {
            "autoscaling": {"type": "keda", "min": 0, "max": 2, "prometheusAddress": "http://p"},
            "router": {"serves": [{"cluster": "other"}]},
        },
        "spec.autoscaling.min", "beside spec.router.serves",
    ),
    "a class given twice": (
        {"router": {"flowControl": {"classes": [{"name": "a", "priority": 1}, {"name": "a", "priority": 0}]}}},
        "spec.router.flowControl.classes[1]", "Duplicate",
    ),
    "clients' certificates without one of the routers": (
        {"router": {"tls": {"clientCASecretRef": {"name": "clients"}}}},
        "spec.router.tls.clientCASecretRef", "set secretRef",
    ),
    "a route to nowhere": ({"router": {"httpRoute": {"parentRefs": []}}}, "spec.router.httpRoute.parentRefs", "1"),
    "models of others behind Envoy": (
        {"router": {"dataPlane": "envoy", "serves": [{"cluster": "other"}]}},
        "spec.router.serves", "set spec.router.dataPlane to router",
    ),
    "streams that Envoy would have to go on with": (
        {"router": {"dataPlane": "envoy", "resumeStreams": True}}, "spec.router.resumeStreams", "at another worker",
    ),
    "blocks in Envoy's log": (
        {"router": {"dataPlane": "envoy", "accessLog": {"blocks": True}}},
        "spec.router.accessLog.blocks", "does not know the blocks",
    ),
    "an Envoy that waits after a failure": (
        {"router": {"dataPlane": "envoy", "retries": {"deadlineSeconds": 5}}},
        "spec.router.retries.deadlineSeconds", "the next one at once",
    ),
    "an Envoy that cuts later than it moves": (
        {"router": {"dataPlane": "envoy", "liveness": {"cutSeconds": 5}}},
        "spec.router.liveness.cutSeconds", "stallSeconds",
    ),
    "an Envoy that would have to wait for too long": (
        {
            "autoscaling": {
                "type": "keda", "min": 0, "max": 2, "prometheusAddress": "http://p", "startSeconds": 3600,
            },
            "router": {"dataPlane": "envoy"},
        },
        "spec.autoscaling.startSeconds", "an hour at most",
    ),
    "a variable given twice": (
        {"engine": {"env": [{"name": "A"}, {"name": "A", "value": "b"}]}}, "spec.engine.env[1]", "Duplicate",
    ),
    "a variable with two sources": (
        {"engine": {"env": [{"name": "A", "value": "b", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]}},
        "spec.engine.env[0].valueFrom", "remove one of the two",
    ),
}  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(shared: Cluster) -> Cluster:
    return await shared.add_namespace("bad-input")


def manifest(spec: dict[str, Any], name: str = "bad") -> dict[str, Any]:
    return {"apiVersion": "kvcluster.dev/v1alpha1", "kind": "KVCluster", "metadata": {"name": name}, "spec": spec}


@pytest.mark.parametrize(("spec", "field", "words"), REFUSED.values(), ids=REFUSED)
async def test_a_bad_spec_is_refused_with_its_field_named(cluster: Cluster, spec, field, words):
    answer = await cluster.try_create(manifest(spec))
    assert answer.status_code == 422, answer.text
    causes = answer.json()["details"]["causes"]
    assert field in {cause["field"] for cause in causes}, causes
    assert words in answer.json()["message"]
    with pytest.raises(ManifestError):
        validate_manifest(manifest(spec))


@pytest.mark.parametrize("name", ["a" * 46, "1a"])
async def test_a_name_that_services_could_not_have_is_refused(cluster: Cluster, name: str):
    answer = await cluster.try_create(manifest({}, name))
    assert answer.status_code == 422
    assert "at most 45 characters" in answer.json()["message"]


async def test_a_misspelt_field_is_refused_when_kubectl_asks_for_it(cluster: Cluster):
    answer = await cluster.try_create(manifest({"wrokers": {}}), fieldValidation="Strict")
    assert answer.status_code == 400
    assert 'unknown field "spec.wrokers"' in answer.json()["message"]


async def test_the_block_size_stands_while_workers_run(cluster: Cluster):
    await cluster.create("sized", workers={"replicas": 1})
    change = {"spec": {"cache": {"blockSize": 32}}}
    answer = await cluster.try_patch("kvclusters", "sized", change)
    assert answer.status_code == 422
    assert answer.json()["details"]["causes"][0]["field"] == "spec.cache.blockSize"
    assert "set spec.workers.replicas to 0" in answer.json()["message"]
    await cluster.patch("kvclusters", "sized", {"spec": {"workers": {"replicas": 0}}})
    await cluster.patch("kvclusters", "sized", change)
    await cluster.delete("kvclusters", "sized")


def examples() -> Iterator[Any]:
    for file in sorted((ROOT / "examples").glob("*.yaml")):
        for number, document in enumerate(yaml.safe_load_all(file.read_text(encoding="utf-8"))):
            if document["kind"] == "KVCluster":
                yield pytest.param(document, id=f"{file.stem}-{number}")


@pytest.mark.parametrize("document", list(examples()))
async def test_what_is_stored_means_what_was_written(cluster: Cluster, document):
    """The schema's defaults are the model's: filling them in changes nothing."""
    content = {**document, "metadata": {"name": "example"}}
    answer = await cluster.try_create(content)
    assert answer.status_code == 201, answer.text
    assert validate_manifest(answer.json()).spec == validate_manifest(content).spec
    await cluster.delete("kvclusters", "example")
