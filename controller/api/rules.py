"""Rules across fields as the API server checks them: CEL expressions in the CRD, with the words of the model.

Every rule here is also one of the model's validators, which local mode and the controller check; a test holds the two
together. A rule that CEL cannot express, or not within its cost limits, such as the limits of a profile, is in the
model only. A manifest that breaks such a rule gets the condition Degraded with reason InvalidSpec.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from controller.api.envoy import CUTS, LOGS_BLOCKS, LONGEST_START, RESUMES, SERVES, STARTS_LONG, WAITS
from controller.api.external import (
    FOREIGN_ONLY,
    NO_LABELS,
    NO_MODEL,
    NO_PODS,
    NOT_OURS,
    SERVES_A_POOL,
    TWO_SOURCES,
)
from controller.api.flags import (
    OWNED_FLAGS,
    OWNED_VARIABLES,
    REFUSED_FLAGS,
    REFUSED_VARIABLES,
    RESERVED_FLAGS,
    pattern,
)
from controller.api.model import MAX_NAME_LENGTH, NAME_PATTERN

Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """One CEL rule. `field` names the field to change, relative to where the rule stands."""

    expression: str
    message: str
    field: str | None = None


_ONE_SOURCE = Rule(
    "!has(self.valueFrom) || !has(self.value) || size(self.value) == 0",
    "cannot be used beside value: remove one of the two",
    ".valueFrom",
)


def _unless_external(expression: str) -> str:
    return f"self.engine.type != 'external' || ({expression})"


def _absent(part: str, *names: str) -> str:
    return " && ".join(f"!has({part}.{name})" for name in names)


def _empty(part: str, *names: str) -> str:
    return " && ".join(f"(!has({part}.{name}) || size({part}.{name}) == 0)" for name in names)


_POOL = "has(self.gateway.inferencePoolRef)"
_EXTERNAL = (
    Rule(
        "self.engine.type == 'external' || !has(self.engine.external)",
        FOREIGN_ONLY,
        ".engine.external",
    ),
    Rule(f"self.engine.type == 'external' || !{_POOL}", FOREIGN_ONLY, ".gateway.inferencePoolRef"),
    Rule(_unless_external(f"has(self.engine.external) || {_POOL}"), NO_PODS, ".engine.external"),
    Rule(f"!has(self.engine.external) || !{_POOL}", TWO_SOURCES, ".gateway.inferencePoolRef"),
    Rule(f"!{_POOL} || {_empty('self.router', 'serves')}", SERVES_A_POOL, ".router.serves"),
    Rule(_unless_external("has(self.model.name)"), NO_MODEL, ".model.name"),
    Rule(_unless_external("self.workers.replicas == 1"), NOT_OURS, ".workers.replicas"),
    Rule(_unless_external("!has(self.autoscaling)"), NOT_OURS, ".autoscaling"),
    Rule(_unless_external(_empty("self.model", "adapters")), NOT_OURS, ".model.adapters"),
    Rule(
        _unless_external(
            "self.engine.speed == 1.0 && self.engine.generator == 'sampler' && self.engine.seed == 0 && "
            "self.engine.meanOutputTokens == 128 && self.engine.dataParallel.size == 1 && "
            f"{_absent('self.engine', 'image', 'imagePullPolicy', 'cpuCache', 'maxLoras')} && "
            f"{_empty('self.engine', 'env')}"
        ),
        "image, imagePullPolicy, speed, generator, seed, meanOutputTokens, dataParallel, cpuCache, maxLoras and env: "
        f"{NOT_OURS}",
        ".engine",
    ),
    Rule(
        _unless_external(
            f"{_empty('self.workers', 'tolerations', 'topologySpreadConstraints', 'volumes', 'volumeMounts')} && "
            f"{_absent('self.workers', 'affinity', 'priorityClassName', 'runtimeClassName', 'securityContext')} && "
            f"{_empty('self.workers', 'nodeSelector')} && "
            f"(!has(self.workers.resources) || ({_empty('self.workers.resources', 'requests', 'limits')})) && "
            f"(!has(self.workers.podMetadata) || ({_empty('self.workers.podMetadata', 'labels', 'annotations')}))"
        ),
        "resources, nodeSelector, tolerations, affinity, topologySpreadConstraints, priorityClassName, podMetadata, "
        f"volumes, volumeMounts, runtimeClassName and securityContext: {NOT_OURS}",
        ".workers",
    ),
)

_ROUTES_ITSELF = "self.dataPlane != 'envoy'"
_ENVOY = (
    Rule(f"{_ROUTES_ITSELF} || {_empty('self', 'serves')}", SERVES, ".serves"),
    Rule(f"{_ROUTES_ITSELF} || !self.resumeStreams", RESUMES, ".resumeStreams"),
    Rule(f"{_ROUTES_ITSELF} || !self.accessLog.blocks", LOGS_BLOCKS, ".accessLog.blocks"),
    Rule(f"{_ROUTES_ITSELF} || {_absent('self.retries', 'deadlineSeconds')}", WAITS, ".retries.deadlineSeconds"),
    Rule(f"{_ROUTES_ITSELF} || {_absent('self.liveness', 'cutSeconds')}", CUTS, ".liveness.cutSeconds"),
)

_VARIABLE = (
    _ONE_SOURCE,
    Rule(
        f"!(self.name in {list(OWNED_VARIABLES)})",
        "this variable belongs to KVCluster: remove it",
        ".name",
    ),
    *(Rule(f"self.name != '{name}'", f"{name}: {why}", ".name") for name, why in REFUSED_VARIABLES.items()),
)

RULES: Mapping[Path, tuple[Rule, ...]] = {
    (): (
        Rule(
            f"size(self.metadata.name) <= {MAX_NAME_LENGTH} && self.metadata.name.matches('{NAME_PATTERN}')",
            f"metadata.name: must be a letter, then lower-case letters, digits and hyphens, at most {MAX_NAME_LENGTH} "
            "characters: Services are called after it",
        ),
    ),
    ("spec",): (
        Rule(
            "self.engine.type != 'vllm' || has(self.model.name)",
            "engine type vllm needs a Hugging Face id or a path to load: set spec.model.name",
            ".model.name",
        ),
        Rule(
            "self.engine.type != 'vllm' || (self.engine.speed == 1.0 && self.engine.generator == 'sampler' && "
            "self.engine.seed == 0 && self.engine.meanOutputTokens == 128)",
            "speed, generator, seed and meanOutputTokens mean something to the emulator alone: remove them for engine "
            "type vllm",
            ".engine",
        ),
        Rule(
            "!has(self.model.maxModelLen) || !has(self.cache.blocks) || "
            "self.model.maxModelLen <= self.cache.blocks * self.cache.blockSize",
            "the longest request does not fit the cache: raise spec.cache.blocks or lower spec.model.maxModelLen",
            ".model.maxModelLen",
        ),
        Rule(
            "!has(self.autoscaling) || self.autoscaling.type == 'keda' || !self.router.flowControl.enabled",
            "hpa sees the workers' queues alone, which stay empty with flow control: use type keda",
            ".autoscaling.type",
        ),
        Rule(
            "!has(self.autoscaling) || self.autoscaling.min > 0 || !has(self.router.serves) || "
            "size(self.router.serves) == 0",
            "0 cannot be used beside spec.router.serves: the others' workers would be asked for this model",
            ".autoscaling.min",
        ),
        Rule(
            "self.router.dataPlane != 'envoy' || !has(self.autoscaling) || self.autoscaling.min > 0 || "
            f"!has(self.autoscaling.startSeconds) || self.autoscaling.startSeconds <= {LONGEST_START}",
            STARTS_LONG,
            ".autoscaling.startSeconds",
        ),
        Rule(
            "self.cache.blockSize == oldSelf.cache.blockSize || "
            "(oldSelf.workers.replicas == 0 && !has(oldSelf.autoscaling)) || oldSelf.engine.type == 'external'",
            "cannot be changed while workers run, for workers and routers must agree on it: remove spec.autoscaling, "
            "set spec.workers.replicas to 0, change it, and scale up again",
            ".cache.blockSize",
        ),
        *_EXTERNAL,
    ),
    ("spec", "engine", "external"): (
        Rule(
            "!has(self.feedPort) || !(self.feedPort in self.ports)",
            "is a port of the engines: give that of the agent, or none",
            ".feedPort",
        ),
    ),
    ("spec", "engine", "external", "selector"): (Rule("size(self.matchLabels) > 0", NO_LABELS, ".matchLabels"),),
    ("spec", "network"): (
        Rule(
            "!has(self.ipFamilyPolicy) || self.ipFamilyPolicy != 'SingleStack' || !has(self.ipFamilies) || "
            "size(self.ipFamilies) < 2",
            "SingleStack has one family: remove one of the two, or ask for PreferDualStack",
            ".ipFamilies",
        ),
        Rule(
            "!has(self.ipFamilies) || size(self.ipFamilies) < 2 || self.ipFamilies[0] != self.ipFamilies[1]",
            "is given twice: remove one of the two",
            ".ipFamilies",
        ),
    ),
    ("spec", "gateway"): (
        Rule(
            "!has(self.parentRefs) || size(self.parentRefs) == 0 || self.inferencePool || has(self.inferencePoolRef)",
            "a route needs a pool to lead to: set inferencePool to true",
            ".parentRefs",
        ),
        Rule(
            "!self.inferencePool || !has(self.inferencePoolRef)",
            "cannot be used beside inferencePool: remove one of the two",
            ".inferencePoolRef",
        ),
    ),
    ("spec", "router"): _ENVOY,
    ("spec", "router", "tls"): (
        Rule(
            "!has(self.clientCASecretRef) || has(self.secretRef)",
            "goes with a certificate of the routers' own: set secretRef",
            ".clientCASecretRef",
        ),
    ),
    ("spec", "router", "service"): (
        Rule(
            "!has(self.loadBalancerClass) || self.type == 'LoadBalancer'",
            "means something to a LoadBalancer alone: remove it, or set type to LoadBalancer",
            ".loadBalancerClass",
        ),
    ),
    ("spec", "autoscaling"): (
        Rule("self.min <= self.max", "must not exceed max: lower min or raise max", ".min"),
        Rule("self.min > 0 || self.type == 'keda'", "0 needs type keda: set it, or min to 1", ".min"),
        Rule(
            "self.type != 'keda' || has(self.prometheusAddress)",
            "type keda needs the address of the Prometheus to ask: set prometheusAddress",
            ".prometheusAddress",
        ),
    ),
    ("spec", "engine", "args", "[]"): (
        # In three: an API server counts an expression's length times the text's.
        *(
            Rule(
                f"!self.matches('{pattern(*flags)}')",
                "a field of the spec sets this flag: use spec.model, spec.cache, spec.engine or "
                "spec.workers.drainSeconds",
            )
            for flags in (list(RESERVED_FLAGS)[begin::3] for begin in range(3))
        ),
        Rule(f"!self.matches('{pattern(*OWNED_FLAGS)}')", "this flag belongs to KVCluster: remove it"),
        *(
            Rule(f"!self.matches('{pattern(*flags)}')", f"{', '.join(flags)}: {why}")
            for flags, why in REFUSED_FLAGS.items()
        ),
    ),
    ("spec", "engine", "env", "[]"): _VARIABLE,
    ("spec", "model", "env", "[]"): _VARIABLE,
    ("spec", "router", "env", "[]"): _VARIABLE,
}
"""Where a rule stands in a manifest -> the rules that stand there."""
