"""A cluster on a virtual clock: the product's own engine and router core, without processes, sockets or waiting.

Everything that decides is the code that serves real traffic (`worker.emulator.engine.Engine`, `router.core.Fleet`,
`router.core.retries`); only time is not real. A heap holds what happens next: a request arrives at a router, reaches
its worker, an engine's step ends, a batch of the cache feed reaches a router.

*Modelled:* engines of any kind and speed; several routers, each with its own view, delays and retry budget; the feed
with its load reports and keep-alives, snapshots after gaps, and what happens when it is cut; retries, ejections,
liveness and stall time-outs with the routers' defaults; requests that a worker refuses, with the error of a live one;
workers that are killed, frozen, slowed, join and drain; routers that restart.

*Not modelled:* the time of sockets, tokenising and Python, except for constant delays (`cluster.Delays`); full queues
(429, 503), streams that go on at another worker (`--resume-streams`), sessions, stored responses, adapters that are not
loaded everywhere, the start of a pod (a worker joins when it is ready), clients that repeat failed requests.

*Checked against live processes:* the errors of refused requests (`tests/e2e/test_simulated.py`), a replayed recording
(there, too), times and hit rates of three workloads under two loads, a killed and a frozen worker (docs/simulator.md
has the figures). Slow workers, cut feeds, router restarts and scaling are checked by what must hold of them alone.
"""

from bench.simulation.cluster import ClusterShape, Delays, SeededTokens, WorkerGroup, WorkerKind
from bench.simulation.run import Simulation
from bench.simulation.scenario import Scenario, ScenarioError, parse_scenario, read_scenario

__all__ = [
    "ClusterShape",
    "Delays",
    "Scenario",
    "ScenarioError",
    "SeededTokens",
    "Simulation",
    "WorkerGroup",
    "WorkerKind",
    "parse_scenario",
    "read_scenario",
]
