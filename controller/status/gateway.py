"""What the gateways say of a cluster's InferencePool: the condition GatewayAccepted."""

from __future__ import annotations

from controller.status import raw
from controller.status.observed import Observed
from controller.status.pod_problems import as_sentence
from controller.status.raw import Raw
from controller.status.reasons import ConditionReason, Finding

_TYPES = ("Accepted", "ResolvedRefs")


def acceptance(observed: Observed) -> Finding | None:
    """Why GatewayAccepted is as it is; None where the spec asks for no pool. Of several gateways the first that says no
    counts, in its own words."""
    if observed.spec is None or not observed.spec.gateway.picks:
        return None
    theirs = observed.spec.gateway.inference_pool_ref
    name = f"{observed.name}-worker" if theirs is None else theirs.name
    for problem in observed.problems:
        if problem.reason is ConditionReason.MISSING_API and problem.object == f"InferencePool/{name}":
            message = f"{problem.message}: install the CRDs of the Gateway API Inference Extension."
            return Finding(ConditionReason.MISSING_API, message[0].upper() + message[1:])
    if observed.pool is None:
        return Finding(ConditionReason.WAITING_FOR_GATEWAY, f"InferencePool {name} does not exist yet.")
    picker, asked = f"{observed.name}-router-picker", raw.text(observed.pool, "spec", "endpointPickerRef", "name")
    if theirs is not None and asked != picker:
        message = f"InferencePool {name} has {asked or 'nothing'} as its endpoint picker: let its owner name {picker}."
        return Finding(ConditionReason.WAITING_FOR_GATEWAY, message)
    parents = raw.objects(observed.pool, "status", "parents")
    refused = [finding for parent in parents if (finding := _refusal(parent)) is not None]
    if refused:
        return refused[0]
    accepted = [_gateway(parent) for parent in parents if _says(parent, "Accepted").get("status") == "True"]
    if not accepted:
        message = f"No gateway has said anything about InferencePool {name}: does an HTTPRoute lead to it?"
        return Finding(ConditionReason.WAITING_FOR_GATEWAY, message)
    return Finding(ConditionReason.GATEWAY_ACCEPTED, f"Accepted by {', '.join(sorted(accepted))}.")


def _refusal(parent: Raw) -> Finding | None:
    for kind in _TYPES:
        condition = _says(parent, kind)
        if condition.get("status") == "False":
            reason = raw.text(condition, "reason") or kind
            said = as_sentence(raw.text(condition, "message") or "it gives no reason")
            return Finding(ConditionReason.GATEWAY_REFUSED, f"{_gateway(parent)} ({reason}): {said}")
    return None


def _says(parent: Raw, kind: str) -> Raw:
    found = [each for each in raw.objects(parent, "conditions") if each.get("type") == kind]
    return found[0] if found else {}


def _gateway(parent: Raw) -> str:
    reference = raw.mapping(parent, "parentRef")
    namespace = raw.text(reference, "namespace")
    place = f"{namespace}/" if namespace else ""
    return f"{raw.text(reference, 'kind') or 'Gateway'} {place}{raw.text(reference, 'name')}"
