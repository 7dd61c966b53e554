"""The dashboard Fleet: routers and workers as a whole.

Counters of several routers are added up. A figure that every router reports of the same worker (view, blocks, state) is
never added up: the greatest is shown, or the least where that is the worse one.
"""

from __future__ import annotations

from deploy.monitoring.fleet_operations import ERRORS, ROUTERS, VIEWS
from deploy.monitoring.panels import Dashboard, Form, Panel, Query, Row
from deploy.monitoring.queries import CLUSTER, chosen_clusters, quantiles, rate, router, series

NAMED = "{{namespace}}/{{kvcluster}}"
HITS, PROMPTS = rate(router("actual_cached_tokens_total")), rate(router("reported_prompt_tokens_total"))
REQUESTS, FAILED = rate(router("requests_total")), rate(router("requests_total", 'code=~"5.."'))
IN_FLIGHT = f"sum by ({CLUSTER}, worker) ({router('in_flight')})"
UNREAD = rate(router("prompts_unread_total"), "why")

_GLANCE = Row(
    "At a glance",
    (
        Panel(
            title="Hit rate",
            shows="Share of the prompt tokens that came from a worker's cache, as the workers' answers report it.",
            act="A fall without a change of the traffic means that caches are too small or views are lost: see Cache.",
            unit="percentunit",
            most=1,
            form=Form.STAT,
            width=4,
            queries=(Query(f"{HITS} / {PROMPTS}", "hit rate"),),
            alerts=("KVClusterHitRateCollapsed",),
        ),
        Panel(
            title="TTFT p95",
            shows="Time from the arrival of a streaming request at the router to the first event of its answer that "
            "has content; 95 % of the requests were faster.",
            act="Compare queue and prefill under Time to the first token.",
            unit="s",
            form=Form.STAT,
            width=4,
            bounds=(1, 5),
            queries=quantiles(router("ttft_seconds_bucket"), 0.95),
        ),
        Panel(
            title="Requests",
            shows="Requests answered a second, by all routers.",
            act="",
            unit="reqps",
            form=Form.STAT,
            width=4,
            queries=(Query(REQUESTS, "requests"),),
        ),
        Panel(
            title="Failed requests",
            shows="Share of the requests that were answered with a status of 500 or more.",
            act="Errors shows what went wrong, and at which attempt.",
            unit="percentunit",
            form=Form.STAT,
            width=4,
            bounds=(0.01, 0.05),
            queries=(Query(f"({FAILED} or vector(0)) / {REQUESTS}", "failed"),),
            alerts=("KVClusterRequestsFailing",),
        ),
        Panel(
            title="Workers ready",
            shows="Workers that may be chosen, over the clusters shown. Each cluster counts as its router with the "
            "fewest sees it.",
            act="Compare with the workers wanted: kubectl get kvclusters.",
            unit="none",
            form=Form.STAT,
            width=4,
            bounds=(1, 0.5),
            queries=(
                Query(
                    f"sum(min by ({CLUSTER}) (sum by ({CLUSTER}, pod) ("
                    + router("workers", 'state=~"ready|history|unmatched"')
                    + ")))",
                    "ready",
                ),
            ),
            alerts=("KVClusterWorkerUnreachable", "KVClusterNotReady"),
        ),
        Panel(
            title="Oldest view",
            shows="The longest time since a worker's cache view was confirmed. A feed that is up confirms it each "
            "second.",
            act="Views and discovery shows which worker's.",
            unit="s",
            form=Form.STAT,
            width=4,
            bounds=(5, 30),
            queries=(Query(f"max({router('view_age_seconds')})", "oldest view"),),
            alerts=("KVClusterViewStale",),
        ),
        Panel(
            title="Firing alerts",
            shows="Alerts about these KVClusters that fire now.",
            act="The name leads to its runbook.",
            unit="none",
            form=Form.TABLE,
            width=24,
            quiet="No alert fires, or Prometheus has not loaded the rules (docs/alerts.md).",
            queries=(Query(series("ALERTS", 'alertname=~"KVCluster.+"', 'alertstate="firing"'), ""),),
        ),
    ),
)

_CACHE = Row(
    "Cache",
    (
        Panel(
            title="Hit rate: predicted and actual",
            shows="Share of the prompt tokens that were cached: as the router predicted when it chose the worker, as "
            "the workers' answers report, and as the engines count over all their requests, slower tiers included.",
            act="Where predicted and actual part, look at Mispredicted tokens.",
            unit="percentunit",
            most=1,
            queries=(
                Query(f"{HITS} / {PROMPTS}", "actual"),
                Query(f"{rate(router('predicted_cached_tokens_total'))} / {PROMPTS}", "predicted"),
                Query(
                    f"{rate(series('vllm:prompt_tokens_cached_total'))} / {rate(series('vllm:prompt_tokens_total'))}",
                    "engines",
                ),
            ),
            alerts=("KVClusterHitRateCollapsed",),
        ),
        Panel(
            title="Mispredicted tokens",
            shows="Share of the prompt tokens for which the prediction was wrong: over (predicted, and not cached) and "
            "under (cached, and not predicted). Each answer counts by itself, so the two do not cancel out.",
            act="Over: workers evict faster than their feeds report, or compute other keys. Under: a view is lost.",
            unit="percentunit",
            bounds=(0.1, 0.25),
            quiet="Every prediction was right.",
            queries=(
                Query(
                    f"{rate(router('mispredicted_cached_tokens_total'), 'direction')} / on () group_left () {PROMPTS}",
                    "{{direction}}",
                ),
            ),
            alerts=("KVClusterCachedTokensMispredicted",),
        ),
        Panel(
            title="Hit rate by worker",
            shows="Share of the prompt tokens of each worker's answers that were cached.",
            act="One worker far below the others has lost its cache, or gets the prompts that nobody has seen before.",
            unit="percentunit",
            most=1,
            queries=(
                Query(
                    f"{rate(router('worker_cached_tokens_total'), 'worker')} / "
                    f"{rate(router('worker_prompt_tokens_total'), 'worker')}",
                    "{{worker}}",
                ),
            ),
        ),
        Panel(
            title="Matched blocks",
            shows="Blocks of the prompt that the chosen worker held, as the router saw it.",
            act="A p90 of 0 means that hardly any prompt begins like an earlier one, or that prompts are not read.",
            unit="none",
            queries=quantiles(router("matched_blocks_bucket"), 0.5, 0.9),
        ),
        Panel(
            title="Blocks in the view",
            shows="Blocks that each worker holds, as the routers see them, and the different blocks in a router's "
            "index. Their ratio shows how many copies of a block there are.",
            act="",
            unit="none",
            queries=(
                Query(f"max by (worker) ({router('worker_blocks')})", "{{worker}}"),
                Query(f"max by (pod) ({router('index_blocks')})", "index of {{pod}}"),
            ),
        ),
        Panel(
            title="Prompts that were not read",
            shows="Requests a second that were routed by load alone because their prompt was not read, by reason.",
            act="no_tokenizer: see the runbook. busy: routers have too little CPU. too_long: raise the limit.",
            unit="reqps",
            quiet="Every prompt was read.",
            queries=(Query(UNREAD, "{{why}}"),),
            alerts=("KVClusterTokenizerMissing",),
        ),
    ),
)

_TTFT = Row(
    "Time to the first token",
    (
        Panel(
            title="TTFT, measured",
            shows="From a streaming request's arrival at the router to the first event of its answer that has content.",
            act="If it grows with the queue, workers are too few; if it grows with prefill, fewer prompts are cached.",
            unit="s",
            queries=quantiles(router("ttft_seconds_bucket"), 0.5, 0.95, 0.99),
        ),
        Panel(
            title="TTFT by what was cached",
            shows="Median time of requests whose worker held at least half of the prompt's blocks (hit), fewer "
            "(partial), none (miss), as the router saw it, or whose prompt was not matched (unread).",
            act="If hits are not faster than misses, the queue decides, and not the cache.",
            unit="s",
            queries=quantiles(router("ttft_seconds_bucket"), 0.5, by="cache"),
        ),
        Panel(
            title="TTFT, actual over predicted",
            shows="How long requests took, for each second that the decision predicted. Near 1 while the model of the "
            "engines' speed is right.",
            act="Lasting values above 2 or below 0.5: fit a profile to the engines (kvcluster profile fit).",
            unit="none",
            bounds=(1.5, 2),
            queries=quantiles(router("ttft_actual_to_predicted_ratio_bucket"), 0.1, 0.5, 0.9),
            alerts=("KVClusterTTFTMispredicted",),
        ),
        Panel(
            title="TTFT, distribution",
            shows="Requests a second by their time to first token. There are usually two bands: prompts that were "
            "cached, and prompts that were not.",
            act="",
            unit="reqps",
            form=Form.HEATMAP,
            queries=(Query(rate(router("ttft_seconds_bucket"), "le"), "{{le}}"),),
        ),
        Panel(
            title="Time per output token",
            shows="From the first event with content of a stream to its end, divided by the tokens after the first.",
            act="It grows with the requests that run on a worker at the same time.",
            unit="s",
            queries=quantiles(router("tpot_seconds_bucket"), 0.5, 0.95, 0.99),
        ),
        Panel(
            title="Duration of requests",
            shows="From the arrival of a request with a prompt to the end of its answer.",
            act="",
            unit="s",
            queries=quantiles(router("request_seconds_bucket"), 0.5, 0.95, 0.99),
        ),
    ),
)

_LOAD = Row(
    "Load and skew",
    (
        Panel(
            title="Requests in flight, by worker",
            shows="Requests of all routers that are with each worker.",
            act="",
            unit="none",
            queries=(Query(f"sum by (worker) ({router('in_flight')})", "{{worker}}"),),
        ),
        Panel(
            title="Requests waiting, by worker",
            shows="Requests that wait in each engine to be scheduled, as the engines report it.",
            act="If it grows on every worker, the fleet is too small; on a single one, its cache is worth waiting for, "
            "or it is slow.",
            unit="none",
            queries=(Query(f"max by (worker) ({router('worker_waiting')})", "{{worker}}"),),
            alerts=("KVClusterSaturated",),
        ),
        Panel(
            title="Skew of the load",
            shows="Requests in flight on the busiest worker, divided by the mean of all workers; 1 is even. There is a "
            "gap while no request is in flight.",
            act="A lasting skew means that one prefix is worth more than its worker has room for, or that a worker "
            "hangs.",
            unit="none",
            bounds=(2, 3),
            queries=(Query(f"max by ({CLUSTER}) ({IN_FLIGHT}) / (avg by ({CLUSTER}) ({IN_FLIGHT}) > 0)", NAMED),),
            alerts=("KVClusterLoadSkewed",),
        ),
        Panel(
            title="Requests by worker",
            shows="Requests a second that the routers sent to each worker, further attempts included.",
            act="",
            unit="reqps",
            form=Form.STACKED,
            queries=(Query(rate(router("worker_requests_total"), "worker"), "{{worker}}"),),
        ),
        Panel(
            title="Decisions by reason",
            shows="Decisions a second, by reason; docs/routing.md explains the reasons.",
            act="Many decisions by load alone mean that prompts are not read, or are cached nowhere.",
            unit="ops",
            form=Form.STACKED,
            queries=(Query(rate(router("decisions_total"), "reason"), "{{reason}}"),),
        ),
        Panel(
            title="Prompt tokens",
            shows="Tokens a second of the prompts that were routed.",
            act="",
            unit="none",
            queries=(Query(rate(router("prompt_tokens_total"), CLUSTER), NAMED),),
        ),
    ),
)

DASHBOARD = Dashboard(
    uid="kvcluster-fleet",
    title="KVCluster / Fleet",
    description="Routers and workers as a whole: cache hits, time to the first token, load, errors and the routers' "
    "view of the workers.",
    variables=tuple(chosen_clusters("kvcluster_router_workers")),
    rows=(_GLANCE, _CACHE, _TTFT, _LOAD, ERRORS, VIEWS, ROUTERS),
)
