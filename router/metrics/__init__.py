"""The router's metrics. docs/metrics.md describes each; a test holds that document and this package together.

The values of labels are bounded: statuses, enums of causes and reasons, and the workers that exist now. Those are read
from the fleet at each scrape, so that a worker that has been removed leaves no series behind.
"""

from router.metrics.collectors import DiscoveryCollector, FleetCollector, FlowCollector
from router.metrics.declared import OVER, TPOT_BUCKETS, TTFT_BUCKETS, UNDER, Metrics
from router.metrics.instruments import Buckets, by_label, total

__all__ = [
    "OVER",
    "TPOT_BUCKETS",
    "TTFT_BUCKETS",
    "UNDER",
    "Buckets",
    "DiscoveryCollector",
    "FleetCollector",
    "FlowCollector",
    "Metrics",
    "by_label",
    "total",
]
