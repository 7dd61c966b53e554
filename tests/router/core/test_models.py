"""Which workers a request may go to by its model: several models, further names, LoRA adapters.

Covers: the filter over all states of workers, adapters that are loaded by some, none or no more, what a router with
several tokenizers matches, and the catalogue that a router answers from. Not covered: the answers over HTTP
(tests/router/test_models.py), and the states of workers by themselves (test_worker_state.py).
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.feed import AdaptersChanged, Batch, Heartbeat, WorkerInfo
from router.core.catalogue import Catalogue, catalogue, serves
from router.core.decision import NoWorkerReady
from router.core.errors import Mismatch, RejectReason
from router.core.fleet import Fleet
from router.core.worker_state import Intake
from tests.router.core.support import ask, config, idle, info, keys_of, snapshot, tokens, url_of

OTHER = "e" * 32
"""Fingerprint of another model's tokenizer."""


def fleet_of(*stated: WorkerInfo | None, **changes: object) -> Fleet:
    """Workers that state this; None: one that has not said anything yet, but lives."""
    fleet = Fleet(config(**changes))
    for number, who in enumerate(stated):
        fleet.add(url_of(number))
        fleet.mark_alive(url_of(number), 0.0)
        if who is not None:
            try:
                fleet.apply_snapshot(url_of(number), snapshot(who), 0.0)
            except Mismatch:
                assert who.fingerprint == OTHER
    return fleet


def chosen(fleet: Fleet, model: str | None, *exclude: int) -> set[int]:
    """The workers that a request for this model may go to."""
    decision = fleet.choose(ask(tokens(3), model=model), 0.0, [url_of(number) for number in exclude])
    return {int(candidate.url.split("-")[1].split(":")[0]) for candidate in decision.candidates}


A = info("w0", model="a", names=("a-alias",), adapters=("sql",))
A2 = info("w1", model="a", names=("a-alias",), missing_adapters={"sql": "being loaded"})
B = info("w2", model="b", fingerprint=OTHER)


@pytest.mark.parametrize(
    ("model", "workers"),
    [
        pytest.param("a", {0, 1}, id="a model"),
        pytest.param("a-alias", {0, 1}, id="its other name"),
        pytest.param("b", {2}, id="another model"),
        pytest.param("sql", {0}, id="an adapter that one of two has loaded"),
        pytest.param("nobody", {0, 1, 2}, id="an unknown name: any worker says so"),
        pytest.param(None, {0, 1, 2}, id="no name"),
        pytest.param("", {0, 1, 2}, id="an empty name"),
    ],
)
def test_the_model_chooses_among_the_workers(model: str | None, workers: set[int]) -> None:
    assert chosen(fleet_of(A, A2, B), model) == workers


def test_a_request_without_a_name_goes_to_the_routers_own_model() -> None:
    assert chosen(fleet_of(A, A2, B, model="a"), None) == {0, 1}


def test_a_worker_that_has_said_nothing_may_serve_anything() -> None:
    fleet = fleet_of(A, None)
    assert (chosen(fleet, "a"), chosen(fleet, "b"), chosen(fleet, "sql")) == ({0, 1}, {1}, {0, 1})


def test_a_model_whose_workers_drain_is_served_by_them_and_by_no_other() -> None:
    fleet = fleet_of(A, B)
    fleet.set_intake(url_of(1), Intake.DRAINING)
    assert (chosen(fleet, "b"), chosen(fleet, None)) == ({1}, {0})


def test_a_request_waits_for_its_model_and_does_not_go_to_another() -> None:
    fleet = fleet_of(A, B)
    fleet.mark_unreachable(url_of(1))
    with pytest.raises(NoWorkerReady, match="no worker that serves 'b' is ready: 2 known, 1 ready, 0 excluded"):
        chosen(fleet, "b")
    with pytest.raises(NoWorkerReady):
        chosen(fleet_of(A, B), "b", 1)


def test_an_adapter_that_should_be_loaded_and_is_not_is_waited_for() -> None:
    fleet = fleet_of(A2)
    with pytest.raises(NoWorkerReady, match=r"no worker has loaded the adapter 'sql' yet \(being loaded\)"):
        chosen(fleet, "sql")
    fleet.apply_batch(url_of(0), Batch(1, 1, (AdaptersChanged(("sql",)),), idle()), 0.1)
    assert chosen(fleet, "sql") == {0}
    fleet.apply_batch(url_of(0), Batch(1, 2, (AdaptersChanged((), {"sql": "lost"}),), idle()), 0.2)
    with pytest.raises(NoWorkerReady, match="lost"):
        chosen(fleet, "sql")


def test_what_leaves_is_forgotten() -> None:
    fleet = fleet_of(A, B)
    fleet.remove(url_of(0))
    assert (list(fleet.directory.catalogue.served), fleet.directory.catalogue.missing) == (["b"], {})
    assert chosen(fleet, "sql") == {1}


# --- tokenizers ------------------------------------------------------------------------------------------


def matching(fleet: Fleet) -> list[bool]:
    return [status.matching for status in fleet.workers(0.0)]


def test_each_model_is_matched_by_its_own_tokenizer() -> None:
    fleet = fleet_of(A, B, model="a", fingerprints={"b": OTHER})
    prompt = tokens(4)
    fleet.apply_snapshot(url_of(1), snapshot(B, 1, keys_of(prompt)), 0.0)
    assert matching(fleet) == [True, True]
    assert fleet.choose(ask(prompt, model="b"), 0.0).matched_blocks == 4
    assert fleet.choose(ask(prompt, model="a"), 0.0).matched_blocks == 0


def test_a_model_without_a_tokenizer_is_routed_by_load_and_says_so() -> None:
    fleet = fleet_of(A, B, model="a")
    _, other = fleet.workers(0.0)
    assert (other.ready, other.matching) == (True, False)
    assert "--model-tokenizers b=TOKENIZER" in other.why_not_matching
    assert chosen(fleet, "b") == {1}


def test_a_name_of_the_model_is_enough_to_know_its_tokenizer() -> None:
    assert matching(fleet_of(A, model="a-alias")) == [True]
    assert matching(fleet_of(info("w0", model="b", names=("c",), fingerprint=OTHER), fingerprints={"c": OTHER})) == [
        True
    ]


def test_another_tokenizer_that_is_loaded_later_is_used_from_then_on() -> None:
    fleet = fleet_of(A, B, model="a", fingerprints={"b": ""})
    assert matching(fleet) == [True, False]
    fleet.adopt_tokenizer(OTHER, "b")
    fleet.apply_snapshot(url_of(1), snapshot(B), 0.1)
    assert matching(fleet) == [True, True]


@pytest.mark.parametrize("changes", [{}, {"fingerprints": {"b": OTHER}}], ids=["no tokenizer", "its tokenizer"])
def test_a_worker_with_another_model_that_pushes_joins(changes: dict[str, object]) -> None:
    fleet = fleet_of(A, model="a", **changes)
    assert fleet.apply_heartbeat(Heartbeat(B, url_of(1), 0, idle()), 0.0) is bool(changes)
    fleet.apply_sync(snapshot(B, 1), 0.1)
    assert chosen(fleet, "b") == {1}
    assert matching(fleet)[1] is bool(changes)


def test_adapters_of_a_worker_that_is_not_matched_are_followed() -> None:
    fleet = fleet_of(A, B, model="a")
    fleet.apply_batch(url_of(1), Batch(1, 1, (AdaptersChanged(("poems",)),), idle()), 0.1)
    assert chosen(fleet, "poems") == {1}


def test_a_mismatch_names_the_other_reasons_too() -> None:
    with pytest.raises(Mismatch) as error:
        fleet_of(A).apply_snapshot(url_of(0), snapshot(info("w0", model="a", key_scheme="xxh3")), 0.0)
    assert error.value.reason is RejectReason.KEY_SCHEME


# --- the catalogue ---------------------------------------------------------------------------------------


def test_the_catalogue_lists_models_before_adapters_and_the_routers_own_first() -> None:
    known = fleet_of(B, A, A2, model="a").directory.catalogue
    assert list(known.served) == ["a", "b", "a-alias", "sql"]
    assert known.models == ["a", "b", "a-alias"]
    assert (known.default, known.several, known.complete) == ("a", True, True)
    assert (known.served["sql"].model, known.served["sql"].adapter) == ("a", True)


def test_an_adapter_is_one_while_it_is_loaded_or_waited_for() -> None:
    known = fleet_of(A, info("w1", model="a", missing_adapters={"law": "why"})).directory.catalogue
    assert [known.adapter(name) for name in ("sql", "law", "a", "nobody", "", None)] == ["sql", "law", "", "", "", ""]


def test_a_name_that_is_a_model_somewhere_is_no_adapter() -> None:
    known = fleet_of(A, info("w1", model="sql", fingerprint=OTHER)).directory.catalogue
    assert (known.adapter("sql"), list(known.served)) == ("", ["a", "a-alias", "sql"])


def test_the_longest_context_is_that_of_the_model() -> None:
    stated = [info("w0", model="a", max_model_len=4096), info("w1", model="a", max_model_len=2048)]
    known = fleet_of(*stated, info("w2", model="b", max_model_len=512)).directory.catalogue
    assert [known.served[name].max_model_len for name in "ab"] == [4096, 512]
    assert known.max_model_len == 4096
    assert fleet_of(*stated, info("w2", model="a")).directory.catalogue.served["a"].max_model_len is None


def test_nothing_is_known_without_workers_and_not_all_while_one_is_silent() -> None:
    assert fleet_of().directory.catalogue == Catalogue()
    fleet = fleet_of(A, None)
    assert not fleet.directory.catalogue.complete
    assert not fleet.directory.stated
    fleet.remove(url_of(1))
    assert fleet.directory.catalogue.complete
    assert fleet.directory.stated


names = st.sampled_from("abc")
stated = st.builds(
    lambda model, more, adapters, missing: info(
        model=model, names=tuple(more - {model}), adapters=tuple(adapters), missing_adapters=dict.fromkeys(missing, "")
    ),
    names,
    st.frozensets(names, max_size=1),
    st.frozensets(st.sampled_from("xyz"), max_size=2),
    st.frozensets(st.sampled_from("xyz"), max_size=2),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.none() | stated, max_size=4))
def test_a_name_is_in_the_catalogue_exactly_when_a_worker_states_it(infos: list[WorkerInfo | None]) -> None:
    known = catalogue(((who, "") for who in infos), "")
    said = [who for who in infos if who is not None]
    for name in "abcxyz":
        assert (name in known.served) == any(serves(who, name) for who in said)
        assert (name in known.missing) == (
            name not in known.served and any(name in who.missing_adapters for who in said)
        )
    assert known.complete == (len(said) == len(infos) > 0)
