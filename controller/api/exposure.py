"""Parts of the manifest about who connects to the pods: API keys, Services, Ingress, HTTPRoute, NetworkPolicies,
monitoring."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from controller.api.common import RawObject, SpecModel, rule_broken

Host = Annotated[str, Field(pattern=r"^(\*\.)?[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
UrlPath = Annotated[str, Field(pattern=r"^/[^\s?#]*$", max_length=1_024)]


class Network(SpecModel):
    """IP families of all Services. Processes listen on every family that the machine has."""

    ip_family_policy: Literal["SingleStack", "PreferDualStack", "RequireDualStack"] | None = None
    """Whether Services get addresses of both families. Default: the cluster's, which is one family."""
    ip_families: Annotated[list[Literal["IPv4", "IPv6"]], Field(max_length=2)] = Field(default_factory=list)
    """Families in order of preference. Default: the cluster's."""

    @model_validator(mode="after")
    def _families_fit(self) -> Network:
        if len(self.ip_families) == 2:
            if self.ip_family_policy == "SingleStack":
                why = "SingleStack has one family: remove one of the two, or ask for PreferDualStack"
                raise rule_broken("ipFamilies", why)
            if self.ip_families[0] == self.ip_families[1]:
                raise rule_broken("ipFamilies", "is given twice: remove one of the two")
        return self


class Service(SpecModel):
    """The Service in front of the routers' data port."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"
    """Kind of Service."""
    annotations: dict[str, str] = Field(default_factory=dict)
    """Annotations, for a cloud's load balancer say."""
    load_balancer_class: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    """For LoadBalancer: which implementation serves it, such as `tailscale` or `service.k8s.aws/nlb`. Kubernetes lets
    nobody change it later."""

    @model_validator(mode="after")
    def _class_of_a_load_balancer(self) -> Service:
        if self.load_balancer_class is not None and self.type != "LoadBalancer":
            why = "means something to a LoadBalancer alone: remove it, or set type to LoadBalancer"
            raise rule_broken("loadBalancerClass", why)
        return self


class SecretKey(SpecModel):
    """One key of a Secret in the namespace of the KVCluster."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
    """Name of the Secret."""
    key: Annotated[str, Field(pattern=r"^[-._a-zA-Z0-9]+$", max_length=253)]
    """Key in it."""


class Named(SpecModel):
    """A Secret in the namespace of the KVCluster."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
    """Name of the Secret."""


class Authorities(Named):
    """Certificates of authorities in a Secret in the namespace of the KVCluster."""

    key: Annotated[str, Field(pattern=r"^[-._a-zA-Z0-9]+$", max_length=253)] = "ca.crt"
    """Key in it that holds them, in PEM."""


class Tls(SpecModel):
    """HTTPS at the routers' data port: see `docs/security.md`."""

    secret_ref: Named | None = None
    """The Secret of type `kubernetes.io/tls` with certificate and key. It must exist before the routers start, and is
    followed when it changes. Default: plain HTTP."""
    client_ca_secret_ref: Annotated[Authorities | None, Field(alias="clientCASecretRef")] = None
    """Authorities one of which must have signed each client's certificate. Default: clients need none."""

    @model_validator(mode="after")
    def _clients_need_a_server(self) -> Tls:
        if self.client_ca_secret_ref is not None and self.secret_ref is None:
            raise rule_broken("clientCASecretRef", "goes with a certificate of the routers' own: set secretRef")
        return self


class Auth(SpecModel):
    """Who may send requests to the routers: see `docs/security.md`."""

    keys_secret_ref: SecretKey | None = None
    """The file with the API keys. Its Secret must exist before the routers start, and is followed when it changes.
    Default: no key is asked for."""


ManagementAuth = Literal["token", "tokenExceptMetrics", "none"]


class Management(SpecModel):
    """Who may ask the routers' management port: see `docs/security.md`."""

    auth: ManagementAuth | None = None
    """`token`: whoever shows a token of the Secret `NAME-router-management`, which the operator makes.
    `tokenExceptMetrics`: the same, but anybody may read `/metrics`. `none`: anybody. Default: `token`; where
    `monitoring.scrapeAnnotations` is on, whose scrapers have no token, `tokenExceptMetrics`."""


class Ingress(SpecModel):
    """An Ingress in front of the routers' Service."""

    host: Host | None = None
    """Host name that requests must be for. Default: any."""
    path: UrlPath = "/"
    """Prefix of the path. It stays in the path that the routers see, so the API's own paths need `/`."""
    class_name: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    """IngressClass. Default: the cluster's default class."""
    tls_secret: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    """Name of the Secret with certificate and key for `host`. Default: no TLS."""
    annotations: dict[str, str] = Field(default_factory=dict)
    """Annotations: certificates, time limits, buffering (answers are streamed: turn it off)."""


class HttpRoute(SpecModel):
    """A Gateway API HTTPRoute to the routers' Service."""

    parent_refs: Annotated[list[RawObject], Field(min_length=1, max_length=32)]
    """Gateways (or listeners) that take it, as an HTTPRoute writes them: `{name, namespace, sectionName}`."""
    hostnames: Annotated[list[Host], Field(max_length=16)] = Field(default_factory=list)
    """Host names that requests must be for. Default: those of the listener."""
    path: UrlPath = "/"
    """Prefix of the path."""
    annotations: dict[str, str] = Field(default_factory=dict)
    """Annotations of the object."""


class NetworkPolicy(SpecModel):
    """Who may open connections to the pods."""

    enabled: bool = False
    """Let only routers and scrapers reach the workers, and only they and the controller the management port."""
    scrapers: list[RawObject] = Field(default_factory=list, max_length=64)
    """Peers that may scrape metrics, as a NetworkPolicy writes them (namespaceSelector, podSelector, ipBlock)."""
    clients: list[RawObject] = Field(default_factory=list, max_length=64)
    """Peers that may send requests to the routers. Default: everyone."""


class Monitoring(SpecModel):
    """How Prometheus finds the pods."""

    pod_monitor: bool = False
    """Create a PodMonitor, where the Prometheus operator's CRD is installed."""
    pod_monitor_labels: dict[str, str] = Field(default_factory=dict)
    """Labels of the PodMonitor: a Prometheus selects its monitors by them."""
    interval_seconds: Annotated[int, Field(ge=1, le=3_600)] = 15
    """How often the PodMonitor has the pods scraped."""
    scrape_annotations: bool = False
    """Annotate the pods with `prometheus.io/scrape`, `port` and `path`."""
