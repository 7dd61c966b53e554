"""The part of the manifest about engines that somebody else runs: which pods they are, and what has no meaning then."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import Field, model_validator
from pydantic.alias_generators import to_camel

from controller.api.common import SpecModel, first_repeated, rule_broken

if TYPE_CHECKING:
    from controller.api.model import KVClusterSpec

LABEL_KEY: Final = r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{,61}[A-Za-z0-9])?"
LABEL_VALUE: Final = r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$"
MAX_PORTS = 8
"""As many as an InferencePool has."""

_CHAT_ARGUMENTS = (
    "--chat-template",
    "--chat-template-content-format",
    "--default-chat-template-kwargs",
    "--anthropic-disabled-thinking-effort",
    "--exclude-tools-when-tool-choice-none",
    "--trust-request-chat-template",
)
"""Flags in `engine.args` that routers have to know to read requests as the engines do."""
CHAT_ARGUMENT: Final = f"^({'|'.join(_CHAT_ARGUMENTS)})(=|$)"

NO_LABELS = "selects no pod: give at least one label that the pods of the engines have"
NO_PODS = (
    "engine type external needs the pods of the engines: give their labels and ports, or name their pool in "
    "spec.gateway.inferencePoolRef"
)
TWO_SOURCES = "the pool says which pods there are: remove this, or spec.engine.external"
FOREIGN_ONLY = "means something to engine type external alone: remove it, or set spec.engine.type to external"
NO_MODEL = "engine type external needs the name of the model that the engines serve, whose tokenizer routers load"
SERVES_A_POOL = (
    "routers whose workers are those of a pool have no others: remove it, or give spec.engine.external instead"
)
NOT_OURS = "engine type external runs no engines, whoever runs them decides this: remove it"
NOT_OUR_ARGUMENTS = (
    "engine type external runs no engines: only what changes how they render chats counts here, as --chat-template=FILE"
)

ENGINE_FIELDS = (
    *("image", "image_pull_policy", "speed", "generator", "seed", "mean_output_tokens", "data_parallel", "cpu_cache"),
    *("max_loras", "env"),
)
"""Fields of `engine` that mean nothing to engine type external."""
WORKER_FIELDS = (
    *("replicas", "resources", "node_selector", "tolerations", "affinity", "topology_spread_constraints"),
    *("priority_class_name", "pod_metadata", "volumes", "volume_mounts", "runtime_class_name", "security_context"),
)
"""Those of `workers`: all but `drainSeconds`, which is how long routers wait for answers too."""


class PodSelector(SpecModel):
    """Labels of pods, as an InferencePool's selector has them."""

    match_labels: dict[str, Annotated[str, Field(max_length=63, pattern=LABEL_VALUE)]]
    """Labels that a pod must have, all of them, in the KVCluster's namespace. At least one."""

    @model_validator(mode="after")
    def _selects_by_labels(self) -> PodSelector:
        if not self.match_labels:
            raise rule_broken("matchLabels", NO_LABELS)
        for key in self.match_labels:
            if re.fullmatch(LABEL_KEY, key) is None:
                raise rule_broken(f"matchLabels.{key}", "is no label's key: a name, or prefix/name")
        return self


class External(SpecModel):
    """Pods of engines that somebody else runs: they get requests, and are never changed. See
    `docs/external-engines.md`."""

    selector: PodSelector
    """Which pods they are."""
    ports: Annotated[list[Annotated[int, Field(ge=1, le=65_535)]], Field(min_length=1, max_length=MAX_PORTS)]
    """Ports of the engines' OpenAI API. Each is a worker of its own in each pod."""
    feed_port: Annotated[int, Field(ge=1, le=65_535)] | None = None
    """Port of the agent that the pods have beside the engine at the first port (`docs/vllm.md`). Default: none, and
    routers match prompts against what they have sent to each pod."""

    @model_validator(mode="after")
    def _ports_differ(self) -> External:
        if (index := first_repeated(map(str, self.ports))) is not None:
            raise rule_broken(f"ports[{index}]", "is given twice: remove one of the two")
        if self.feed_port in self.ports:
            raise rule_broken("feedPort", "is a port of the engines: give that of the agent, or none")
        return self


def check_external(spec: KVClusterSpec) -> None:
    """Raises a broken rule for the first field that does not suit whose pods the engines run in."""
    for path, message in _problems(spec):
        raise rule_broken(path, message)


def _problems(spec: KVClusterSpec) -> Iterator[tuple[str, str]]:
    pool = spec.gateway.inference_pool_ref
    if not spec.is_external:
        if spec.engine.external is not None:
            yield "engine.external", FOREIGN_ONLY
        if pool is not None:
            yield "gateway.inferencePoolRef", FOREIGN_ONLY
        return
    if spec.engine.external is None and pool is None:
        yield "engine.external", NO_PODS
    if spec.engine.external is not None and pool is not None:
        yield "gateway.inferencePoolRef", TWO_SOURCES
    if pool is not None and spec.router.serves:
        yield "router.serves", SERVES_A_POOL
    if spec.model.name is None:
        yield "model.name", NO_MODEL
    for part, names in (("engine", ENGINE_FIELDS), ("workers", WORKER_FIELDS), ("model", ("adapters",))):
        model = getattr(spec, part)
        for name in names:
            if getattr(model, name) != type(model).model_fields[name].get_default(call_default_factory=True):
                yield f"{part}.{to_camel(name)}", NOT_OURS
    for index, argument in enumerate(spec.engine.args):
        if re.match(CHAT_ARGUMENT, argument) is None:
            yield f"engine.args[{index}]", NOT_OUR_ARGUMENTS
    if spec.autoscaling is not None:
        yield "autoscaling", NOT_OURS
