"""KVClusters through kubectl, as a person at a terminal sees them.

Not covered: the plugin `kubectl kvcluster explain` (tests/kvcluster/explain), kubectl against other kinds
(tests/kube/test_kubectl.py), commands that need pods (tests/kube/e2e/test_headline.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.kube.kubectl import Tool, kubectl_binaries, parameters
from tests.kube.operator.support import COLLECTED_WITHIN, OBJECTS, ROOT, Cluster
from tests.processes import eventually

pytestmark = [pytest.mark.process, pytest.mark.timeout(120)]

RAG = ROOT / "examples" / "rag.yaml"


@pytest.fixture(params=parameters(kubectl_binaries()))
async def kubectl(request: pytest.FixtureRequest, cluster: Cluster, tmp_path: Path) -> Tool:
    """kubectl in the namespace of a cluster with an operator."""
    kubeconfig = cluster.backend.kubeconfig(tmp_path / "admin", namespace=cluster.namespace)
    return Tool(request.param, kubeconfig, tmp_path)


@pytest.mark.parametrize("flags", [(), ("--server-side",)], ids=["client side", "server side"])
async def test_apply_scale_and_delete(kubectl: Tool, cluster: Cluster, flags: tuple[str, ...]):
    assert "kvcluster.kvcluster.dev/rag" in await kubectl("apply", *flags, "-f", str(RAG))
    await eventually(lambda: cluster.has(OBJECTS), "the operator makes its objects")
    await cluster.settled("rag")
    again = await kubectl("apply", *flags, "-f", str(RAG))
    assert ("serverside-applied" if flags else "unchanged") in again
    assert "scaled" in await kubectl("scale", "kvc/rag", "--replicas=6")

    async def followed() -> bool:
        return (await cluster.get("deployments", "rag-worker"))["spec"]["replicas"] == 6

    await eventually(followed, "the Deployment follows")
    assert "deleted" in await kubectl("delete", "kvc", "rag", "--timeout=30s")
    await cluster.collect_garbage(OBJECTS)
    await eventually(lambda: cluster.lacks(OBJECTS), "the objects go with it", COLLECTED_WITHIN)


async def test_get_describe_wait_and_explain(kubectl: Tool, cluster: Cluster):
    await kubectl("apply", "-f", str(RAG))
    await cluster.settled("rag")
    header, row = (await kubectl("get", "kvc")).splitlines()
    assert header.split("  ")[0] == "NAME"
    for column in ("STRATEGY", "WORKERS", "ROUTERS", "HIT RATE", "READY", "AGE"):
        assert column in header
    assert row.split()[:4] == ["rag", "cache_aware", "0/4", "0/1"]
    wide = await kubectl("get", "kvc", "rag", "-o", "wide")
    assert "WHY" in wide
    assert f"rag-router.{cluster.namespace}" in wide
    described = await kubectl("describe", "kvc", "rag")
    for words in ("Conditions:", "WorkersAvailable", "CacheViewFresh", "Events:", "Scaling"):
        assert words in described
    waited = await kubectl.run("wait", "--for=condition=Ready", "kvc/rag", "--timeout=1s")
    assert waited.code != 0, "no pod runs here"
    await kubectl("wait", "--for=condition=Ready=False", "kvc/rag", "--timeout=10s")
    explained = await kubectl("explain", "kvc.spec.autoscaling.targetQueue")
    assert "Waiting requests per worker to aim at" in explained

    assert "kvcluster.dev" in await kubectl("api-resources", "--api-group=kvcluster.dev")
    assert "kvcluster.kvcluster.dev/rag" in await kubectl("get", "all")


async def test_edit_and_diff(kubectl: Tool, cluster: Cluster):
    await kubectl("apply", "-f", str(RAG))
    await kubectl("patch", "kvc", "rag", "--type=merge", "-p", '{"spec":{"router":{"strategy":"round_robin"}}}')
    shown = yaml.safe_load(await kubectl("get", "kvc", "rag", "-o", "yaml"))
    assert shown["spec"]["router"]["strategy"] == "round_robin"
    differs = await kubectl.run("diff", "-f", str(RAG))
    assert differs.code == 1
    assert "+    strategy: cache_aware" in differs.out
    await kubectl("annotate", "kvc", "rag", "team=search")
    await kubectl("label", "kvc", "rag", "tier=gold")
    await cluster.settled("rag")


async def test_bad_input_says_what_to_do(kubectl: Tool, cluster: Cluster):
    bad = {"apiVersion": "kvcluster.dev/v1alpha1", "kind": "KVCluster", "metadata": {"name": "bad"}}
    for spec, words in (
        ({"wrokers": {"replicas": 2}}, 'unknown field "spec.wrokers"'),
        ({"workers": {"replicas": -1}}, "spec.workers.replicas"),
        ({"autoscaling": {"min": 5, "max": 2}}, "lower min or raise max"),
    ):
        ran = await kubectl.run("apply", "-f", "-", stdin=yaml.safe_dump({**bad, "spec": spec}))
        assert ran.code != 0
        assert words in ran.err
    assert await cluster.find("kvclusters", "bad") is None
