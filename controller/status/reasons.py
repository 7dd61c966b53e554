"""The conditions of a KVCluster and every reason they give. `docs/status.md` is generated from here.

The controller writes all of them; `source` is where it learns of them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple, Self


class ConditionType(StrEnum):
    """What a condition is about. Every KVCluster that the controller has seen has all of them,
    AdaptersReady only if it lists adapters, GatewayAccepted only if it asks for an InferencePool."""

    when: str
    """What True means."""
    otherwise: str
    """What False and Unknown mean."""

    def __new__(cls, value: str, when: str, otherwise: str) -> Self:
        member = str.__new__(cls, value)
        member._value_ = value
        member.when, member.otherwise = when, otherwise
        return member

    READY = (
        "Ready",
        "A request sent to the endpoint is answered: a router and a worker are ready, or routers hold it until one is. "
        "A rolling update keeps it True.",
        "False: it is not answered; the reason is that of WorkersAvailable or RouterAvailable, whichever is the cause.",
    )
    WORKERS_AVAILABLE = (
        "WorkersAvailable",
        "At least one worker is ready, and at most a quarter of those wanted (or one, if that is more) is missing.",
        "False: fewer are ready, or none is wanted. Unknown: somebody else runs them, and no router can tell.",
    )
    ROUTER_AVAILABLE = (
        "RouterAvailable",
        "The same for the routers.",
        "False: fewer are ready.",
    )
    CACHE_VIEW_FRESH = (
        "CacheViewFresh",
        "Every ready router matches prompts against the caches of all ready workers, as they were in the last 5 s.",
        "False: requests are answered, but some are routed by load alone or a stale view. Unknown: no router can tell.",
    )
    ADAPTERS_READY = (
        "AdaptersReady",
        "Every ready worker has every adapter of spec.model.adapters loaded. Absent where that lists none.",
        "False: a request for one may wait, or fail. Unknown: no router can tell.",
    )
    GATEWAY_ACCEPTED = (
        "GatewayAccepted",
        "A gateway has accepted the InferencePool, and none refuses it. Absent without spec.gateway.inferencePool.",
        "False: a gateway refuses it, in its own words, or its CRD is missing. Unknown: no gateway has said anything.",
    )
    PROGRESSING = (
        "Progressing",
        "What runs is changing towards what the spec asks for.",
        "False: it is what the spec asks for, or cannot become so; then Degraded is True.",
    )
    DEGRADED = (
        "Degraded",
        "Something is wrong that will not pass by itself; the message says what, where, and what to do.",
        "False: nothing is.",
    )


class ConditionReason(StrEnum):
    """Why a condition is as it is."""

    when: str
    """When it is given."""
    source: str
    """Where the controller learns of it."""
    absent: str
    """When it is no longer given."""
    warning: bool
    """Whether the event about it is a warning."""

    def __new__(cls, value: str, when: str, source: str, absent: str, warning: bool = False) -> Self:
        member = str.__new__(cls, value)
        member._value_ = value
        member.when, member.source, member.absent, member.warning = when, source, absent, warning
        return member

    # --- how many pods are ready ---
    SERVING = (
        "Serving",
        "At least one router and one worker are ready, or, where there is no other, terminate and still serve.",
        "Deployment status",
        "The last router or the last worker no longer serves.",
    )
    HOLDING = (
        "Holding",
        "No worker is ready, as spec.autoscaling.min: 0 allows: routers hold requests until one has started.",
        "Deployment status, spec.autoscaling",
        "A worker is ready, cannot start, or no router is ready.",
    )
    ALL_READY = (
        "AllReady",
        "As many pods are ready as are wanted.",
        "Deployment status",
        "A pod is no longer ready, or more are wanted.",
    )
    SOME_READY = (
        "SomeReady",
        "Not all that are wanted are ready, but enough: at most a quarter (or one, if that is more) is missing.",
        "Deployment status",
        "All are ready again, or too few.",
    )
    TOO_FEW_READY = (
        "TooFewReady",
        "Some are ready, but more than a quarter is missing, and no pod gives a cause.",
        "Deployment status",
        "Enough are ready, none is, or a pod gives a cause.",
    )
    NONE_READY = (
        "NoneReady",
        "None is ready, and no pod gives a lasting cause: it is starting, or its probe fails.",
        "Deployment status, pods",
        "One is ready, or a pod gives a cause.",
    )
    SCALED_TO_ZERO = (
        "ScaledToZero",
        "No pod is wanted. Requests are not answered. Nothing is wrong, so Degraded stays False.",
        "spec.workers.replicas, or the Deployment's replicas while an autoscaler owns them",
        "One is wanted.",
    )
    NOT_CREATED = (
        "NotCreated",
        "The Deployment does not exist.",
        "API server",
        "The Deployment exists.",
    )
    NO_POD_MATCHES = (
        "NoPodMatches",
        "Somebody else runs the workers, and no pod has the labels of spec.engine.external, or of the InferencePool.",
        "routers' /status",
        "A pod has them.",
        True,
    )
    NOT_REACHABLE = (
        "NotReachable",
        "Somebody else runs the workers: there are pods with the labels, and no router gets an answer from any.",
        "routers' /status",
        "One answers.",
        True,
    )
    WAITING_FOR_WORKERS = (
        "WaitingForWorkers",
        "Routers run, and are not ready because no worker is.",
        "Deployment status, router pods",
        "A router or a worker is ready.",
    )

    # --- LoRA adapters ---
    ADAPTERS_LOADED = (
        "AdaptersLoaded",
        "Every ready worker has every listed adapter loaded.",
        "routers' /status, from the workers' feeds",
        "A worker is new or has restarted, or the list has changed.",
    )
    ADAPTERS_LOADING = (
        "AdaptersLoading",
        "A ready worker has not loaded a listed adapter yet. The list reaches running workers within about a minute.",
        "routers' /status, from the workers' feeds",
        "All are loaded, or an engine refuses one.",
    )
    ADAPTER_REFUSED = (
        "AdapterRefused",
        "An engine does not load a listed adapter; the message has its words. It is tried again at least each minute.",
        "routers' /status, from the workers' feeds",
        "It is loaded, or is no longer listed.",
        True,
    )

    # --- gateways ---
    GATEWAY_ACCEPTED = (
        "GatewayAccepted",
        "Every gateway that says anything about the InferencePool has accepted it.",
        "InferencePool's status.parents",
        "A gateway refuses it, or none says anything any more.",
    )
    GATEWAY_REFUSED = (
        "GatewayRefused",
        "A gateway does not accept the InferencePool, or cannot resolve its picker; the message has its words.",
        "InferencePool's status.parents",
        "It accepts the pool, or no route leads to the pool there any more.",
        True,
    )
    WAITING_FOR_GATEWAY = (
        "WaitingForGateway",
        "Unknown: no gateway has said anything about the InferencePool. That takes an HTTPRoute that leads to it.",
        "InferencePool's status.parents",
        "A gateway accepts or refuses it.",
    )

    # --- why a pod does not run ---
    IMAGE_PULL_FAILED = (
        "ImagePullFailed",
        "The image of a container cannot be pulled (ErrImagePull, ImagePullBackOff, InvalidImageName, ...).",
        "kubelet, in the container's state",
        "The container has started, or the pod is gone.",
        True,
    )
    CANNOT_START = (
        "CannotStart",
        "A container cannot be created or started: a missing ConfigMap or Secret, a command that does not exist.",
        "kubelet, in the container's state",
        "The container has started, or the pod is gone.",
        True,
    )
    CRASH_LOOPING = (
        "CrashLooping",
        "A container ended and was started again, at least twice in a row, or waits in CrashLoopBackOff.",
        "kubelet, in the container's state",
        "The pod has been ready for 60 s, nothing has ended for 10 minutes, or the pod is gone.",
        True,
    )
    UNSCHEDULABLE = (
        "Unschedulable",
        "No node takes a pod.",
        "scheduler, in the pod's condition PodScheduled",
        "The pod has a node, or is gone.",
        True,
    )
    QUOTA_EXCEEDED = (
        "QuotaExceeded",
        "A quota of the namespace refuses a pod.",
        "Deployment's condition ReplicaFailure",
        "The Deployment can create its pods.",
        True,
    )
    CREATE_REFUSED = (
        "CreateRefused",
        "The API server refuses a pod for another reason: Pod Security, a LimitRange, an admission webhook.",
        "Deployment's condition ReplicaFailure",
        "The Deployment can create its pods.",
        True,
    )

    # --- what the routers know of the workers' caches ---
    FRESH = (
        "Fresh",
        "Every ready router matches all ready workers, and no view is older than 5 s.",
        "routers' /status",
        "One of these no longer holds.",
    )
    OWN_HISTORY = (
        "OwnHistory",
        "Unknown: workers that somebody else runs tell nothing of their caches. Routers match prompts against what "
        "they have sent to each.",
        "routers' /status",
        "Each has an agent, or none is ready.",
    )
    STALE = (
        "Stale",
        "A router's view of a worker is older than 5 s: the worker's feed brings nothing, or is cut.",
        "routers' /status",
        "All views are younger than 5 s.",
        True,
    )
    NO_TOKENIZER = (
        "NoTokenizer",
        "A router has no tokenizer: it cannot be loaded (the message says why), or is still being loaded. It routes by "
        "load and keeps trying.",
        "routers' /status",
        "It is loaded.",
        True,
    )
    MISMATCH = (
        "Mismatch",
        "A router does not match prompts against a worker that has been ready for 5 s: it has another model, "
        "tokenizer or key scheme, a block size that is no multiple of the router's, layers whose reuse of prefixes is "
        "not modelled, or no cache feed at all.",
        "routers' /status",
        "All are matched.",
        True,
    )
    WORKERS_MISSING = (
        "WorkersMissing",
        "A router has fewer workers to choose from than have been ready for 5 s.",
        "routers' /status",
        "It has all of them.",
        True,
    )
    DISCOVERY_STALE = (
        "DiscoveryStale",
        "A router no longer learns which workers exist; it serves with its last list.",
        "routers' /status",
        "Its watch works again.",
        True,
    )
    NO_ROUTER = (
        "NoRouter",
        "Unknown: no router is ready.",
        "router pods",
        "One is.",
    )
    NO_WORKERS = (
        "NoWorkers",
        "Unknown: no worker is ready, so there is nothing to view.",
        "worker pods",
        "One is.",
    )
    ROUTER_UNREACHABLE = (
        "RouterUnreachable",
        "Unknown: the controller could not ask a ready router, or did not understand its answer.",
        "the controller's request to the router's management port",
        "The router answers.",
        True,
    )

    # --- progress towards the spec ---
    CREATING = (
        "Creating",
        "A Deployment does not exist yet.",
        "API server",
        "Both exist.",
    )
    ROLLING_OUT = (
        "RollingOut",
        "Pods are being replaced by pods of the current spec.",
        "Deployment status",
        "All pods are of the current spec.",
    )
    SCALING = (
        "Scaling",
        "There are more or fewer pods than wanted.",
        "Deployment status",
        "There are as many as wanted.",
    )
    STARTING = (
        "Starting",
        "All pods exist, and some are not ready yet.",
        "Deployment status",
        "All are ready.",
    )
    COMPLETE = (
        "Complete",
        "What runs is what the spec asks for, and is ready.",
        "Deployment status",
        "The spec or a pod changes.",
    )
    BLOCKED = (
        "Blocked",
        "The spec is not applied as a whole: see Degraded.",
        "the controller",
        "The problem is solved.",
    )
    STALLED = (
        "Stalled",
        "A Deployment made no progress within its deadline (10 minutes).",
        "Deployment's condition Progressing",
        "It makes progress.",
        True,
    )

    # --- what is wrong ---
    AS_EXPECTED = (
        "AsExpected",
        "Nothing is wrong.",
        "the controller",
        "Something is.",
    )
    INVALID_SPEC = (
        "InvalidSpec",
        "The spec breaks a rule that the CRD's schema cannot hold. What runs is left as it is.",
        "the controller, which checks the spec",
        "The spec is valid.",
        True,
    )
    NAME_CONFLICT = (
        "NameConflict",
        "An object with a name that the cluster needs belongs to someone else. It is left alone.",
        "the controller, which checks before it applies",
        "The object is gone, or the KVCluster is called something else.",
        True,
    )
    APPLY_FAILED = (
        "ApplyFailed",
        "The API server refuses an object: a quota, missing rights, an admission webhook.",
        "API server, in its answer",
        "It is accepted.",
        True,
    )
    MISSING_API = (
        "MissingApi",
        "The spec asks for a kind of object that this cluster does not know (KEDA's ScaledObject, PodMonitor, "
        "InferencePool).",
        "API server's discovery",
        "The CRD is installed, or the spec no longer asks for it.",
        True,
    )
    AUTOSCALER_FAILING = (
        "AutoscalerFailing",
        "The autoscaler has not been able to do its work for two minutes: no metric, say.",
        "conditions of the HorizontalPodAutoscaler or ScaledObject",
        "It works, or the spec no longer asks for one.",
        True,
    )


_POD_PROBLEMS = (
    ConditionReason.QUOTA_EXCEEDED,
    ConditionReason.CREATE_REFUSED,
    ConditionReason.IMAGE_PULL_FAILED,
    ConditionReason.CANNOT_START,
    ConditionReason.CRASH_LOOPING,
    ConditionReason.UNSCHEDULABLE,
)
"""What keeps pods from running, the gravest first."""

_UNAVAILABLE = (
    ConditionReason.NONE_READY,
    ConditionReason.SCALED_TO_ZERO,
    ConditionReason.NOT_CREATED,
    ConditionReason.NO_POD_MATCHES,
    ConditionReason.NOT_REACHABLE,
    *_POD_PROBLEMS,
)
"""Why no pod, or too few pods, of a component are ready."""

RECONCILE_PROBLEMS = (
    ConditionReason.INVALID_SPEC,
    ConditionReason.NAME_CONFLICT,
    ConditionReason.APPLY_FAILED,
    ConditionReason.MISSING_API,
)
"""What keeps the controller from bringing about the spec, the gravest first."""

GIVEN_BY: dict[ConditionType, dict[str, tuple[ConditionReason, ...]]] = {
    ConditionType.READY: {
        "True": (ConditionReason.SERVING, ConditionReason.HOLDING),
        "False": (ConditionReason.WAITING_FOR_WORKERS, *_UNAVAILABLE),
    },
    ConditionType.WORKERS_AVAILABLE: {
        "True": (ConditionReason.ALL_READY, ConditionReason.SOME_READY),
        "False": (ConditionReason.TOO_FEW_READY, *_UNAVAILABLE),
        "Unknown": (ConditionReason.NO_ROUTER, ConditionReason.ROUTER_UNREACHABLE),
    },
    ConditionType.ROUTER_AVAILABLE: {
        "True": (ConditionReason.ALL_READY, ConditionReason.SOME_READY),
        "False": (ConditionReason.TOO_FEW_READY, ConditionReason.WAITING_FOR_WORKERS, *_UNAVAILABLE),
    },
    ConditionType.CACHE_VIEW_FRESH: {
        "True": (ConditionReason.FRESH,),
        "False": (
            ConditionReason.DISCOVERY_STALE,
            ConditionReason.WORKERS_MISSING,
            ConditionReason.NO_TOKENIZER,
            ConditionReason.MISMATCH,
            ConditionReason.STALE,
        ),
        "Unknown": (
            ConditionReason.OWN_HISTORY,
            ConditionReason.NO_WORKERS,
            ConditionReason.NO_ROUTER,
            ConditionReason.ROUTER_UNREACHABLE,
        ),
    },
    ConditionType.ADAPTERS_READY: {
        "True": (ConditionReason.ADAPTERS_LOADED,),
        "False": (ConditionReason.ADAPTER_REFUSED, ConditionReason.ADAPTERS_LOADING),
        "Unknown": (ConditionReason.NO_WORKERS, ConditionReason.NO_ROUTER, ConditionReason.ROUTER_UNREACHABLE),
    },
    ConditionType.GATEWAY_ACCEPTED: {
        "True": (ConditionReason.GATEWAY_ACCEPTED,),
        "False": (ConditionReason.GATEWAY_REFUSED, ConditionReason.MISSING_API),
        "Unknown": (ConditionReason.WAITING_FOR_GATEWAY,),
    },
    ConditionType.PROGRESSING: {
        "True": (
            ConditionReason.CREATING,
            ConditionReason.ROLLING_OUT,
            ConditionReason.SCALING,
            ConditionReason.STARTING,
        ),
        "False": (ConditionReason.COMPLETE, ConditionReason.BLOCKED, ConditionReason.STALLED),
    },
    ConditionType.DEGRADED: {
        "True": (
            *RECONCILE_PROBLEMS,
            *_POD_PROBLEMS,
            ConditionReason.STALLED,
            ConditionReason.AUTOSCALER_FAILING,
            ConditionReason.ADAPTER_REFUSED,
        ),
        "False": (ConditionReason.AS_EXPECTED,),
    },
}
"""By condition and status: the reasons it gives. Where several hold, Degraded and CacheViewFresh give the first."""

SEVERITY = GIVEN_BY[ConditionType.DEGRADED]["True"]
"""Reasons for being degraded, the gravest first."""


class Finding(NamedTuple):
    """Why a condition is as it is: the reason for programs, the message for people."""

    reason: ConditionReason
    message: str
