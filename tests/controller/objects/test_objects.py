"""The objects that a KVCluster asks for, against Kubernetes' own schemas: owners, selectors, Services, access, scaling.

Not covered: what is in the pods (test_pods), and when the objects are written (tests/controller/reconcile).
"""

from __future__ import annotations

import re
from typing import Any

import kubernetes_validate
import pytest

from controller.kube.kinds import kind_of
from controller.objects.names import Release
from tests.controller.objects.support import EVERYTHING, SPECS, VLLM, objects

ALWAYS = {
    *("ServiceAccount/rag-router", "Role/rag-router", "RoleBinding/rag-router", "ConfigMap/rag-router"),
    *("ConfigMap/rag-worker", "Service/rag-worker", "Service/rag-router", "Service/rag-router-management"),
    *("PodDisruptionBudget/rag-router", "PodDisruptionBudget/rag-worker"),
    *("Deployment/rag-worker", "Deployment/rag-router"),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_kubernetes_own_schemas_take_every_object(spec):
    for item in objects(**spec).values():
        if not kind_of(item).optional:
            kubernetes_validate.validate(item, "1.32", strict=True)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_object_belongs_to_its_cluster(spec):
    made = objects(**spec)
    assert set(made) >= ALWAYS
    for item in made.values():
        metadata = item["metadata"]
        assert metadata["namespace"] == "serving"
        assert metadata["ownerReferences"] == [
            {
                "apiVersion": "kvcluster.dev/v1alpha1", "kind": "KVCluster", "name": "rag", "uid": "uid-1",
                "controller": True, "blockOwnerDeletion": True,
            }
        ]  # fmt: skip
        assert metadata["labels"]["app.kubernetes.io/instance"] == "rag"
        assert metadata["labels"]["app.kubernetes.io/managed-by"] == "kvcluster"


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_selectors_choose_the_pods_of_one_component(spec):
    made = objects(**spec)
    for component in ("router", "worker"):
        labels = made[f"Deployment/rag-{component}"]["spec"]["template"]["metadata"]["labels"]
        for kind in ("Deployment", "PodDisruptionBudget"):
            selector = made[f"{kind}/rag-{component}"]["spec"]["selector"]["matchLabels"]
            assert selector.items() <= labels.items()
            assert selector["app.kubernetes.io/component"] == component
        assert made[f"Service/rag-{component}"]["spec"]["selector"].items() <= labels.items()


def test_replicas_are_the_autoscalers_while_there_is_one():
    assert objects(workers={"replicas": 3})["Deployment/rag-worker"]["spec"]["replicas"] == 3
    made = objects(workers={"replicas": 3}, autoscaling={"max": 5})
    assert "replicas" not in made["Deployment/rag-worker"]["spec"]
    spec = made["HorizontalPodAutoscaler/rag-worker"]["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (1, 5)
    assert spec["metrics"][0]["pods"]["metric"]["name"] == "vllm:num_requests_waiting"
    keda = objects(autoscaling={"type": "keda", "max": 5, "prometheusAddress": "http://prometheus:9090"})
    assert "HorizontalPodAutoscaler/rag-worker" not in keda
    trigger = keda["ScaledObject/rag-worker"]["spec"]["triggers"][0]["metadata"]
    assert trigger["query"] == f'sum(vllm:num_requests_waiting{{namespace="serving", pod=~"{pods_of("rag-worker")}"}})'


def pods_of(deployment: str) -> str:
    """What Prometheus matches a whole name with."""
    return deployment + "-[a-z0-9]+(-[a-z0-9]+)?"


@pytest.mark.parametrize(
    ("pod", "ours"),
    [
        ("rag-worker-5d4f8c7b9-x2x4z", True),
        pytest.param("rag-worker-5d4f8c7b9x2x4z", True, id="a long name, cut off"),
        pytest.param("rag-worker-2-worker-5d4f8c7b9-x2x4z", False, id="another KVCluster"),
        pytest.param("rag-worker-2-router-5d4f8c7b9-x2x4z", False, id="its routers"),
    ],
)
def test_an_autoscaler_counts_no_pod_of_another_kvcluster(pod, ours):
    keda = objects(autoscaling={"type": "keda", "max": 5, "prometheusAddress": "http://prometheus:9090"})
    query = keda["ScaledObject/rag-worker"]["spec"]["triggers"][0]["metadata"]["query"]
    pattern = re.search('pod=~"(.*)"', query)[1]
    assert bool(re.fullmatch(pattern, pod)) is ours


def test_to_scale_to_zero_keda_counts_what_routers_hold_and_takes_no_loading_worker_away():
    scaling = {"type": "keda", "min": 0, "max": 5, "prometheusAddress": "http://prometheus:9090"}
    made = objects(**VLLM, autoscaling=scaling)
    spec = made["ScaledObject/rag-worker"]["spec"]
    assert (spec["minReplicaCount"], spec["pollingInterval"]) == (0, 5)
    window = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]["stabilizationWindowSeconds"]
    assert spec["cooldownPeriod"] == spec["initialCooldownPeriod"] == window == 900, "as long as vLLM may load"
    waiting, running = (trigger["metadata"] for trigger in spec["triggers"])
    assert waiting["query"] == (
        f'(sum(vllm:num_requests_waiting{{namespace="serving", pod=~"{pods_of("rag-worker")}"}}) or vector(0)) + '
        f'(sum(kvcluster_router_flow_waiting{{namespace="serving", pod=~"{pods_of("rag-router")}"}}) or vector(0))'
    )
    assert running["query"].startswith("clamp_max(sum(kvcluster_router_in_flight{")
    assert (waiting["threshold"], running["threshold"]) == ("4", "1")
    assert made["ConfigMap/rag-router"]["data"]["ROUTER_HOLD_SECONDS"] == "960"
    longer = objects(autoscaling={**scaling, "startSeconds": 60, "scaleDownSeconds": 400})
    assert longer["ScaledObject/rag-worker"]["spec"]["cooldownPeriod"] == 400
    assert longer["ConfigMap/rag-router"]["data"]["ROUTER_HOLD_SECONDS"] == "120"
    assert "ROUTER_HOLD_SECONDS" not in objects(autoscaling={**scaling, "min": 1})["ConfigMap/rag-router"]["data"]


def test_a_rolling_update_always_leaves_a_pod_to_answer():
    def rolling(component: str = "worker", **spec: Any) -> dict[str, int]:
        update = objects(**spec)[f"Deployment/rag-{component}"]["spec"]["strategy"]["rollingUpdate"]
        return {name: update[name] for name in ("maxSurge", "maxUnavailable")}

    another_first = {"maxSurge": 1, "maxUnavailable": 0}
    assert rolling("router") == rolling() == another_first
    one_gpu = {**VLLM, "workers": {"replicas": 1}}
    assert rolling(**one_gpu) == another_first, "the only engine may not go before the next is there"
    assert rolling(**VLLM) == {"maxSurge": 0, "maxUnavailable": 1}, "there may be no GPU for one more"


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_services_find_their_ports_whatever_the_cluster_knows_of_sidecars(spec):
    made = objects(**spec)
    for name in ("router", "worker", "router-management"):
        service = made[f"Service/rag-{name}"]["spec"]
        pod = made[f"Deployment/rag-{service['selector']['app.kubernetes.io/component']}"]["spec"]["template"]["spec"]
        named = {port["name"] for container in pod["containers"] for port in container["ports"]}
        for port in service["ports"]:
            assert isinstance(port["targetPort"], int) or port["targetPort"] in named


def test_network_policies_admit_the_peers_they_name_only():
    made = objects(**EVERYTHING)
    (worker,) = made["NetworkPolicy/rag-worker"]["spec"]["ingress"]
    assert [sorted(peer) for peer in worker["from"]] == [["podSelector"], ["namespaceSelector"]]
    data, management = made["NetworkPolicy/rag-router"]["spec"]["ingress"]
    assert "from" not in data
    assert [port["port"] for port in (*data["ports"], *management["ports"])] == [8000, 9000]
    assert management["from"][0]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "system"}
    alone = objects(release=Release("kvcluster:1.2.3"), networkPolicy={"enabled": True})
    _, management = alone["NetworkPolicy/rag-router"]["spec"]["ingress"]
    assert management["from"] == [
        {"podSelector": {"matchLabels": made["Deployment/rag-router"]["spec"]["selector"]["matchLabels"]}}
    ]


def test_routers_may_read_what_they_watch_and_nothing_else():
    made = objects()
    assert made["Role/rag-router"]["rules"] == [
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
    ]
    router = made["Deployment/rag-router"]["spec"]["template"]["spec"]
    assert router["serviceAccountName"] == "rag-router"
    assert made["ServiceAccount/rag-router"]["automountServiceAccountToken"] is False
    assert router["automountServiceAccountToken"] is True, "the account says no, and the pod has the last word"
    assert made["Deployment/rag-worker"]["spec"]["template"]["spec"]["automountServiceAccountToken"] is False


def test_the_longest_name_still_makes_service_names():
    made = objects(name="a" * 45)
    assert max(len(item["metadata"]["name"]) for item in made.values()) == 63


def test_the_same_spec_gives_the_same_objects_and_another_spec_another_stamp():
    def stamps(**spec: Any) -> dict[str, str]:
        return {
            name: item["metadata"]["annotations"]["kvcluster.dev/applied-hash"]
            for name, item in objects(**spec).items()
        }

    first, again, other = stamps(), stamps(), stamps(workers={"replicas": 2})
    assert first == again
    assert {name for name in first if first[name] != other[name]} == {"Deployment/rag-worker"}


def test_every_service_has_the_families_that_are_asked_for():
    services = [item["spec"] for name, item in objects(**EVERYTHING).items() if name.startswith("Service/")]
    assert len(services) == 3
    for spec in services:
        assert (spec["ipFamilyPolicy"], spec["ipFamilies"]) == ("PreferDualStack", ["IPv6", "IPv4"])
    assert not any("ipFamilies" in item.get("spec", {}) for item in objects().values()), "else the cluster decides"


def test_an_entrance_leads_to_the_routers_service():
    made = objects(**EVERYTHING)
    ingress = made["Ingress/rag-router"]
    assert ingress["metadata"]["annotations"]["a"] == "b"
    assert ingress["spec"]["ingressClassName"] == "nginx"
    assert ingress["spec"]["tls"] == [{"hosts": ["llm.example.com"], "secretName": "cert"}]
    (rule,) = ingress["spec"]["rules"]
    backend = rule["http"]["paths"][0]["backend"]["service"]
    service = made["Service/rag-router"]
    assert (rule["host"], backend["name"]) == ("llm.example.com", service["metadata"]["name"])
    assert backend["port"]["name"] in {port["name"] for port in service["spec"]["ports"]}
    route = made["HTTPRoute/rag-router"]["spec"]
    assert (route["parentRefs"], route["hostnames"]) == ([{"name": "gateway"}], ["llm.example.com"])
    (reference,) = route["rules"][0]["backendRefs"]
    assert reference["name"] == service["metadata"]["name"]
    assert reference["port"] in {port["port"] for port in service["spec"]["ports"]}
    assert service["spec"]["loadBalancerClass"] == "example.com/lb"
    assert not {"Ingress/rag-router", "HTTPRoute/rag-router"} & set(objects())
