"""The rows of the dashboard Fleet that are about what goes wrong, and about the routers themselves."""

from __future__ import annotations

from deploy.monitoring.panels import Form, Panel, Query, Row
from deploy.monitoring.queries import CLUSTER, quantiles, rate, router, series

MEMORY = series("process_resident_memory_bytes", 'component="router"')

ERRORS = Row(
    "Errors",
    (
        Panel(
            title="Requests by status",
            shows="Requests answered a second, by status. 499: the client disconnected first.",
            act="4xx are the clients' errors. For 5xx see the panels beside this one.",
            unit="reqps",
            form=Form.STACKED,
            queries=(Query(rate(router("requests_total"), "code"), "{{code}}"),),
            alerts=("KVClusterRequestsFailing",),
        ),
        Panel(
            title="Retries and resumed streams",
            shows="Requests a second that were sent to another worker after a failure, and streams that went on at "
            "another one, by what went wrong. The client notices only the delay.",
            act="Ejections shows whether it is one worker.",
            unit="ops",
            quiet="No worker failed a request.",
            queries=(
                Query(rate(router("retries_total"), "cause"), "retry: {{cause}}"),
                Query(rate(router("resumed_streams_total"), "cause"), "resumed: {{cause}}"),
            ),
        ),
        Panel(
            title="Failures that reached clients",
            shows="Failed requests a second that were not sent to another worker, by why not, and answers that broke "
            "off after their first byte.",
            act="budget and attempts: too many workers fail. suspect: a request that may be what kills workers.",
            unit="ops",
            quiet="No failure reached a client.",
            queries=(
                Query(rate(router("retries_denied_total"), "why"), "denied: {{why}}"),
                Query(rate(router("broken_streams_total"), "cause"), "broken: {{cause}}"),
            ),
            alerts=("KVClusterRetriesExhausted",),
        ),
        Panel(
            title="Retry budget",
            shows="Failed requests that each router may still send to another worker now.",
            act="At 0 a failure goes to the client: more fails than retries can hide.",
            unit="none",
            bounds=(2, 1),
            queries=(Query(f"min by (pod) ({router('retry_budget')})", "{{pod}}"),),
            alerts=("KVClusterRetriesExhausted",),
        ),
        Panel(
            title="Ejections",
            shows="Workers a second that routers left out for a while because they failed where others did not, by "
            "reason.",
            act="GET /workers on a router's management port says which worker and why.",
            unit="ops",
            quiet="No worker was ejected.",
            queries=(Query(rate(router("ejections_total"), "reason"), "{{reason}}"),),
            alerts=("KVClusterWorkerEjected",),
        ),
        Panel(
            title="Workers by state",
            shows="Workers by state, in the router that sees the most of each.",
            act="Only serving is normal for long. unreachable: the worker is listed, and does not answer.",
            unit="none",
            queries=(
                Query(
                    f"sum by (state) (max by ({CLUSTER}, state) ({router('worker_states')}) > 0)",
                    "{{state}}",
                ),
            ),
            alerts=("KVClusterWorkerUnreachable", "KVClusterWorkerEjected"),
        ),
    ),
)

VIEWS = Row(
    "Views and discovery",
    (
        Panel(
            title="Age of the views, by worker",
            shows="Time since the routers' view of each worker's cache was confirmed, in the router that is furthest "
            "behind.",
            act="One worker: its feed is cut. All of a router: the router is. See Feed problems.",
            unit="s",
            bounds=(5, 30),
            queries=(Query(f"max by (worker) ({router('view_age_seconds')})", "{{worker}}"),),
            alerts=("KVClusterViewStale",),
        ),
        Panel(
            title="Matching",
            shows="Workers that may be chosen: those whose blocks are matched (ready, or history: by what was sent "
            "there), and those that are used by load alone because block size, tokenizer or model differ (unmatched); "
            "and those that may not (not_ready).",
            act="unmatched: GET /workers on a router's management port says what differs.",
            unit="none",
            queries=(Query(f"sum by (state) (max by ({CLUSTER}, state) ({router('workers')}))", "{{state}}"),),
            alerts=("KVClusterWorkerUnmatched",),
        ),
        Panel(
            title="Trust in the views",
            shows="Workers by the trust that routers have in their view of the worker's cache: exact (a copy that its "
            "feed keeps up to date), partial (some of it is known), none (prompts are not matched). A worker counts "
            "once for each trust that any router has.",
            act="GET /workers on a router's management port says why it is not exact.",
            unit="none",
            form=Form.STACKED,
            queries=(
                Query(f"sum by (trust) (max by ({CLUSTER}, worker, trust) ({router('view_trust')}))", "{{trust}}"),
            ),
            alerts=("KVClusterViewStale", "KVClusterWorkerUnmatched"),
        ),
        Panel(
            title="Feed problems",
            shows="Views that could not be continued, feed messages that were refused, and failed connections to a "
            "feed, each a second.",
            act="Gaps now and then are normal when an engine restarts. The reason of a refusal says what differs.",
            unit="ops",
            quiet="No feed had a problem.",
            queries=(
                Query(rate(router("feed_gaps_total"), "reason"), "gap: {{reason}}"),
                Query(rate(router("feed_refusals_total"), "reason"), "refused: {{reason}}"),
                Query(rate(router("feed_connects_total", 'outcome!="connected"'), "outcome"), "connect: {{outcome}}"),
            ),
        ),
        Panel(
            title="Age of the worker list, by router",
            shows="Time since the router's source (the watch of EndpointSlices) last confirmed the list of workers.",
            act="GET /status on the router's management port says why.",
            unit="s",
            bounds=(60, 120),
            queries=(Query(f"max by (pod) ({router('discovery_age_seconds')})", "{{pod}}"),),
            alerts=("KVClusterDiscoveryStale",),
        ),
        Panel(
            title="Credentials that cannot be used",
            shows="Routers that cannot use their file of API keys, or the files of a certificate, as these are now: 1.",
            act="The router's log says why; what was read before stays in force.",
            unit="none",
            quiet="No router has keys or a certificate of its own.",
            queries=(
                Query(f"max by (pod) ({router('api_keys_unusable')})", "keys of {{pod}}"),
                Query(f"max by (pod, port) ({router('tls_certificate_unusable')})", "certificate of {{pod}}, {{port}}"),
            ),
            alerts=("KVClusterCredentialsUnusable",),
        ),
        Panel(
            title="Time left of certificates",
            shows="Time until the certificate that each router serves with ends, or one of its chain.",
            act="Below a week: see the runbook.",
            unit="s",
            quiet="No router has a certificate of its own.",
            queries=(
                Query(
                    f"min by (pod, port) ({router('tls_certificate_expires_timestamp_seconds')}) - time()",
                    "{{pod}}, {{port}}",
                ),
            ),
            alerts=("KVClusterCertificateExpiring",),
        ),
        Panel(
            title="Discovery problems",
            shows="Failed attempts to list or watch EndpointSlices, and repeated lists, each a second.",
            act="Only periodic lists are normal. forbidden: the routers' Role or RoleBinding is missing.",
            unit="ops",
            quiet="Discovery had no problem.",
            queries=(
                Query(rate(router("discovery_failures_total"), "cause"), "failed: {{cause}}"),
                Query(rate(router("discovery_relists_total"), "reason"), "listed again: {{reason}}"),
            ),
            alerts=("KVClusterDiscoveryStale",),
        ),
    ),
)

ROUTERS = Row(
    "Routers",
    (
        Panel(
            title="Time of a decision",
            shows="From the arrival of a request with a prompt to its dispatch to a worker.",
            act="It is part of the time to the first token. Time of a decision, by phase shows which part is long.",
            unit="s",
            queries=quantiles(router("decision_seconds_bucket"), 0.5, 0.95, 0.99),
        ),
        Panel(
            title="Time of a decision, by phase",
            shows="Mean time that a decision spends on reading the body, tokenising it, hashing blocks, looking them "
            "up and choosing.",
            act="tokenize: long prompts, or too little CPU. read: bodies wait for their turn behind long ones.",
            unit="s",
            form=Form.STACKED,
            queries=(
                Query(
                    f"{rate(router('decision_phase_seconds_sum'), 'phase')} / "
                    f"{rate(router('decision_phase_seconds_count'), 'phase')}",
                    "{{phase}}",
                ),
            ),
        ),
        Panel(
            title="Delay of the routers' event loops, p99",
            shows="Delay with which a router's event loop ran a timer; in that time it served nothing else.",
            act="Give routers a whole CPU each, or run more of them.",
            unit="s",
            bounds=(0.05, 0.25),
            queries=quantiles(router("loop_lag_seconds_bucket"), 0.99, by="pod"),
        ),
        Panel(
            title="CPU of the routers",
            shows="Cores that each router uses. A router is one process and uses about one core at most.",
            act="Above 0.8 for long: run more routers.",
            unit="none",
            bounds=(0.8, 0.95),
            queries=(Query(rate(series("process_cpu_seconds_total", 'component="router"'), "pod"), "{{pod}}"),),
        ),
        Panel(
            title="Memory of the routers",
            shows="Resident memory of each router.",
            act="A router that reaches its limit (spec.router.resources) is killed, and restarts with an empty view.",
            unit="bytes",
            queries=(Query(f"max by (pod) ({MEMORY})", "{{pod}}"),),
            alerts=("KVClusterRouterDown",),
        ),
        Panel(
            title="Memory of the index",
            shows="Memory that each router's index of the workers' blocks takes.",
            act="It grows with the blocks of all workers, and ends when their caches are full.",
            unit="bytes",
            queries=(Query(f"max by (pod) ({router('index_bytes')})", "{{pod}}"),),
        ),
        Panel(
            title="Sessions",
            shows="Sessions that each router remembers, to keep them at their worker.",
            act="",
            unit="none",
            queries=(Query(f"max by (pod) ({router('sessions')})", "{{pod}}"),),
        ),
    ),
)
