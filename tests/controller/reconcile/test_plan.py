"""Plans: nothing is written when everything is in sync, and otherwise the least that brings it in sync.

Not covered: carrying a plan out (test_reconciler), and server-side apply itself (tests/kube).
"""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from controller.api.load import validate_manifest
from controller.kube.kinds import SCALED_OBJECT
from controller.objects.desired import desired_objects
from controller.objects.names import Cluster, Object, Release
from controller.reconcile.inventory import Ref
from controller.reconcile.plan import Plan, covers, fingerprint, plan, ref_of, replicas_to_hand_over

UID = "uid-1"


def wanted(**spec: Any) -> dict[Ref, Object]:
    content = {"apiVersion": "kvcluster.dev/v1alpha1", "kind": "KVCluster", "metadata": {"name": "rag"}, "spec": spec}
    cluster = Cluster("rag", "ns", UID, validate_manifest(content).spec, Release("image:1"))
    return {ref_of(item): item for item in desired_objects(cluster)}


def stored(objects: dict[Ref, Object]) -> dict[Ref, Object]:
    """As the API server holds them: with defaults of its own."""
    live = copy.deepcopy(objects)
    for number, item in enumerate(live.values()):
        item["metadata"] |= {"uid": f"o-{number}", "resourceVersion": "1", "generation": 1}
        item.setdefault("spec", {})["setByTheServer"] = True
    return live


def names(objects: tuple[Object, ...]) -> set[str]:
    return {str(ref_of(item)) for item in objects}


def at(objects: dict[Ref, Object], name: str) -> Object:
    return next(item for ref, item in objects.items() if str(ref) == name)


def test_all_is_applied_where_there_is_nothing_and_in_the_order_of_need():
    desired = wanted()
    made = plan(UID, desired.values(), {}, {})
    assert list(map(ref_of, made.apply)) == list(desired)
    kinds = [item["kind"] for item in made.apply]
    assert kinds.index("ConfigMap") < kinds.index("Deployment")
    assert kinds.index("RoleBinding") < kinds.index("Deployment")


def test_nothing_is_written_when_all_is_as_it_should_be():
    desired = wanted(networkPolicy={"enabled": True}, autoscaling={"max": 2})
    assert plan(UID, desired.values(), stored(desired), {}) == Plan()


def test_a_manual_change_of_a_stated_field_is_mended_and_others_are_left():
    desired = wanted()
    live = stored(desired)
    at(live, "Service/rag-worker")["spec"]["selector"]["app.kubernetes.io/instance"] = "other"
    at(live, "Deployment/rag-worker")["spec"]["replicas"] = 7
    at(live, "ConfigMap/rag-router")["metadata"]["annotations"]["a-note"] = "of somebody's"
    container = at(live, "Deployment/rag-router")["spec"]["template"]["spec"]["containers"]
    container.append({"name": "mesh-proxy", "image": "mesh:1"})
    made = plan(UID, desired.values(), live, {})
    assert names(made.apply) == {"Service/rag-worker", "Deployment/rag-worker"}
    assert not made.delete


def test_what_a_spec_no_longer_asks_for_is_deleted_and_nothing_else():
    full = wanted(networkPolicy={"enabled": True}, autoscaling={"max": 2})
    live = stored(full)
    foreign = copy.deepcopy(at(live, "PodDisruptionBudget/rag-worker"))
    foreign["metadata"] |= {"name": "their-own", "ownerReferences": []}
    live[Ref(ref_of(foreign).kind, "ns", "their-own")] = foreign
    made = plan(UID, wanted(workers={"replicas": 1}).values(), live, {})
    assert names(made.delete) == {
        *("NetworkPolicy/rag-worker", "NetworkPolicy/rag-router", "HorizontalPodAutoscaler/rag-worker"),
    }
    assert names(made.apply) == {"Deployment/rag-worker"}, "which states its replicas again"


def test_what_is_being_deleted_is_not_deleted_again():
    full = wanted(autoscaling={"max": 2})
    live = stored(full)
    at(live, "HorizontalPodAutoscaler/rag-worker")["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert not plan(UID, wanted().values(), live, {}).delete


def test_names_that_are_taken_are_left_alone_and_named():
    desired = wanted()
    live = stored(desired)
    at(live, "Service/rag-router")["metadata"]["ownerReferences"] = []
    at(live, "Deployment/rag-router")["metadata"]["ownerReferences"][0] |= {"uid": "another", "name": "rag"}
    made = plan(UID, desired.values(), live, {})
    assert not made.apply
    assert not made.delete
    assert {str(ref): owner for ref, owner in made.conflicts} == {
        "Service/rag-router": "belongs to no KVCluster",
        "Deployment/rag-router": "belongs to KVCluster rag (uid another)",
    }


def test_unknown_kinds_are_named_and_the_rest_is_planned():
    keda = {"type": "keda", "max": 2, "prometheusAddress": "http://p:9090"}
    made = plan(UID, wanted(autoscaling=keda).values(), {}, {}, {SCALED_OBJECT})
    assert [str(ref) for ref in made.missing] == ["ScaledObject/rag-worker"]
    assert len(made.apply) == 12


def test_how_the_server_writes_a_value_down_is_no_drift_but_a_change_of_it_is():
    desired = wanted(workers={"resources": {"requests": {"cpu": "1000m"}}})
    live = stored(desired)
    deployment = at(live, "Deployment/rag-worker")
    requests = deployment["spec"]["template"]["spec"]["containers"][0]["resources"]["requests"]
    requests["cpu"] = "1"
    manifest = at(desired, "Deployment/rag-worker")
    assert names(plan(UID, desired.values(), live, {}).apply) == {"Deployment/rag-worker"}, "once, after a restart"
    stamp = manifest["metadata"]["annotations"]["kvcluster.dev/applied-hash"]
    written = {ref_of(manifest): (stamp, fingerprint(deployment, manifest))}
    assert plan(UID, desired.values(), live, written) == Plan()
    requests["cpu"] = "2"
    assert names(plan(UID, desired.values(), live, written).apply) == {"Deployment/rag-worker"}


def test_replicas_are_handed_over_before_they_are_no_longer_stated():
    owned = {"manager": "kvcluster", "operation": "Apply", "fieldsV1": {"f:spec": {"f:replicas": {}}}}
    manifest = at(wanted(autoscaling={"max": 9}), "Deployment/rag-worker")
    live = at(stored(wanted(workers={"replicas": 5})), "Deployment/rag-worker")
    live["metadata"]["managedFields"] = [owned]
    assert replicas_to_hand_over(manifest, live, 1) == 5
    assert replicas_to_hand_over(manifest, None, 2) == 2, "a new Deployment begins with what the spec says"
    live["metadata"]["managedFields"].append({**owned, "manager": "kube-controller-manager", "operation": "Update"})
    assert replicas_to_hand_over(manifest, live, 1) is None, "somebody else states them"
    stating = at(wanted(workers={"replicas": 5}), "Deployment/rag-worker")
    assert replicas_to_hand_over(stating, live, 1) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcname"), inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
def test_everything_covers_itself(value):
    assert covers(value, value)


@given(st.dictionaries(st.sampled_from("abc"), JSON), st.dictionaries(st.sampled_from("xyz"), JSON))
def test_fields_of_others_do_not_count(stated, others):
    assert covers({**stated, **others}, stated)
    assert fingerprint({**stated, **others}, stated) == fingerprint(stated, stated)


@given(st.dictionaries(st.sampled_from("abc"), st.integers(), min_size=1), st.data())
def test_a_changed_field_counts(stated, data):
    name = data.draw(st.sampled_from(sorted(stated)))
    changed = {**stated, name: stated[name] + 1}
    assert not covers(changed, stated)
    assert fingerprint(changed, stated) != fingerprint(stated, stated)
