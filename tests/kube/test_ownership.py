"""Invariants of server-side apply, for whatever two managers apply in whatever order.

Not covered: conflicts (every step is forced), subresources, and agreement with the real server
(test_conformance_apply.py).
"""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kube.apiserver.fieldsets import decode, encode, fields_of
from tests.kube.apiserver.ownership import Manager, apply, owned, record
from tests.kube.apiserver.schema import Definitions, structural
from tests.kube.samples import widget_definition

RAW = widget_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
NODE = structural(RAW, Definitions().meta())

Object = dict[str, Any]

words = st.sampled_from(["a", "b", "c"])
parts = st.lists(
    st.fixed_dictionaries({"name": words}, optional={"size": st.integers(0, 2)}),
    max_size=3,
    unique_by=lambda p: p["name"],
)
specs = st.fixed_dictionaries(
    {},
    optional={
        "mode": st.sampled_from(["fast", "slow"]),
        "min": st.integers(0, 2),
        "workers": st.fixed_dictionaries({}, optional={"replicas": st.integers(0, 2)}),
        "parts": parts,
        "args": st.lists(words, max_size=2),
        "labels": st.dictionaries(words, words, max_size=2),
        "extra": st.dictionaries(words, st.one_of(words, st.dictionaries(words, words, max_size=2)), max_size=2),
    },
)
steps = st.lists(st.tuples(st.sampled_from(["one", "two"]), specs), min_size=1, max_size=6)


def applied(spec: Object) -> Object:
    return {"apiVersion": "v1", "kind": "Widget", "metadata": {"name": "a"}, "spec": spec}


def step(live: Object | None, manager: str, spec: Object) -> Object:
    """Apply by force."""
    obj, owners = apply(
        live, applied(spec), NODE, Manager(manager, "Apply"), "v1", "now", force=True, has_status=True
    )  # fmt: skip
    obj = {**obj, "metadata": dict(obj["metadata"])}
    obj.setdefault("spec", {})
    record(obj, owners)
    return obj


def contains(live: Any, wanted: Any) -> bool:
    """Whether everything of an applied configuration is in the live object."""
    if isinstance(wanted, dict):
        return isinstance(live, dict) and all(name in live and contains(live[name], v) for name, v in wanted.items())
    if isinstance(wanted, list) and all(isinstance(item, dict) for item in [*wanted, *live]):
        by_name = {item["name"]: item for item in live}
        return all(item["name"] in by_name and contains(by_name[item["name"]], item) for item in wanted)
    return bool(live == wanted)


@settings(deadline=None)
@given(steps)
def test_what_is_applied_is_there_and_owned(sequence: list[tuple[str, Object]]) -> None:
    live: Object | None = None
    for manager, spec in sequence:
        live = step(live, manager, spec)
        assert contains(live["spec"], spec)
        entry = owned(live).get(Manager(manager, "Apply"))
        assert (entry.fields if entry else set()) == fields_of(applied(spec), NODE)


@settings(deadline=None)
@given(steps)
def test_every_field_there_has_an_owner_and_every_owned_field_is_there(sequence: list[tuple[str, Object]]) -> None:
    live: Object | None = None
    for manager, spec in sequence:
        live = step(live, manager, spec)
    assert live is not None
    there = {f for f in fields_of({"spec": live["spec"]}, NODE) if f != ("f:spec",)}
    claimed = set().union(*(entry.fields for entry in owned(live).values())) - {("f:spec",)}
    assert there <= claimed


@settings(deadline=None)
@given(steps)
def test_applying_again_changes_nothing(sequence: list[tuple[str, Object]]) -> None:
    live: Object | None = None
    for manager, spec in sequence:
        live = step(live, manager, spec)
    manager, spec = sequence[-1]
    assert step(live, manager, spec) == live


@settings(deadline=None)
@given(steps)
def test_nothing_is_left_when_everybody_lets_go(sequence: list[tuple[str, Object]]) -> None:
    live: Object | None = None
    for manager, spec in sequence:
        live = step(live, manager, spec)
    for manager in ("one", "two"):
        live = step(live, manager, {})
    assert live is not None
    assert live["spec"] == {}


@settings(deadline=None)
@given(specs)
def test_field_sets_survive_being_written(spec: Object) -> None:
    fields = fields_of(applied(spec), NODE)
    assert decode(encode(fields)) == fields
