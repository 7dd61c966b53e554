"""The resources an API server has from the start, and the table of those it serves now.

Modelled: kinds that the product writes or reads, or that kubectl and helm read on the way. Others of the same groups
are answered with 501, other groups with 404, as where they are not installed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.kube.apiserver.schema import Definitions, Node


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

    spec_path: str
    status_path: str
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
    openapi: dict[str, Any] = field(default_factory=dict)
    """The schema as published."""
    definition: str = ""

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def key(self) -> tuple[str, str]:
        """What its objects are stored under."""
        return self.group, self.plural

    @property
    def has_status(self) -> bool:
        return "status" in self.subresources


# group, version, plural, kind, namespaced, short names, categories, subresources, package of the definition
_BUILTINS = """
|v1|namespaces|Namespace|n|ns||status|io.k8s.api.core.v1
|v1|pods|Pod|y|po|all|status,proxy|io.k8s.api.core.v1
|v1|services|Service|y|svc|all|status|io.k8s.api.core.v1
|v1|configmaps|ConfigMap|y|cm|||io.k8s.api.core.v1
|v1|secrets|Secret|y||||io.k8s.api.core.v1
|v1|serviceaccounts|ServiceAccount|y|sa|||io.k8s.api.core.v1
|v1|events|Event|y|ev|||io.k8s.api.core.v1
apps|v1|deployments|Deployment|y|deploy|all|status,scale|io.k8s.api.apps.v1
apps|v1|replicasets|ReplicaSet|y|rs|all|status|io.k8s.api.apps.v1
rbac.authorization.k8s.io|v1|roles|Role|y||||io.k8s.api.rbac.v1
rbac.authorization.k8s.io|v1|rolebindings|RoleBinding|y||||io.k8s.api.rbac.v1
rbac.authorization.k8s.io|v1|clusterroles|ClusterRole|n||||io.k8s.api.rbac.v1
rbac.authorization.k8s.io|v1|clusterrolebindings|ClusterRoleBinding|n||||io.k8s.api.rbac.v1
policy|v1|poddisruptionbudgets|PodDisruptionBudget|y|pdb||status|io.k8s.api.policy.v1
autoscaling|v2|horizontalpodautoscalers|HorizontalPodAutoscaler|y|hpa|all|status|io.k8s.api.autoscaling.v2
networking.k8s.io|v1|networkpolicies|NetworkPolicy|y|netpol|||io.k8s.api.networking.v1
networking.k8s.io|v1|ingresses|Ingress|y|ing||status|io.k8s.api.networking.v1
discovery.k8s.io|v1|endpointslices|EndpointSlice|y||||io.k8s.api.discovery.v1
apiextensions.k8s.io|v1|customresourcedefinitions|CustomResourceDefinition|n|crd,crds|api-extensions|status|io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1
"""
"""Kinds that the product writes or reads, or that kubectl and helm read on the way."""

BUILTIN_GROUPS = frozenset(line.split("|")[0] for line in _BUILTINS.strip().splitlines())


def builtins(definitions: Definitions) -> list[Resource]:
    """Every resource served before any CustomResourceDefinition exists."""
    found = []
    for line in _BUILTINS.strip().splitlines():
        group, version, plural, kind, namespaced, short, categories, subresources, package = line.split("|")
        subs = tuple(filter(None, subresources.split(",")))
        found.append(
            Resource(
                group=group,
                version=version,
                plural=plural,
                kind=kind,
                namespaced=namespaced == "y",
                schema=definitions.node(f"{package}.{kind}"),
                short_names=tuple(filter(None, short.split(","))),
                categories=tuple(filter(None, categories.split(","))),
                subresources=subs,
                scale=Scale(".spec.replicas", ".status.replicas") if "scale" in subs else None,
                singular=kind.lower(),
                list_kind=f"{kind}List",
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

    def of(self, group: str, version: str) -> list[Resource]:
        """What is served at one group and version."""
        return [resource for resource in self.all() if (resource.group, resource.version) == (group, version)]

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
