"""The resources an API server has from the start, and the table of those it serves now."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.kube.apiserver.schema import Definitions, Node

CORE = "io.k8s.api.core.v1."

ALL_VERBS = ("create", "delete", "deletecollection", "get", "list", "patch", "update", "watch")


@dataclass(frozen=True)
class Column:
    """One column of `kubectl get`; `priority` over 0 shows with `-o wide` only."""

    name: str
    path: str
    type: str = "string"
    priority: int = 0
    description: str = ""


@dataclass(frozen=True)
class Scale:
    """Where a resource keeps what its scale subresource shows."""

    spec_path: str = ".spec.replicas"
    status_path: str = ".status.replicas"
    selector_path: str = ""


@dataclass(frozen=True, eq=False)
class Resource:
    """One kind of object and how it is served."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool
    schema: Node
    short_names: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    subresources: tuple[str, ...] = ()
    columns: tuple[Column, ...] = ()
    scale: Scale | None = None
    custom: bool = False
    """Defined by a CustomResourceDefinition."""
    singular: str = ""
    list_kind: str = ""
    verbs: tuple[str, ...] = ALL_VERBS
    selectable: frozenset[str] = frozenset()
    """Fields a custom resource can be selected by."""
    openapi: dict[str, Any] = field(default_factory=dict)
    """The schema as published."""
    definition: str = ""

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def key(self) -> tuple[str, str]:
        """What its objects are stored under."""
        return ("", "events") if self.plural == "events" else (self.group, self.plural)

    @property
    def has_status(self) -> bool:
        return "status" in self.subresources


# group, version, plural, kind, namespaced, short names, categories, subresources, definition
_BUILTINS = """
-|v1|namespaces|Namespace|n|ns||status,finalize|io.k8s.api.core.v1
-|v1|pods|Pod|y|po|all|status,proxy,eviction,log|io.k8s.api.core.v1
-|v1|services|Service|y|svc|all|status|io.k8s.api.core.v1
-|v1|configmaps|ConfigMap|y|cm|||io.k8s.api.core.v1
-|v1|secrets|Secret|y||||io.k8s.api.core.v1
-|v1|serviceaccounts|ServiceAccount|y|sa||token|io.k8s.api.core.v1
-|v1|events|Event|y|ev|||io.k8s.api.core.v1
-|v1|endpoints|Endpoints|y|ep|||io.k8s.api.core.v1
-|v1|nodes|Node|n|no||status|io.k8s.api.core.v1
-|v1|persistentvolumeclaims|PersistentVolumeClaim|y|pvc||status|io.k8s.api.core.v1
-|v1|resourcequotas|ResourceQuota|y|quota||status|io.k8s.api.core.v1
-|v1|limitranges|LimitRange|y|limits|||io.k8s.api.core.v1
-|v1|replicationcontrollers|ReplicationController|y|rc|all|status,scale|io.k8s.api.core.v1
events.k8s.io|v1|events|Event|y|ev|||io.k8s.api.events.v1
apps|v1|deployments|Deployment|y|deploy|all|status,scale|io.k8s.api.apps.v1
apps|v1|replicasets|ReplicaSet|y|rs|all|status,scale|io.k8s.api.apps.v1
apps|v1|statefulsets|StatefulSet|y|sts|all|status,scale|io.k8s.api.apps.v1
apps|v1|daemonsets|DaemonSet|y|ds|all|status|io.k8s.api.apps.v1
apps|v1|controllerrevisions|ControllerRevision|y||||io.k8s.api.apps.v1
batch|v1|jobs|Job|y||all|status|io.k8s.api.batch.v1
batch|v1|cronjobs|CronJob|y|cj|all|status|io.k8s.api.batch.v1
rbac.authorization.k8s.io|v1|roles|Role|y||||io.k8s.api.rbac.v1
rbac.authorization.k8s.io|v1|rolebindings|RoleBinding|y||||io.k8s.api.rbac.v1
rbac.authorization.k8s.io|v1|clusterroles|ClusterRole|n||||io.k8s.api.rbac.v1
rbac.authorization.k8s.io|v1|clusterrolebindings|ClusterRoleBinding|n||||io.k8s.api.rbac.v1
policy|v1|poddisruptionbudgets|PodDisruptionBudget|y|pdb||status|io.k8s.api.policy.v1
autoscaling|v2|horizontalpodautoscalers|HorizontalPodAutoscaler|y|hpa|all|status|io.k8s.api.autoscaling.v2
networking.k8s.io|v1|networkpolicies|NetworkPolicy|y|netpol|||io.k8s.api.networking.v1
networking.k8s.io|v1|ingresses|Ingress|y|ing||status|io.k8s.api.networking.v1
discovery.k8s.io|v1|endpointslices|EndpointSlice|y||||io.k8s.api.discovery.v1
coordination.k8s.io|v1|leases|Lease|y||||io.k8s.api.coordination.v1
scheduling.k8s.io|v1|priorityclasses|PriorityClass|n|pc|||io.k8s.api.scheduling.v1
apiextensions.k8s.io|v1|customresourcedefinitions|CustomResourceDefinition|n|crd,crds|api-extensions|status|io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1
authorization.k8s.io|v1|selfsubjectaccessreviews|SelfSubjectAccessReview|n||||io.k8s.api.authorization.v1
authorization.k8s.io|v1|selfsubjectrulesreviews|SelfSubjectRulesReview|n||||io.k8s.api.authorization.v1
authorization.k8s.io|v1|subjectaccessreviews|SubjectAccessReview|n||||io.k8s.api.authorization.v1
authentication.k8s.io|v1|selfsubjectreviews|SelfSubjectReview|n||||io.k8s.api.authentication.v1
"""

REVIEWS = {"selfsubjectaccessreviews", "selfsubjectrulesreviews", "subjectaccessreviews", "selfsubjectreviews"}


def builtins(definitions: Definitions) -> list[Resource]:
    """Every resource served before any CustomResourceDefinition exists."""
    found = []
    for line in _BUILTINS.strip().splitlines():
        group, version, plural, kind, namespaced, short, categories, subresources, package = line.split("|")
        subs = tuple(filter(None, subresources.split(",")))
        found.append(
            Resource(
                group=group.replace("-", "") if group == "-" else group,
                version=version,
                plural=plural,
                kind=kind,
                namespaced=namespaced == "y",
                schema=definitions.node(f"{package}.{kind}"),
                short_names=tuple(filter(None, short.split(","))),
                categories=tuple(filter(None, categories.split(","))),
                subresources=subs,
                scale=Scale() if "scale" in subs else None,
                singular=kind.lower(),
                list_kind=f"{kind}List",
                verbs=("create",) if plural in REVIEWS else ALL_VERBS,
                definition=f"{package}.{kind}",
            )
        )
    return found


class Registry:
    """Which resources are served, by group, version and plural."""

    def __init__(self, definitions: Definitions) -> None:
        self.definitions = definitions
        self._builtin = {(r.group, r.version, r.plural): r for r in builtins(definitions)}
        self._custom: dict[tuple[str, str, str], Resource] = {}
        self._by_kind: dict[tuple[str, str], Resource] = {}
        self._index()

    def _index(self) -> None:
        self._by_kind = {(r.api_version, r.kind): r for r in self.all()}

    def all(self) -> list[Resource]:
        return [*self._builtin.values(), *self._custom.values()]

    def find(self, group: str, version: str, plural: str) -> Resource | None:
        key = (group, version, plural)
        return self._builtin.get(key) or self._custom.get(key)

    def by_kind(self, api_version: str, kind: str) -> Resource | None:
        return self._by_kind.get((api_version, kind))

    def serve_custom(self, name: str, resources: list[Resource]) -> None:
        """Serve these, and only these, for the CustomResourceDefinition called `name`."""
        self._custom = {k: r for k, r in self._custom.items() if f"{r.plural}.{r.group}" != name}
        self._custom.update({(r.group, r.version, r.plural): r for r in resources})
        self._index()
