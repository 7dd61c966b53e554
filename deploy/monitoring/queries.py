"""PromQL that several panels share."""

from __future__ import annotations

from collections.abc import Sequence

from deploy.monitoring.panels import Query, Variable

CHOSEN = 'namespace=~"$namespace", kvcluster=~"$kvcluster"'
"""Matchers of the series of the KVClusters that the reader has chosen."""


def series(name: str, *matchers: str, chosen: str = CHOSEN) -> str:
    """A selector of a metric of the chosen KVClusters."""
    return f"{name}{{{', '.join([*filter(None, [chosen]), *matchers])}}}"


def rate(selector: str, by: str = "") -> str:
    """Events a second, summed over all series, or over those that are equal in the labels `by`."""
    return f"sum{f' by ({by})' if by else ''} (rate({selector}[$__rate_interval]))"


def quantiles(histogram: str, *ranks: float, by: str = "") -> tuple[Query, ...]:
    """Quantiles of a histogram (a selector of its buckets), over everything or for each value of the label `by`."""
    labels = f"{by}, le" if by else "le"
    found = []
    for rank in ranks:
        name = f"p{100 * rank:g}"
        query = f"histogram_quantile({rank:g}, {rate(histogram, labels)})"
        found.append(Query(query, f"{name} {{{{{by}}}}}" if by else name))
    return tuple(found)


def chosen_clusters(metric: str) -> Sequence[Variable]:
    """The variables `namespace` and `kvcluster`, with the values that series of this metric have."""
    within = f'{metric}{{namespace=~"$namespace"}}'
    return (
        Variable("namespace", "Namespace", "Namespaces of KVClusters.", f"label_values({metric}, namespace)"),
        Variable("kvcluster", "KVCluster", "KVClusters of these namespaces.", f"label_values({within}, kvcluster)"),
    )


CLUSTER = "namespace, kvcluster"
"""Labels that name a KVCluster."""


def router(name: str, *matchers: str) -> str:
    """A selector of a metric of the routers."""
    return series(f"kvcluster_router_{name}", *matchers)
