"""The operator against an API server: objects follow the spec, whatever happens to them or to it.

Not covered: what is in the objects (tests/controller/test_objects.py), pods and traffic (tests/kube/e2e), the
operator's rights (tests/deploy/test_install.py), and a Secret that is deleted (test_management_token.py).
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from controller.objects.names import FIELD_MANAGER
from tests.kube.operator.support import COLLECTED_WITHIN, OBJECTS, Cluster
from tests.processes import eventually

pytestmark = [pytest.mark.process, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(loop_scope="module")
async def cluster(shared: Cluster, request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    """A namespace of the test's own."""
    index = request.session.items.index(request.node)
    cluster = await shared.add_namespace(f"test-{index}")
    yield cluster
    if await cluster.find("kvclusters", "rag") is not None:
        await cluster.delete("kvclusters", "rag")


async def test_a_kvcluster_gets_its_objects_and_takes_them_with_it(cluster: Cluster):
    await cluster.create("rag", workers={"replicas": 3})
    await eventually(lambda: cluster.has(OBJECTS), "the operator runs, and all objects are there", 60)
    deployment = await cluster.get("deployments", "rag-worker")
    assert deployment["spec"]["replicas"] == 3
    owner = await cluster.get("kvclusters", "rag")
    assert deployment["metadata"]["ownerReferences"][0]["uid"] == owner["metadata"]["uid"]
    assert "finalizers" not in owner["metadata"], "it can be deleted while no controller runs"
    assert "annotations" not in owner["metadata"]


async def test_the_longest_name_there_is(cluster: Cluster):
    name = "a" * 45
    await cluster.create(name)
    await eventually(lambda: cluster.has(OBJECTS, name), "all objects are there")
    assert len((await cluster.get("services", f"{name}-router-management"))["metadata"]["name"]) == 63
    await cluster.delete("kvclusters", name)


async def test_a_changed_spec_changes_its_objects_and_no_others(cluster: Cluster):
    await cluster.create("rag")
    await cluster.settled("rag")
    before = await cluster.versions()
    await cluster.patch("kvclusters", "rag", {"spec": {"router": {"strategy": "round_robin"}}})

    async def changed() -> bool:
        return (await cluster.get("configmaps", "rag-router"))["data"]["ROUTER_STRATEGY"] == "round_robin"

    await eventually(changed, "the routers' settings change")
    await cluster.settled("rag")
    after = await cluster.versions()
    assert {name for name in after if after[name] != before[name]} == {
        "configmaps/rag-router",
        "deployments/rag-router",
    }


async def test_optional_parts_come_change_and_go(cluster: Cluster):
    await cluster.create("rag", workers={"replicas": 3})
    await cluster.settled("rag")
    optional = {"horizontalpodautoscalers/rag-worker", "networkpolicies/rag-worker", "networkpolicies/rag-router"}
    parts = {"autoscaling": {"max": 5}, "networkPolicy": {"enabled": True}}
    await cluster.patch("kvclusters", "rag", {"spec": parts})
    await eventually(lambda: cluster.has(OBJECTS | optional), "the optional objects are there")
    await cluster.settled("rag")
    assert (await cluster.get("deployments", "rag-worker"))["spec"]["replicas"] == 3, "the autoscaler begins from here"
    await cluster.patch("kvclusters", "rag", {"spec": {"autoscaling": {"max": 7}}})

    async def raised() -> bool:
        return (await cluster.get("horizontalpodautoscalers", "rag-worker"))["spec"]["maxReplicas"] == 7

    await eventually(raised, "the autoscaler follows")
    await cluster.patch("kvclusters", "rag", {"spec": {"autoscaling": None, "networkPolicy": {"enabled": False}}})
    await eventually(lambda: cluster.lacks(optional), "they are gone")
    assert await cluster.has(OBJECTS)


async def test_a_deployment_of_an_autoscaler_never_has_another_number(cluster: Cluster):
    """A Deployment controller starts what it sees: with 1, the default, an engine without anybody who asks."""
    await cluster.create(
        "rag",
        workers={"replicas": 0},
        autoscaling={"type": "keda", "min": 0, "max": 2, "prometheusAddress": "http://p"},
    )
    await eventually(lambda: cluster.has(OBJECTS), "the objects are there")

    async def handed_over() -> bool:
        entries = (await cluster.get("deployments", "rag-worker"))["metadata"]["managedFields"]
        own = next(each for each in entries if each["manager"] == FIELD_MANAGER)
        return "f:replicas" not in own["fieldsV1"]["f:spec"]

    await eventually(handed_over, "the number is an autoscaler's to change")
    made = await cluster.get("deployments", "rag-worker")
    assert (made["spec"]["replicas"], made["metadata"]["generation"]) == (0, 1), "it was made with this number"


async def test_replicas_belong_to_the_autoscaler_while_there_is_one(cluster: Cluster):
    await cluster.create("rag", workers={"replicas": 2}, autoscaling={"min": 2, "max": 9})
    await cluster.settled("rag")

    async def replicas(number: int) -> bool:
        return (await cluster.get("deployments", "rag-worker"))["spec"]["replicas"] == number

    assert await replicas(2), "as many as the spec says at first"
    await cluster.scale("deployments", "rag-worker", 6)
    await cluster.patch("kvclusters", "rag", {"spec": {"engine": {"seed": 5}}})
    await cluster.settled("rag")
    assert await replicas(6), "what the autoscaler decided stays"
    await cluster.patch("kvclusters", "rag", {"spec": {"autoscaling": None}})
    await eventually(lambda: replicas(2), "the spec decides again")


@pytest.mark.parametrize(
    ("plural", "name", "patch"),
    [
        pytest.param(plural, name, patch, id=f"{plural}/{name}")
        for plural, name, patch in (
            ("services", "rag-worker", {"spec": {"selector": {"app.kubernetes.io/instance": "other"}}}),
            ("configmaps", "rag-router", {"data": {"ROUTER_STRATEGY": "round_robin"}}),
            ("deployments", "rag-router", {"spec": {"replicas": 0}}),
            ("roles", "rag-router", {"rules": []}),
            ("deployments", "rag-worker", {"metadata": {"labels": {"app.kubernetes.io/instance": None}}}),
        )
    ],
)
async def test_changes_by_hand_are_undone_within_five_seconds(cluster: Cluster, plural, name, patch):
    await cluster.create("rag")
    await cluster.settled("rag")
    wanted = await cluster.stated(plural, name)
    await cluster.patch(plural, name, patch)

    async def mended() -> bool:
        return await cluster.stated(plural, name) == wanted

    await eventually(mended, "it is as it was", 15)


async def test_an_object_that_was_taken_from_its_cluster_is_left_alone(cluster: Cluster):
    await cluster.create("rag")
    await cluster.settled("rag")
    await cluster.patch("serviceaccounts", "rag-router", {"metadata": {"ownerReferences": None}})
    await eventually(lambda: cluster.condition("rag", "Degraded", "NameConflict"), "the status says so")
    assert "ownerReferences" not in (await cluster.get("serviceaccounts", "rag-router"))["metadata"]


@pytest.mark.parametrize("name", sorted(name for name in OBJECTS if not name.startswith("secrets/")))
async def test_a_deleted_object_comes_back_within_five_seconds(cluster: Cluster, name):
    await cluster.create("rag")
    await cluster.settled("rag")
    plural, _, object_name = name.partition("/")
    uid = (await cluster.get(plural, object_name))["metadata"]["uid"]
    await cluster.delete(plural, object_name)

    async def back() -> bool:
        found = await cluster.find(plural, object_name)
        return found is not None and found["metadata"]["uid"] != uid

    await eventually(back, "it is back", 15)


async def test_what_others_add_is_left_alone(cluster: Cluster):
    await cluster.create("rag")
    await cluster.settled("rag")
    note = {"metadata": {"annotations": {"example.com/note": "ours"}}}
    for plural, name in (("deployments", "rag-worker"), ("services", "rag-router"), ("configmaps", "rag-worker")):
        await cluster.patch(plural, name, note)
    await cluster.patch("kvclusters", "rag", {"spec": {"workers": {"replicas": 4}, "engine": {"seed": 9}}})
    await cluster.settled("rag")
    for plural, name in (("deployments", "rag-worker"), ("services", "rag-router"), ("configmaps", "rag-worker")):
        assert (await cluster.get(plural, name))["metadata"]["annotations"]["example.com/note"] == "ours"


async def test_names_that_are_taken_are_not_taken_over(cluster: Cluster):
    foreign = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "rag-router"}, "data": {"mine": "1"}}
    await cluster.apply_raw("configmaps", foreign)
    await cluster.create("rag")
    await eventually(lambda: cluster.condition("rag", "Degraded", "NameConflict"), "the status says so")
    found = next(each for each in await cluster.conditions("rag") if each["type"] == "Degraded")
    assert "ConfigMap/rag-router" in found["message"]
    assert (await cluster.get("configmaps", "rag-router"))["data"] == {"mine": "1"}
    await eventually(lambda: cluster.has(OBJECTS), "the rest is made")
    await cluster.delete("configmaps", "rag-router")
    await eventually(lambda: cluster.condition("rag", "Degraded", "AsExpected"), "and all is well once it is free", 20)


async def test_a_cluster_made_anew_under_its_old_name_gets_objects_of_its_own(cluster: Cluster):
    await cluster.create("rag")
    await cluster.settled("rag")
    await cluster.delete("kvclusters", "rag")
    await cluster.collect_garbage(OBJECTS)
    await cluster.create("rag")
    uid = (await cluster.get("kvclusters", "rag"))["metadata"]["uid"]

    async def anew() -> bool:
        found = [await cluster.find(*name.split("/")) for name in OBJECTS]
        return all(each and each["metadata"]["ownerReferences"][0]["uid"] == uid for each in found)

    await eventually(anew, "its objects are its own", COLLECTED_WITHIN)


async def test_a_spec_that_no_schema_can_refuse_leaves_what_runs(cluster: Cluster):
    await cluster.create("rag")
    await cluster.settled("rag")
    before = await cluster.versions()
    await cluster.patch("kvclusters", "rag", {"spec": {"model": {"maxModelLen": 100_000}, "router": {"replicas": 3}}})
    await eventually(lambda: cluster.condition("rag", "Degraded", "InvalidSpec"), "the status says so")
    found = next(each for each in await cluster.conditions("rag") if each["type"] == "Degraded")
    assert "maxModelLen" in found["message"]
    assert await cluster.versions() == before
    await cluster.patch("kvclusters", "rag", {"spec": {"model": {"maxModelLen": None}}})
    await eventually(lambda: cluster.condition("rag", "Degraded", "AsExpected"), "it recovers")
    assert (await cluster.get("deployments", "rag-router"))["spec"]["replicas"] == 3
