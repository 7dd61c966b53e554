"""Workers that somebody else runs: what the routers tell of them, for the controller does not watch their pods."""

from __future__ import annotations

from controller.status.observed import Observed, best_report
from controller.status.pod_problems import as_sentence
from controller.status.reasons import ConditionReason, Finding


def unavailability(observed: Observed) -> Finding | None:
    """Why no worker is ready; None if one is."""
    best = best_report(observed)
    if best is None:
        if observed.routers.errors:
            name, error = min(observed.routers.errors.items())
            message = f"Router {name}, which would know, could not be asked: {as_sentence(error)}"
            return Finding(ConditionReason.ROUTER_UNREACHABLE, message)
        return Finding(ConditionReason.NO_ROUTER, "No router runs yet that could say which pods there are.")
    if best.workers_ready:
        return None
    if best.workers_known:
        found = "The only worker" if best.workers_known == 1 else f"All {best.workers_known} workers"
        message = (
            f"{found} that {_source(observed)} names cannot be used: the pods are not ready, have no engine at that "
            "port, or a NetworkPolicy keeps the routers out. GET /workers of a router says which."
        )
        return Finding(ConditionReason.NOT_REACHABLE, message)
    if best.discovery.error:
        return Finding(ConditionReason.NO_POD_MATCHES, f"No pod is known: {as_sentence(best.discovery.error)}")
    message = f"No pod of namespace {observed.namespace} is named by {_source(observed)}."
    return Finding(ConditionReason.NO_POD_MATCHES, message)


def _source(observed: Observed) -> str:
    """What says which pods they are, in words."""
    spec = observed.spec
    if spec is not None and spec.gateway.inference_pool_ref is not None:
        return f"InferencePool {spec.gateway.inference_pool_ref.name}"
    if spec is not None and (pods := spec.engine.external) is not None:
        labels = ",".join(f"{key}={value}" for key, value in sorted(pods.selector.match_labels.items()))
        ports = ", ".join(map(str, pods.ports))
        return f"spec.engine.external ({labels}; port {ports})"
    return "spec.engine.external"
