"""Draws the state machines of the code in docs/states.md: `python -m tests.diagrams` writes the page's diagrams anew.

A diagram is what a walk finds that starts in the first state and tries every event in every state it meets: an arrow is
there because the code's own function or table took that step. `MACHINES` lists what is drawn. To add a machine, add it
to that list, write a section in docs/states.md with the line `<!-- states: NAME -->`, and run the command.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from bench.simulation.request import SIMULATED_REQUEST_TRANSITIONS
from bench.simulation.request import RequestEvent as SimulatedRequestEvent
from bench.simulation.request import RequestState as SimulatedRequestState
from bench.simulation.router import LinkEvent, LinkState, link_transition
from bench.simulation.worker import ProcessEvent as SimulatedProcessEvent
from bench.simulation.worker import ProcessState as SimulatedProcessState
from bench.simulation.worker import transition as simulated_transition
from controller.kube.connections import API_SERVER_TRANSITIONS, ApiServerEvent, ApiServerState
from controller.local.process import PROCESS_TRANSITIONS, ProcessEvent, ProcessState
from controller.reconcile.queue import KEY_TRANSITIONS, KeyEvent, KeyState
from kvcluster.top.following import READER_TRANSITIONS, ReaderEvent, ReaderState
from router.core import ledger, worker_state
from router.core.flow import WaitEvent, WaitState, wait_transition
from router.core.view import ViewEvent, ViewState
from router.core.view import transition as view_transition
from router.discovery.list_state import LIST_TRANSITIONS, ListEvent, ListState
from router.picker.dispatched import DISPATCH_TRANSITIONS, DispatchEvent, DispatchState
from router.picker.stream import STREAM_TRANSITIONS
from router.picker.stream import StreamEvent as PickerStreamEvent
from router.picker.stream import StreamState as PickerStreamState
from router.server.answer import EventKind, StreamState
from router.server.answer import transition as stream_transition
from router.server.management import ROUTER_TRANSITIONS, RouterEvent, RouterState
from router.server.tokenizer_loader import TOKENIZER_TRANSITIONS, TokenizerEvent, TokenizerState
from router.upstream.connection import CONNECTION_TRANSITIONS, ConnectionEvent, ConnectionState
from router.upstream.in_flight import REQUEST_TRANSITIONS, RequestEvent, RequestState
from runtime.grpc.call import CALL_TRANSITIONS, CallEvent, CallState
from runtime.http.connection import READ_TRANSITIONS, ReadEvent, ReadState
from runtime.http.context import SERVER_TRANSITIONS, ServerEvent, ServerState
from runtime.http.request import ANSWER_TRANSITIONS, AnswerEvent, AnswerState
from worker.agent.core.follower import REPLAY_TRANSITIONS, ReplayEvent, ReplayState
from worker.agent.prompts import AGREEMENT_TRANSITIONS, Agreement, AgreementEvent
from worker.agent.rank import FOLLOW_TRANSITIONS, FollowEvent, FollowState
from worker.emulator.engine.sequence import SEQUENCE_TRANSITIONS, SequenceEvent, SequenceState
from worker.emulator.server.response import RESPONSE_TRANSITIONS, ResponseEvent, ResponseStatus
from worker.emulator.server.service import EMULATOR_TRANSITIONS, EmulatorEvent, EmulatorState
from worker.lora.reconciler import ADAPTER_TRANSITIONS, AdapterEvent, AdapterState

PAGE = Path(__file__).parents[1] / "docs" / "states.md"
_BLOCK = re.compile(r"^<!-- states: (?P<name>.+?) -->\n(?:```mermaid\n.*?^```\n)?", re.MULTILINE | re.DOTALL)


class DiagramError(ValueError):
    """A machine has a state that no event leads to, or the page and `MACHINES` name different machines."""


@dataclass(frozen=True)
class Machine:
    """One state machine.

    `transition(state, event)` gives the next state; a step that the machine does not allow raises `refusal` or leads to
    where it began. `states` are all there are: each must be reachable from `start`. `events` are the values to try, by
    the label on the arrow. `state_name` is how a state is drawn.
    """

    name: str
    states: Iterable[Hashable]
    start: Hashable
    transition: Callable[[Any, Any], Hashable]
    events: Mapping[str, Any]
    refusal: type[Exception] = KeyError
    state_name: Callable[[Any], str] = lambda state: str(state.name if isinstance(state, Enum) else state).lower()


def events_of(events: Iterable[Enum]) -> dict[str, Any]:
    """Every member of an enum of events (or the members given), by its name in plain words."""
    return {event.name.lower().replace("_", " "): event for event in events}


def by_table(table: Mapping[Any, Any]) -> Callable[[Any, Any], Any]:
    """The transition function of a table, `{(state, event): state}` or `{state: {event: state}}`."""
    return lambda state, event: table[state, event] if (state, event) in table else table[state][event]


def draw(machine: Machine) -> str:
    """The machine as a Mermaid `stateDiagram-v2`. Raises `DiagramError` for a state that no walk reaches."""
    arrows: dict[tuple[Hashable, Hashable], list[str]] = {}
    reached, waiting = {machine.start: None}, [machine.start]  # a dict keeps the order in which they were found
    while waiting:
        state = waiting.pop(0)
        for label, event in machine.events.items():
            try:
                target = machine.transition(state, event)
            except machine.refusal:
                continue
            if target != state:
                arrows.setdefault((state, target), []).append(label)
                if target not in reached:
                    reached[target] = None
                    waiting.append(target)
    if unreached := [machine.state_name(state) for state in machine.states if state not in reached]:
        raise DiagramError(f"{machine.name}: no event leads to {', '.join(unreached)}")
    lines = ["stateDiagram-v2", f"    [*] --> {machine.state_name(machine.start)}"]
    for (state, target), labels in arrows.items():
        lines.append(f"    {machine.state_name(state)} --> {machine.state_name(target)}: {', '.join(labels)}")
    final = [state for state in reached if not any(source == state for source, _ in arrows)]
    lines += [f"    {machine.state_name(state)} --> [*]" for state in final]
    return "\n".join(lines) + "\n"


def render(page: str, machines: Iterable[Machine]) -> str:
    """The page with the diagram of each machine after the line that names it. Raises `DiagramError`."""
    by_name = {machine.name: machine for machine in machines}
    marked = [found["name"] for found in _BLOCK.finditer(page)]
    if sorted(marked) != sorted(by_name):
        odd = sorted({*marked} ^ {*by_name}) or sorted({name for name in marked if marked.count(name) > 1})
        raise DiagramError(f"the page and MACHINES must name the same machines, each once; look at: {', '.join(odd)}")
    return _BLOCK.sub(
        lambda found: f"<!-- states: {found['name']} -->\n```mermaid\n{draw(by_name[found['name']])}```\n", page
    )


def _fact(name: str, states: type[Enum], fact: str) -> Machine:
    """One of the three facts of a worker's state in a router, which events change independently of the others."""

    def step(value: Any, event: worker_state.WorkerEvent) -> Any:
        return getattr(worker_state.transition(worker_state.WorkerState(**{fact: value}), event), fact)

    start = getattr(worker_state.WorkerState(), fact)
    return Machine(name, states, start, step, events_of(worker_state.WorkerEvent))


MACHINES: tuple[Machine, ...] = (
    Machine("HTTP server", ServerState, ServerState.SERVING, by_table(SERVER_TRANSITIONS), events_of(ServerEvent)),
    Machine("gRPC call", CallState, CallState.OPEN, by_table(CALL_TRANSITIONS), events_of(CallEvent)),
    Machine("client connection", ReadState, ReadState.IDLE, by_table(READ_TRANSITIONS), events_of(ReadEvent)),
    Machine("answer", AnswerState, AnswerState.PENDING, by_table(ANSWER_TRANSITIONS), events_of(AnswerEvent)),
    Machine("router", RouterState, RouterState.SERVING, by_table(ROUTER_TRANSITIONS), events_of(RouterEvent)),
    Machine(
        "proxied request", RequestState, RequestState.CHOOSING, by_table(REQUEST_TRANSITIONS), events_of(RequestEvent)
    ),
    Machine(
        "gateway's stream",
        PickerStreamState,
        PickerStreamState.OPEN,
        by_table(STREAM_TRANSITIONS),
        events_of(PickerStreamEvent),
    ),
    Machine(
        "picked request", DispatchState, DispatchState.SENT, by_table(DISPATCH_TRANSITIONS), events_of(DispatchEvent)
    ),
    Machine("stream", StreamState, StreamState.SILENT, stream_transition, events_of(EventKind)),
    Machine(
        "worker connection",
        ConnectionState,
        ConnectionState.IDLE,
        by_table(CONNECTION_TRANSITIONS),
        events_of(ConnectionEvent),
    ),
    Machine(
        "tokenizer",
        TokenizerState,
        TokenizerState.LOADING,
        by_table(TOKENIZER_TRANSITIONS),
        events_of(TokenizerEvent),
    ),
    _fact("worker liveness", worker_state.Liveness, "liveness"),
    _fact("worker intake", worker_state.Intake, "intake"),
    _fact("worker circuit", worker_state.Circuit, "circuit"),
    Machine(
        "ledger entry",
        ledger.EntryState,
        ledger.EntryState.PREFILLING,
        by_table(ledger.ENTRY_TRANSITIONS),
        events_of(ledger.EntryEvent),
    ),
    Machine("view", ViewState, ViewState.NONE, view_transition, events_of(ViewEvent)),
    Machine("waiting request", WaitState, WaitState.WAITING, wait_transition, events_of(WaitEvent)),
    Machine("emulator", EmulatorState, EmulatorState.SERVING, by_table(EMULATOR_TRANSITIONS), events_of(EmulatorEvent)),
    Machine(
        "engine request",
        SequenceState,
        SequenceState.WAITING,
        by_table(SEQUENCE_TRANSITIONS),
        events_of(SequenceEvent),
    ),
    Machine(
        "response", ResponseStatus, ResponseStatus.QUEUED, by_table(RESPONSE_TRANSITIONS), events_of(ResponseEvent)
    ),
    Machine(
        "agent events", FollowState, FollowState.DISCONNECTED, by_table(FOLLOW_TRANSITIONS), events_of(FollowEvent)
    ),
    Machine("agent prompts", Agreement, Agreement.LOADING, by_table(AGREEMENT_TRANSITIONS), events_of(AgreementEvent)),
    Machine("agent replay", ReplayState, ReplayState.IDLE, by_table(REPLAY_TRANSITIONS), events_of(ReplayEvent)),
    Machine(
        "wanted adapter", AdapterState, AdapterState.PENDING, by_table(ADAPTER_TRANSITIONS), events_of(AdapterEvent)
    ),
    Machine("list of workers", ListState, ListState.CURRENT, by_table(LIST_TRANSITIONS), events_of(ListEvent)),
    Machine(
        "API server",
        ApiServerState,
        ApiServerState.ANSWERING,
        by_table(API_SERVER_TRANSITIONS),
        events_of(ApiServerEvent),
    ),
    Machine("queue entry", KeyState, KeyState.IDLE, by_table(KEY_TRANSITIONS), events_of(KeyEvent)),
    Machine("live document", ReaderState, ReaderState.CONNECTING, by_table(READER_TRANSITIONS), events_of(ReaderEvent)),
    Machine(
        "local process", ProcessState, ProcessState.STARTING, by_table(PROCESS_TRANSITIONS), events_of(ProcessEvent)
    ),
    Machine(
        "simulated process",
        SimulatedProcessState,
        SimulatedProcessState.RUNNING,
        simulated_transition,
        events_of(SimulatedProcessEvent),
    ),
    Machine("simulated feed", LinkState, LinkState.SYNCING, link_transition, events_of(LinkEvent)),
    Machine(
        "simulated request",
        SimulatedRequestState,
        SimulatedRequestState.CHOOSING,
        by_table(SIMULATED_REQUEST_TRANSITIONS),
        events_of(SimulatedRequestEvent),
    ),
)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text("utf-8"), MACHINES), "utf-8")
