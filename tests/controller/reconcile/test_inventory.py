"""What is held is what the API server last said, in whatever order its words arrive."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from controller.kube.kinds import DEPLOYMENT, POD
from controller.objects.names import Object
from controller.reconcile.inventory import Inventory, Ref


def item(name: str, version: int, *, uid: str = "", cluster: str = "rag", namespace: str = "ns") -> Object:
    return {
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": uid or f"uid-{name}",
            "resourceVersion": str(version),
            "labels": {"app.kubernetes.io/instance": cluster},
        }
    }


def versions(inventory: Inventory, key: tuple[str, str] = ("ns", "rag")) -> dict[str, str]:
    return {ref.name: held["metadata"]["resourceVersion"] for ref, held in inventory.owned(key)}


def test_an_older_word_does_not_undo_a_newer_one():
    inventory = Inventory()
    assert inventory.put(POD, item("a", 5))
    assert not inventory.put(POD, item("a", 4))
    assert not inventory.put(POD, item("a", 5))
    assert inventory.put(POD, item("a", 10)), "versions are numbers, not text"
    assert versions(inventory) == {"a": "10"}


def test_an_object_of_the_same_name_is_another_object():
    inventory = Inventory()
    inventory.put(POD, item("a", 5, uid="first"))
    inventory.put(POD, item("a", 9, uid="second"))
    assert not inventory.drop(POD, item("a", 8, uid="first")), "the end of the first says nothing of the second"
    assert versions(inventory) == {"a": "9"}
    assert inventory.drop(POD, item("a", 11, uid="second"))
    assert versions(inventory) == {}


def test_an_object_moves_with_its_label():
    inventory = Inventory()
    inventory.put(POD, item("a", 1, cluster="rag"))
    inventory.put(POD, item("a", 2, cluster="chat"))
    assert versions(inventory) == {}
    assert versions(inventory, ("ns", "chat")) == {"a": "2"}


def test_a_full_list_heals_a_lost_deletion_and_spares_what_came_after_it():
    inventory = Inventory()
    inventory.put(DEPLOYMENT, item("gone", 3))
    inventory.put(DEPLOYMENT, item("changed", 3, cluster="chat"))
    inventory.put(DEPLOYMENT, item("elsewhere", 3, namespace="other"))
    inventory.put(DEPLOYMENT, item("written-meanwhile", 30))
    inventory.put(POD, item("of-another-kind", 3))
    news = inventory.replace(DEPLOYMENT, "ns", [item("changed", 20, cluster="chat")], "25")
    assert news == {("ns", "rag"), ("ns", "chat")}
    assert versions(inventory) == {"written-meanwhile": "30", "of-another-kind": "3"}
    assert inventory.keys(DEPLOYMENT) == [("other", "elsewhere"), ("ns", "written-meanwhile"), ("ns", "changed")]


EVENTS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["rag", "chat"]), st.booleans()), max_size=30)


@given(EVENTS, st.randoms(use_true_random=False))
def test_any_order_of_states_ends_with_the_latest(events, rng):
    history = [item(name, version, cluster=cluster) for version, (name, cluster, _) in enumerate(events, 1)]
    latest = {each["metadata"]["name"]: each for each in history}
    rng.shuffle(history)
    inventory = Inventory()
    for each in history:
        inventory.put(POD, each)
    for name, each in latest.items():
        assert inventory.get(POD, ("ns", name)) == each
    owned = [ref for cluster in ("rag", "chat") for ref, _ in inventory.owned(("ns", cluster))]
    assert sorted(owned, key=str) == sorted((Ref(POD, "ns", name) for name in latest), key=str)
