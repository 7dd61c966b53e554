"""Built-in kinds, selectors, patches and deletion of the API server, fake and (where there is one) real.

Not covered: what is not modelled, such as evictions and deletion in the foreground
(docs/decisions/020-the-test-bed-models-what-tests-ask-for.md); custom resources (test_conformance.py).
"""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.kube.backends import Backend
from tests.kube.calls import JSON_PATCH, MERGE, STRATEGIC, apply, ok, patch, refused
from tests.kube.samples import config_map, deployment, pod, widget

pytestmark = pytest.mark.process

DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


# Built-in kinds


async def test_defaults_of_a_deployment(client: httpx.AsyncClient, ns: str) -> None:
    spec = ok(await client.post(f"/apis/apps/v1/namespaces/{ns}/deployments", json=deployment()), 201)["spec"]
    assert (spec["replicas"], spec["revisionHistoryLimit"], spec["progressDeadlineSeconds"]) == (1, 10, 600)
    assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": "25%"}}
    template = spec["template"]["spec"]
    assert (template["restartPolicy"], template["terminationGracePeriodSeconds"]) == ("Always", 30)
    container = template["containers"][0]
    assert container["imagePullPolicy"] == "IfNotPresent"
    assert container["terminationMessagePath"] == "/dev/termination-log"
    assert container["ports"] == [{"containerPort": 80, "protocol": "TCP"}]


async def test_quantities_are_written_one_way(client: httpx.AsyncClient, ns: str) -> None:
    body = deployment()
    container = body["spec"]["template"]["spec"]["containers"][0]
    container["resources"] = {
        "requests": {"cpu": "1000m", "memory": "1024Mi"}, "limits": {"cpu": 0.5, "memory": "1.5Gi"},
    }  # fmt: skip
    container["resources"]["limits"]["cpu"] = "2000m"
    obj = ok(await client.post(f"/apis/apps/v1/namespaces/{ns}/deployments", json=body), 201)
    resources = obj["spec"]["template"]["spec"]["containers"][0]["resources"]
    assert resources == {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"cpu": "2", "memory": "1536Mi"}}


async def test_defaults_of_a_service_and_its_address_that_stays(client: httpx.AsyncClient, ns: str) -> None:
    services = f"/api/v1/namespaces/{ns}/services"
    body = {"metadata": {"name": "s"}, "spec": {"selector": {"a": "b"}, "ports": [{"port": 80}]}}
    spec = ok(await client.post(services, json=body), 201)["spec"]
    assert (spec["type"], spec["sessionAffinity"]) == ("ClusterIP", "None")
    assert spec["ports"] == [{"port": 80, "protocol": "TCP", "targetPort": 80}]
    assert spec["clusterIP"]
    moved = ok(await patch(client, f"{services}/s", {"spec": {"selector": {"a": "c"}}}))
    assert moved["spec"]["clusterIP"] == spec["clusterIP"]
    refused(await patch(client, f"{services}/s", {"spec": {"clusterIP": "10.0.0.77"}}), 422, "Invalid")
    headless = {"metadata": {"name": "h"}, "spec": {"clusterIP": "None", "ports": [{"port": 80}]}}
    assert ok(await client.post(services, json=headless), 201)["spec"]["clusterIP"] == "None"


async def test_a_service_can_change_its_type(client: httpx.AsyncClient, ns: str) -> None:
    path = f"/api/v1/namespaces/{ns}/services/s"

    def service(kind: str) -> dict[str, Any]:
        spec = {"type": kind, "selector": {"a": "b"}, "ports": [{"name": "http", "port": 80}]}
        return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}, "spec": spec}

    exposed = ok(await apply(client, path, service("NodePort")), 201)["spec"]
    assert exposed["ports"][0]["nodePort"] >= 30000
    assert exposed["externalTrafficPolicy"] == "Cluster"
    inside = ok(await apply(client, path, service("ClusterIP")))["spec"]
    assert "nodePort" not in inside["ports"][0]
    assert "externalTrafficPolicy" not in inside
    assert inside["clusterIP"] == exposed["clusterIP"]
    balanced = ok(await apply(client, path, service("LoadBalancer")))["spec"]
    assert balanced["allocateLoadBalancerNodePorts"] is True


async def test_zero_values_are_left_out(client: httpx.AsyncClient, ns: str) -> None:
    body = {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "s", "labels": {}, "annotations": None},
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": False, "ports": [{"port": 80, "nodePort": 0}],
                 "selector": {"a": "b"}},
    }  # fmt: skip
    path = f"/api/v1/namespaces/{ns}/services/s"
    first = ok(await apply(client, path, body), 201)
    assert not {"labels", "annotations"} & set(first["metadata"])
    assert "publishNotReadyAddresses" not in first["spec"]
    assert "nodePort" not in first["spec"]["ports"][0]
    again = ok(await apply(client, path, body))
    assert again["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    web = deployment(minReadySeconds=0)
    spec = web["spec"]["template"]["spec"]
    spec |= {"automountServiceAccountToken": False, "hostNetwork": False, "nodeSelector": {}, "tolerations": []}
    spec["containers"][0] |= {"args": [], "env": [{"name": "A", "value": ""}], "securityContext": {"privileged": False}}
    spec["volumes"] = [{"name": "v", "emptyDir": {}}]
    shown = ok(await client.post(f"/apis/apps/v1/namespaces/{ns}/deployments", json=web), 201)["spec"]
    assert "minReadySeconds" not in shown
    template = shown["template"]["spec"]
    assert not {"hostNetwork", "nodeSelector", "tolerations"} & set(template)
    assert template["automountServiceAccountToken"] is False
    assert template["volumes"] == [{"name": "v", "emptyDir": {}}]
    container = template["containers"][0]
    assert "args" not in container
    assert container["env"] == [{"name": "A"}]
    assert container["securityContext"] == {"privileged": False}


async def test_what_may_not_change(client: httpx.AsyncClient, ns: str) -> None:
    ok(await client.post(f"/apis/apps/v1/namespaces/{ns}/deployments", json=deployment()), 201)
    change = {"spec": {"selector": {"matchLabels": {"app": "other"}},
                       "template": {"metadata": {"labels": {"app": "other"}}}}}  # fmt: skip
    status = refused(await patch(client, f"/apis/apps/v1/namespaces/{ns}/deployments/web", change), 422, "Invalid")
    assert "field is immutable" in status["message"]
    rbac = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{ns}/rolebindings"
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "r"}
    ok(await client.post(rbac, json={"metadata": {"name": "b"}, "roleRef": reference}), 201)
    status = refused(await patch(client, f"{rbac}/b", {"roleRef": {"name": "s"}}), 422, "Invalid")
    assert "cannot change roleRef" in status["message"]


async def test_a_deployment_status_that_contradicts_itself_is_refused(client: httpx.AsyncClient, ns: str) -> None:
    path = f"/apis/apps/v1/namespaces/{ns}/deployments"
    ok(await client.post(path, json=deployment()), 201)
    refused(await patch(client, f"{path}/web/status", {"status": {"readyReplicas": 1}}), 422, "Invalid")
    counts = dict.fromkeys(("replicas", "updatedReplicas", "readyReplicas", "availableReplicas"), 1)
    shown = ok(await patch(client, f"{path}/web/status", {"status": {**counts, "observedGeneration": 1}}))
    assert shown["status"]["readyReplicas"] == 1


async def test_names_and_places(client: httpx.AsyncClient, ns: str) -> None:
    maps = f"/api/v1/namespaces/{ns}/configmaps"
    ok(await client.post(maps, json=config_map()), 201)
    status = refused(await client.post(maps, json=config_map()), 409, "AlreadyExists")
    assert status["message"] == 'configmaps "c" already exists'
    status = refused(await client.get(f"{maps}/none"), 404, "NotFound")
    assert status["message"] == 'configmaps "none" not found'
    assert status["details"] == {"name": "none", "kind": "configmaps"}
    status = refused(await client.post("/api/v1/namespaces/nowhere/configmaps", json=config_map()), 404, "NotFound")
    assert status["message"] == 'namespaces "nowhere" not found'
    named = ok(await client.post(maps, json={"metadata": {"generateName": "gen-"}}), 201)
    assert named["metadata"]["name"].startswith("gen-")
    assert len(named["metadata"]["name"]) == 9
    refused(await client.post(maps, json=config_map("Not_a_name")), 422, "Invalid")
    elsewhere = config_map("d", namespace="default")
    refused(await client.post(maps, json=elsewhere), 400, "BadRequest")
    refused(await client.put(f"{maps}/c", json=config_map("d")), 400, "BadRequest")


async def test_dry_runs_keep_nothing(client: httpx.AsyncClient, widgets: str) -> None:
    shown = ok(await client.post(widgets, json=widget(), params={"dryRun": "All"}), 201)
    assert shown["spec"]["mode"] == "fast"
    refused(await client.get(f"{widgets}/a"), 404, "NotFound")


# Lists


async def test_selectors(client: httpx.AsyncClient, ns: str) -> None:
    maps = f"/api/v1/namespaces/{ns}/configmaps"
    for name, labels in {"one": {"a": "1", "b": "x"}, "two": {"a": "2"}, "three": {"b": "x"}}.items():
        ok(await client.post(maps, json=config_map(name, labels=labels)), 201)

    async def names(**query: str) -> set[str]:
        return {obj["metadata"]["name"] for obj in ok(await client.get(maps, params=query))["items"]} & {
            "one", "two", "three",
        }  # fmt: skip

    assert await names(labelSelector="a=1") == {"one"}
    assert await names(labelSelector="a!=1") == {"two", "three"}
    assert await names(labelSelector="a in (1,2),b") == {"one"}
    assert await names(labelSelector="a notin (1)") == {"two", "three"}
    assert await names(labelSelector="!a") == {"three"}
    assert await names(fieldSelector="metadata.name=two") == {"two"}
    assert await names(fieldSelector="metadata.name!=two") == {"one", "three"}
    refused(await client.get(maps, params={"fieldSelector": "data.x=1"}), 400, "BadRequest")
    refused(await client.get(maps, params={"labelSelector": "a=1=2"}), 400, "BadRequest")


async def test_pods_are_selected_by_node_and_phase(client: httpx.AsyncClient, ns: str) -> None:
    pods = f"/api/v1/namespaces/{ns}/pods"
    ok(await client.post(pods, json=pod("placed", nodeName="n1")), 201)
    ok(await client.post(pods, json=pod("waiting")), 201)
    on_node = ok(await client.get(pods, params={"fieldSelector": "spec.nodeName=n1"}))["items"]
    assert [p["metadata"]["name"] for p in on_node] == ["placed"]
    pending = ok(await client.get(pods, params={"fieldSelector": "status.phase=Pending"}))["items"]
    assert len(pending) == 2


# Patches


async def test_merge_patch(client: httpx.AsyncClient, ns: str) -> None:
    maps = f"/api/v1/namespaces/{ns}/configmaps"
    ok(await client.post(maps, json=config_map(data={"a": "1", "b": "2"})), 201)
    assert ok(await patch(client, f"{maps}/c", {"data": {"a": None, "c": "3"}}))["data"] == {"b": "2", "c": "3"}


async def test_json_patch(client: httpx.AsyncClient, ns: str) -> None:
    maps = f"/api/v1/namespaces/{ns}/configmaps"
    ok(await client.post(maps, json=config_map(data={"a": "1", "b.c": "2"})), 201)
    steps = [
        {"op": "test", "path": "/data/a", "value": "1"},
        {"op": "replace", "path": "/data/a", "value": "9"},
        {"op": "remove", "path": "/data/b.c"},
        {"op": "add", "path": "/metadata/labels", "value": {"x/y": "z"}},
    ]
    obj = ok(await patch(client, f"{maps}/c", steps, JSON_PATCH))
    assert (obj["data"], obj["metadata"]["labels"]) == ({"a": "9"}, {"x/y": "z"})
    refused(await patch(client, f"{maps}/c", steps, JSON_PATCH), 422, "Invalid")


async def test_strategic_merge_patch_merges_lists_by_their_keys(client: httpx.AsyncClient, ns: str) -> None:
    path = f"/apis/apps/v1/namespaces/{ns}/deployments"
    body = deployment()
    body["spec"]["template"]["spec"]["containers"][0]["env"] = [
        {"name": "A", "value": "1"},
        {"name": "B", "value": "2"},
    ]
    ok(await client.post(path, json=body), 201)
    change = {"spec": {"template": {"spec": {"containers": [
        {"name": "main", "image": "web:2", "env": [{"name": "B", "value": "3"}, {"name": "A", "$patch": "delete"}]},
        {"name": "side", "image": "side:1"},
    ]}}}}  # fmt: skip
    obj = ok(await patch(client, f"{path}/web", change, STRATEGIC))
    containers = {c["name"]: c for c in obj["spec"]["template"]["spec"]["containers"]}
    assert containers["main"]["image"] == "web:2"
    assert containers["main"]["env"] == [{"name": "B", "value": "3"}]
    assert containers["main"]["ports"][0]["containerPort"] == 80
    assert containers["side"]["imagePullPolicy"] == "IfNotPresent"


async def test_custom_resources_take_no_strategic_merge_patch(client: httpx.AsyncClient, widgets: str) -> None:
    ok(await client.post(widgets, json=widget()), 201)
    refused(await patch(client, f"{widgets}/a", {"spec": {}}, STRATEGIC), 415, "UnsupportedMediaType")
    refused(await patch(client, f"{widgets}/none", {"spec": {}}, MERGE), 404, "NotFound")


# Deletion


async def test_finalizers_hold_an_object(client: httpx.AsyncClient, widgets: str) -> None:
    body = widget()
    body["metadata"]["finalizers"] = ["example.dev/hold"]
    ok(await client.post(widgets, json=body), 201)
    marked = ok(await client.delete(f"{widgets}/a"))
    assert marked["metadata"]["deletionTimestamp"]
    assert marked["metadata"]["generation"] == 2
    ok(await client.delete(f"{widgets}/a"))
    ok(await patch(client, f"{widgets}/a", {"metadata": {"finalizers": None}}))
    refused(await client.get(f"{widgets}/a"), 404, "NotFound")


async def test_deleting_says_what_was_deleted(client: httpx.AsyncClient, widgets: str) -> None:
    created = ok(await client.post(widgets, json=widget()), 201)
    status = ok(await client.delete(f"{widgets}/a"))
    assert status["status"] == "Success"
    assert status["details"]["uid"] == created["metadata"]["uid"]
    refused(await client.delete(f"{widgets}/a"), 404, "NotFound")


async def test_preconditions_of_a_deletion(client: httpx.AsyncClient, widgets: str) -> None:
    created = ok(await client.post(widgets, json=widget()), 201)
    wrong = {"preconditions": {"uid": "00000000-0000-0000-0000-000000000000"}}
    refused(await client.request("DELETE", f"{widgets}/a", json=wrong), 409, "Conflict")
    right = {"preconditions": {"uid": created["metadata"]["uid"]}}
    ok(await client.request("DELETE", f"{widgets}/a", json=right))


async def test_a_pod_on_a_node_ends_gracefully(client: httpx.AsyncClient, ns: str) -> None:
    pods = f"/api/v1/namespaces/{ns}/pods"
    ok(await client.post(pods, json=pod("placed", nodeName="n1")), 201)
    ok(await client.post(pods, json=pod("waiting")), 201)
    ok(await client.delete(f"{pods}/waiting"))
    refused(await client.get(f"{pods}/waiting"), 404, "NotFound")
    ok(await client.delete(f"{pods}/placed"))
    ending = ok(await client.get(f"{pods}/placed"))["metadata"]
    assert ending["deletionTimestamp"]
    assert ending["deletionGracePeriodSeconds"] == 30
    ok(await client.request("DELETE", f"{pods}/placed", json={"gracePeriodSeconds": 0}))
    refused(await client.get(f"{pods}/placed"), 404, "NotFound")


async def test_a_backend_says_which_it_is(api: Backend, client: httpx.AsyncClient) -> None:
    version = ok(await client.get("/version"))
    assert version["major"] == "1"
    assert api.real or api.fake.url == api.url
