"""The dashboard Controller: what the operator does, and what it says of every KVCluster."""

from __future__ import annotations

from deploy.monitoring.panels import Dashboard, Form, Panel, Query, Row
from deploy.monitoring.queries import CHOSEN, chosen_clusters, quantiles, rate, series


def _controller(name: str, *matchers: str, chosen: str = "") -> str:
    selector = series(f"kvcluster_controller_{name}", *matchers, chosen=chosen)
    return selector.removesuffix("{}")


def _process(name: str) -> str:
    return series(name, 'component="controller"', chosen="")


PROBLEM = (
    _controller("condition", 'condition!~"Progressing|Degraded"', 'status!="True"', chosen=CHOSEN)
    + " or "
    + _controller("condition", 'condition="Degraded"', 'status="True"', chosen=CHOSEN)
)
"""Conditions that are not as they should be."""

_CLUSTERS = Row(
    "KVClusters",
    (
        Panel(
            title="KVClusters",
            shows="KVClusters that the controller manages, in all namespaces, by the status of Ready.",
            act="The table beside it says which are not, and why.",
            unit="none",
            form=Form.STACKED,
            queries=(Query(f"sum by (ready) ({_controller('clusters')})", "Ready: {{ready}}"),),
            alerts=("KVClusterNotReady",),
        ),
        Panel(
            title="Conditions that are not as they should be",
            shows="Conditions of the chosen KVClusters that are not True (Degraded: that is True), with their reasons.",
            act="docs/status.md explains the reasons; kubectl describe kvcluster NAME has the message.",
            unit="none",
            form=Form.TABLE,
            width=16,
            quiet="All conditions are as they should be.",
            queries=(Query(PROBLEM, ""),),
            alerts=("KVClusterNotReady", "KVClusterDegraded"),
        ),
        Panel(
            title="Firing alerts",
            shows="Alerts about the controller that fire now.",
            act="The name leads to its runbook.",
            unit="none",
            form=Form.TABLE,
            width=24,
            quiet="No alert fires, or Prometheus has not loaded the rules (docs/alerts.md).",
            queries=(
                Query(
                    'ALERTS{alertname=~"KVCluster(Controller|Reconcile|NotReady|Degraded).*", alertstate="firing"}', ""
                ),
            ),
        ),
    ),
)

_WORK = Row(
    "Reconciles",
    (
        Panel(
            title="Reconciles by outcome",
            shows="Reconciles of KVClusters a second: done; retry: the API server refused something or could not be "
            "reached; error: a defect of the controller.",
            act="A retry now and then is normal. The log has a line reconcile_retry with the cause for each.",
            unit="ops",
            form=Form.STACKED,
            queries=(Query(rate(_controller("reconciles_total"), "outcome"), "{{outcome}}"),),
            alerts=("KVClusterReconcileFailing",),
        ),
        Panel(
            title="Time of a reconcile",
            shows="Duration of one reconcile, including its writes and what it asks of the routers.",
            act="Long with few writes: a router does not answer, or the API server is slow.",
            unit="s",
            queries=quantiles(_controller("reconcile_seconds_bucket"), 0.5, 0.95, 0.99),
        ),
        Panel(
            title="Waiting KVClusters",
            shows="KVClusters that wait for their next reconcile. Each with pods is reconciled every 10 s.",
            act="",
            unit="none",
            queries=(Query(f"sum({_controller('queue_length')})", "waiting"),),
        ),
        Panel(
            title="Writes to the API server",
            shows="Writes a second, by verb and kind of object. None while nothing changes, but for the status.",
            act="Writes that do not end mean that someone else writes the same objects: see Drift repaired.",
            unit="ops",
            queries=(Query(rate(_controller("writes_total", 'outcome="done"'), "verb, kind"), "{{verb}} {{kind}}"),),
        ),
        Panel(
            title="Failed writes",
            shows="Writes a second that the API server did not take, by kind of object and cause.",
            act="forbidden: the controller's role. status: the object is invalid, or an admission webhook refuses it.",
            unit="ops",
            quiet="The API server took every write.",
            queries=(
                Query(rate(_controller("writes_total", 'outcome!="done"'), "kind, outcome"), "{{kind}}: {{outcome}}"),
            ),
            alerts=("KVClusterReconcileFailing",),
        ),
        Panel(
            title="Drift repaired",
            shows="Objects a second that someone else had changed or deleted, and that the controller brought back, by "
            "kind.",
            act="If it goes on, two controllers or a person fight over an object: kubectl get -o yaml "
            "--show-managed-fields names who.",
            unit="ops",
            quiet="Nobody has changed an object of the controller's.",
            queries=(Query(rate(_controller("drift_repairs_total"), "kind"), "{{kind}}"),),
        ),
    ),
)

_API = Row(
    "API server",
    (
        Panel(
            title="Age of the watches",
            shows="Time since each watch last showed that it is alive. The API server sends a bookmark about once a "
            "minute.",
            act="Above 3 minutes the controller misses changes of this kind until the next full list, each 10 minutes.",
            unit="s",
            bounds=(120, 180),
            queries=(Query(f"max by (resource) ({_controller('watch_age_seconds')})", "{{resource}}"),),
            alerts=("KVClusterControllerWatchDead",),
        ),
        Panel(
            title="Failed requests by cause",
            shows="Requests a second, of the controller and of kopf, that the API server did not answer with success.",
            act="connect: it cannot be reached. unauthorized, forbidden: ServiceAccount and roles. throttled: it is "
            "busy.",
            unit="ops",
            quiet="The API server answered every request.",
            queries=(Query(rate(_controller("api_failures_total"), "operation, cause"), "{{operation}}: {{cause}}"),),
        ),
        Panel(
            title="Changes that no watch reported",
            shows="KVClusters a second for which only a full list showed a change.",
            act="Lasting values mean that watches lose events: something between controller and API server.",
            unit="ops",
            queries=(Query(rate(_controller("healed_total")), "found by a list"),),
        ),
    ),
)

_PROCESS = Row(
    "Process",
    (
        Panel(
            title="Memory of the controller",
            shows="Resident memory.",
            act="It grows with KVClusters and pods; the limit is resources.limits.memory of the chart.",
            unit="bytes",
            queries=(Query(f"max({_process('process_resident_memory_bytes')})", "memory"),),
        ),
        Panel(
            title="CPU of the controller",
            shows="Cores in use.",
            act="",
            unit="none",
            queries=(Query(rate(_process("process_cpu_seconds_total")), "cores"),),
        ),
        Panel(
            title="Uptime of the controller",
            shows="Time since the controller's process started.",
            act="If it falls again and again, the pod restarts: kubectl describe pod says why.",
            unit="s",
            queries=(Query(f"time() - max({_process('process_start_time_seconds')})", "uptime"),),
            alerts=("KVClusterControllerDown",),
        ),
    ),
)

DASHBOARD = Dashboard(
    uid="kvcluster-controller",
    title="KVCluster / Controller",
    description="What the controller does, how the API server answers it, and the conditions of every KVCluster.",
    variables=tuple(chosen_clusters("kvcluster_controller_condition")),
    rows=(_CLUSTERS, _WORK, _API, _PROCESS),
)
