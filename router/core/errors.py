"""The reasons for which the fleet refuses a message of the cache feed."""

from __future__ import annotations

from enum import StrEnum


class RejectReason(StrEnum):
    """Why a feed message was not applied, for metrics, logs and the body of the answer."""

    BLOCK_SIZE = "block_size"
    """The worker's blocks are no multiple of the router's, so its keys are not at the depths that are looked up."""
    ATTENTION = "attention"
    """Some of the model's layers attend in a way whose reuse of prefixes is not modelled."""
    FINGERPRINT = "fingerprint"
    """The worker's tokenizer differs: the same text gives other token ids, so no key would ever match."""
    NO_TOKENIZER = "no_tokenizer"
    """The router's own tokenizer is not loaded, so it cannot match prompts."""
    KEY_SCHEME = "key_scheme"
    """The worker computes keys by another function."""
    MODEL = "model"
    """The worker serves another model than the fleet."""
    AGENT = "agent"
    """The URL is that of a cache agent, which takes no requests: list the engine, and the agent as its feed."""
    UNKNOWN_WORKER = "unknown_worker"
    """No worker with this URL or id is known: add it to discovery, or send a heartbeat first."""
    STALE_EPOCH = "stale_epoch"
    """The message comes from an earlier incarnation of the worker."""
    DUPLICATE_WORKER = "duplicate_worker"
    """Another URL has this worker id, with a later epoch or the same one."""
    GAP = "gap"
    """Batches are missing between the view and this message: a new snapshot is needed."""
    MALFORMED = "malformed"
    """The message decodes but makes no sense."""


class Resync(StrEnum):
    """Why a view could not be continued, so that a new snapshot was taken. Label `reason` of
    `kvcluster_router_feed_gaps_total`."""

    MISSING = "missing"
    """Batches are missing between the view and the next one."""
    RESTARTED = "restarted"
    """The worker, or its agent, began a new epoch."""
    STALE_EPOCH = "stale_epoch"
    """A message came from an earlier incarnation of the worker."""
    RESET = "reset"
    """The worker asked for it: it no longer has the batches that follow the view."""


class FeedRejected(ValueError):
    """A feed message was not applied. The view of the worker is unchanged, unless a subclass says otherwise."""

    def __init__(self, reason: RejectReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Mismatch(FeedRejected):
    """The worker's blocks cannot be matched against this router's prompts.

    If `Fleet.apply_snapshot` raises it, the worker's load and epoch have been taken in nevertheless, and the worker
    gets requests by load.
    """


class AgentListed(FeedRejected):
    """A cache agent is listed as if it were the engine. It gets no requests."""

    def __init__(self, url: str, engine: str) -> None:
        super().__init__(
            RejectReason.AGENT,
            f"{url} is the cache agent of {engine} and takes no requests: list the engine's URL with the agent as its "
            f"feed, as in --workers http://ENGINE:PORT,feed={url}",
        )


class UnknownWorker(FeedRejected):
    """No worker with this URL or worker id is known."""

    def __init__(self, message: str) -> None:
        super().__init__(RejectReason.UNKNOWN_WORKER, message)


class StaleEpoch(FeedRejected):
    """The message comes from an earlier incarnation of the worker than the view."""

    resync = Resync.STALE_EPOCH

    def __init__(self, epoch: int, current: int) -> None:
        super().__init__(
            RejectReason.STALE_EPOCH,
            f"epoch {epoch} is over: the worker has been seen in epoch {current}; send what its current process states",
        )


class DuplicateWorker(FeedRejected):
    """Two URLs claim one worker id, and this one has the smaller epoch (or came second with the same epoch)."""

    def __init__(self, worker_id: str, url: str) -> None:
        super().__init__(
            RejectReason.DUPLICATE_WORKER,
            f"worker id {worker_id!r} belongs to {url}; give every worker an id of its own",
        )


class FeedGap(FeedRejected):
    """The view cannot be updated by this message: the caller takes a new snapshot."""

    def __init__(self, message: str, resync: Resync = Resync.MISSING) -> None:
        super().__init__(RejectReason.GAP, message)
        self.resync = resync
