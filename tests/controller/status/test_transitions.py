"""Which events a change of the status gives, in which order, and that one cause gives one event.

Not covered: creating the events (tests/controller/reconcile/test_events).
"""

from __future__ import annotations

from controller.status.compute import compute
from controller.status.observed import Observed, ReconcileProblem
from controller.status.reasons import ConditionReason
from controller.status.transitions import events
from tests.controller.status.support import NOW, WORKERS, deployment, observed, pod, waiting, with_unready

BROKEN = pod("rag-worker-x", ready=False, containerStatuses=waiting("ErrImagePull", "not found"))
NEW = Observed("rag", "ns", 1, observed().spec, workers_wanted=4)


def events_after(*seen: Observed) -> list[list[tuple[str, str]]]:
    """Events after each of these, one after another."""
    status, said = None, []
    for each in seen:
        current = compute(each, status, NOW)
        said.append([(note.type, note.reason) for note in events(status, current)])
        status = current
    return said


def test_from_apply_to_ready():
    assert events_after(NEW, observed(), observed()) == [
        [("Normal", "Creating")],
        [
            *(("Normal", "AllReady"),) * 2,
            ("Normal", "Fresh"),
            ("Normal", "Complete"),
            ("Normal", "Serving"),
        ],
        [],
    ]


def test_one_cause_gives_one_event():
    well = observed()
    assert events_after(well, with_unready(BROKEN, ready=0), with_unready(BROKEN, ready=0))[1:] == [
        [("Warning", "ImagePullFailed"), ("Normal", "NoWorkers"), ("Normal", "Starting")],
        [],
    ]


def test_the_event_names_the_pod():
    note = events(compute(observed(), None, NOW), compute(with_unready(BROKEN), None, NOW))[0]
    assert (note.type, note.reason) == ("Warning", "ImagePullFailed")
    assert "rag-worker-x" in note.message


def test_a_message_that_changes_alone_is_no_event():
    other = pod("rag-worker-y", ready=False, containerStatuses=waiting("ErrImagePull", "denied"))
    assert events_after(with_unready(BROKEN), with_unready(other))[1] == []


def test_scaling_gives_an_event():
    more = observed(
        workers_wanted=6,
        deployments={"worker": deployment(wanted=6, replicas=4), "router": deployment("router", 2)},
    )
    before, after = compute(observed(), None, NOW), compute(more, None, NOW)
    assert [note.message for note in events(before, after) if note.reason == "Scaled"] == ["workers: from 4 to 6"]


def test_losing_ready_is_a_warning_unless_it_was_asked_for():
    def without(wanted: int) -> Observed:
        return observed(
            pods=WORKERS,
            workers_wanted=wanted,
            deployments={
                "worker": deployment(wanted=wanted, readyReplicas=None, availableReplicas=None),
                "router": deployment("router", 2),
            },
        )

    lost = [note for note in events_after(observed(), without(4))[1] if note[1] == "NoneReady"]
    assert lost == [("Warning", "NoneReady")]
    assert all(kind == "Normal" for kind, _ in events_after(observed(), without(0))[1])


def test_problems_and_their_end():
    conflict = observed(problems=(ReconcileProblem(ConditionReason.NAME_CONFLICT, "Service/rag-router", "is foreign"),))
    assert events_after(observed(), conflict, observed())[1:] == [
        [("Warning", "NameConflict"), ("Normal", "Blocked")],
        [("Normal", "AsExpected"), ("Normal", "Complete")],
    ]
