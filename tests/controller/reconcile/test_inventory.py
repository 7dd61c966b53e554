"""The inventory holds the latest state of each object, in whatever order states, deletions and lists arrive.

Not covered: the watches that bring them (tests/kube/operator).
"""

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


def test_an_older_state_does_not_replace_a_newer_one():
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


def test_a_full_list_names_the_cluster_that_an_object_left():
    inventory = Inventory()
    inventory.put(DEPLOYMENT, item("a", 3, cluster="rag"))
    assert inventory.replace(DEPLOYMENT, None, [item("a", 9, cluster="chat")], "9") == {("ns", "rag"), ("ns", "chat")}


def test_a_list_from_before_a_deletion_does_not_bring_the_object_back():
    inventory = Inventory()
    inventory.put(POD, item("a", 5))
    assert inventory.drop(POD, item("a", 9))
    assert inventory.replace(POD, None, [item("a", 5)], "6") == set(), "the list was asked for before the deletion"
    assert not inventory.put(POD, item("a", 7)), "nor does a late event, or the late answer to a write"
    assert versions(inventory) == {}
    assert inventory.put(POD, item("a", 12)), "what left the selection and came back is there again"


def test_a_later_report_of_the_same_end_does_not_let_older_states_back_in():
    inventory = Inventory()
    inventory.put(POD, item("a", 5))
    inventory.drop(POD, item("a", 9))
    inventory.drop(POD, item("a", 5))
    assert not inventory.put(POD, item("a", 7))


def test_an_older_list_does_not_undo_a_newer_one():
    inventory = Inventory()
    inventory.put(POD, item("a", 5))
    inventory.put(POD, item("b", 8, uid="second"))
    inventory.replace(POD, None, [item("b", 8, uid="second")], "10")
    inventory.replace(POD, None, [item("a", 5), item("b", 4, uid="first")], "6")
    assert versions(inventory) == {"b": "8"}
    assert inventory.get(POD, ("ns", "b"))["metadata"]["uid"] == "second"


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


HISTORIES = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["put", "delete"])), max_size=25)


@given(HISTORIES, st.data())
def test_late_lists_never_change_the_final_state(history, data):
    """A server's history, which a watch brings in order, with lists of any earlier moment arriving in between."""
    now: dict[str, Object] = {}
    snapshots: list[tuple[list[Object], str]] = [([], "0")]
    inventory = Inventory()
    for version, (name, what) in enumerate(history, 1):
        if what == "put":
            uid = now[name]["metadata"]["uid"] if name in now else f"{name}-{version}"
            now[name] = item(name, version, uid=uid)
            inventory.put(POD, now[name])
        elif name in now:
            gone = now.pop(name)
            inventory.drop(POD, item(name, version, uid=gone["metadata"]["uid"]))
        snapshots.append((list(now.values()), str(version)))
        inventory.replace(POD, None, *data.draw(st.sampled_from(snapshots)))
        assert versions(inventory) == {name: each["metadata"]["resourceVersion"] for name, each in now.items()}
