"""What a fleet must know before it meets its workers."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvcache.feed import WorkerInfo
from kvcache.keys import KEY_SCHEME
from kvcache.profiles import LatencyModel
from router.core.errors import Mismatch, RejectReason
from router.core.outliers import OutlierPolicy


@dataclass(frozen=True, slots=True)
class FleetConfig:
    """Seconds and tokens throughout."""

    block_size: int
    fingerprint: str
    """Of the router's tokenizer; a worker with another one is refused for matching. Empty: it is not loaded (yet), and
    every worker is refused."""
    latency: LatencyModel
    """Of the profile, at the speed the workers run at."""
    key_scheme: str = KEY_SCHEME
    model: str = ""
    """The model that the fleet serves; empty: any, and workers are filtered by the request's model."""
    strategy: str = "cache_aware"
    liveness_timeout: float = 2.0
    """A worker silent for this long leaves the candidates. Call `Fleet.expire` at least twice as often."""
    view_timeout: float = 10.0
    """A copy of a worker's cache that nothing has confirmed for this long is not matched against: requests go there by
    load until its feed is back. A pushed view is confirmed every 5 s at least, a streamed one each second."""
    speculation_grace: float = 1.0
    """How long after its first byte a request's blocks are still assumed on its worker; by then the feed has
    confirmed them."""
    recompute_charge: float = 3.0
    """Seconds that cost adds for each second of computing blocks again that another worker holds, unless the prefix is
    popular. It is time taken from whoever comes next."""
    retry_after: float = 1.0
    """What a client is told when no worker is ready."""
    outliers: OutlierPolicy = field(default_factory=OutlierPolicy)
    """When workers that fail are left out."""
    longest_pause: float = 30.0
    """A worker that turns requests away (429, 503) is left alone for as long as it asks, but no longer than this."""
    forget_after: float = 60.0
    """A worker known by heartbeats alone is forgotten after this much silence."""
    assigned_half_life: float = 60.0
    """In the tie-break by work assigned lately, work this old counts half."""
    reuse_half_life: float = 600.0
    """In a worker's reuse score, blocks reused this long ago count half."""
    expected_output_tokens: int = 128
    """Assumed length of an answer, until lengths have been observed."""

    def mismatch(self, info: WorkerInfo) -> Mismatch | None:
        """Why this worker's blocks cannot be matched here; None when they can."""
        if not self.fingerprint:
            return Mismatch(RejectReason.NO_TOKENIZER, "the router's tokenizer is not loaded: see /status for why")
        checks = (
            (RejectReason.BLOCK_SIZE, "block size", info.block_size, self.block_size, "start both with the same"),
            (RejectReason.KEY_SCHEME, "key scheme", info.key_scheme, self.key_scheme, "run the same release on both"),
            (
                RejectReason.FINGERPRINT,
                "tokenizer fingerprint",
                info.fingerprint,
                self.fingerprint,
                "give the router the worker's tokenizer and chat template; beside an agent, its log says what differs",
            ),
            (
                RejectReason.MODEL,
                "model",
                info.model,
                self.model or info.model,
                "route another model by another router",
            ),
        )
        for reason, what, theirs, ours, remedy in checks:
            if theirs != ours:
                return Mismatch(
                    reason, f"worker {info.worker_id!r} has {what} {theirs!r}, this router {ours!r}: {remedy}"
                )
        return None
