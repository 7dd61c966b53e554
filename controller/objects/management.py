"""The tokens of the routers' management port: the Secret that has them, and how routers and Prometheus get them."""

from __future__ import annotations

from controller.objects.names import Cluster, Component, Object

TOKEN_KEY = "token"  # noqa: S105  its name, not its value
"""Key of the Secret whose token the operator, routers and Prometheus show. Those of other keys are let in as well."""
MANAGEMENT_FOLDER = "/run/kvcluster-management"
"""Where router pods find the Secret."""


def own_secret(cluster: str) -> str:
    """Name of the Secret that the operator makes for the KVCluster of this name."""
    return f"{cluster}-{Component.ROUTER}-management"


def management_secret(cluster: Cluster) -> str | None:
    """Name of the Secret with the tokens; None where none is asked for."""
    if cluster.spec.management_auth == "none":
        return None
    return cluster.release.management_secret or own_secret(cluster.name)


def build_management_secret(cluster: Cluster) -> Object | None:
    """The Secret that the operator has to make, without its content; None where there is to be none, or where somebody
    else provides it."""
    if management_secret(cluster) is None or cluster.release.management_secret is not None:
        return None
    return {**cluster.new_object("v1", "Secret", Component.ROUTER, "-management"), "type": "Opaque"}


def management_variables(cluster: Cluster) -> list[Object]:
    """The environment variable that has a router ask for tokens. It is not among the settings in the ConfigMap, which
    reach containers that restart in older pods, too: those have no such volume."""
    name = "ROUTER_MANAGEMENT_TOKEN_FILE"
    given = {variable.name for variable in (*cluster.spec.model.env, *cluster.spec.router.env)}
    if management_secret(cluster) is None or name in given:
        return []
    return [{"name": name, "value": MANAGEMENT_FOLDER}]


def scrape_authorization(cluster: Cluster) -> Object:
    """`authorization` of an endpoint of a PodMonitor."""
    secret = management_secret(cluster)
    if secret is None:
        return {}
    return {"authorization": {"type": "Bearer", "credentials": {"name": secret, "key": TOKEN_KEY}}}
