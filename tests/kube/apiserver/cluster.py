"""What a server holds beside its connections: objects, the resources served, and who asks."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass, field

from tests.kube.apiserver.customresources import serve
from tests.kube.apiserver.normalization import fill_defaults, prune
from tests.kube.apiserver.resources import Registry, Resource
from tests.kube.apiserver.schema import Definitions
from tests.kube.apiserver.store import Change, Store

CRDS = ("apiextensions.k8s.io", "customresourcedefinitions")
NAMESPACES = ("", "namespaces")
SERVICE_NETWORK = ipaddress.ip_network("127.96.0.0/16")
"""Where ClusterIPs come from: loopback addresses, which the node does not use."""


@dataclass(frozen=True)
class User:
    """Who asks."""

    name: str
    admin: bool = False


ADMIN = User("admin", admin=True)


@dataclass
class Ask:
    """One request to write: by whom, and how."""

    user: User = ADMIN
    manager: str = "unknown"
    subresource: str = ""
    dry_run: bool = False
    validation: str = "Warn"
    """What unknown fields do: Ignore, Warn or Strict."""
    warnings: list[str] = field(default_factory=list)


class Cluster:
    """The state of one API server."""

    def __init__(self, definitions: Definitions) -> None:
        self.registry = Registry(definitions)
        self.store = Store()
        self.store.subscribe(self._serve_definitions)

    @staticmethod
    def clock() -> datetime.datetime:
        """The time."""
        return datetime.datetime.now(datetime.UTC)

    def now(self) -> str:
        """The time as objects have it."""
        return self.clock().strftime("%Y-%m-%dT%H:%M:%SZ")

    def _serve_definitions(self, change: Change) -> None:
        if change.key == CRDS:
            definition = change.new.obj if change.new else None
            resources = serve(definition, self.registry.definitions.meta())
            self.registry.serve_custom(change.name[1], resources)
            if change.old is not None and change.old.obj["spec"] != change.last.obj["spec"]:
                self._reread(resources)

    def _reread(self, resources: list[Resource]) -> None:
        """What is stored is pruned and gets its defaults anew by a schema that changed."""
        for resource in resources:
            for stored in list(self.store.all(resource.key)):
                obj = stored.copy()
                prune(obj, resource.schema)
                fill_defaults(obj, resource.schema)
                if obj != stored.obj:
                    meta = obj["metadata"]
                    self.store.reread(resource.key, (meta.get("namespace", ""), meta["name"]), obj)

    def resource_of(self, api_version: str, kind: str) -> Resource | None:
        return self.registry.by_kind(api_version, kind)

    def free_cluster_ip(self) -> str:
        """An address of the service network no Service has."""
        taken = {s.obj["spec"].get("clusterIP") for s in self.store.all(("", "services"))}
        hosts = SERVICE_NETWORK.hosts()
        next(hosts)
        return next(str(address) for address in hosts if str(address) not in taken)

    def free_node_port(self) -> int:
        taken = {
            port.get("nodePort") for s in self.store.all(("", "services")) for port in s.obj["spec"].get("ports") or ()
        }
        return next(port for port in range(30000, 32768) if port not in taken)
