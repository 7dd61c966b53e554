"""The token of the routers' management port in the objects: the Secret, its mount, and what Prometheus shows.

Not covered: how the Secret is made and read (tests/controller/reconcile/test_tokens), what routers do with the tokens
(tests/router/test_management_token).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from controller.api.model import KVClusterSpec
from controller.objects.desired import desired_objects
from controller.objects.management import MANAGEMENT_FOLDER, build_management_secret
from controller.objects.names import Cluster, Object, Release
from controller.status.pods import management_secret
from router.settings import Settings

RELEASE = Release("kvcluster:1")


def cluster(release: Release = RELEASE, **spec: Any) -> Cluster:
    return Cluster("rag", "ns", "uid-1", KVClusterSpec.model_validate(spec), release)


def found(of: Cluster, kind: str, name: str = "rag-router") -> Object:
    (item,) = [each for each in desired_objects(of) if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return item


def router_settings(of: Cluster, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings as the router reads them in its pod."""
    (container,) = found(of, "Deployment")["spec"]["template"]["spec"]["containers"]
    given = {each["name"]: each["value"] for each in container.get("env", ())}
    for name, value in {**found(of, "ConfigMap")["data"], **given}.items():
        monkeypatch.setenv(name, value)
    return Settings.load([])


def test_routers_ask_for_a_token_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    of = cluster()
    template = found(of, "Deployment")["spec"]["template"]
    assert management_secret(template) == "rag-router-management"
    (container,) = template["spec"]["containers"]
    (mount,) = [each for each in container["volumeMounts"] if each["mountPath"] == MANAGEMENT_FOLDER]
    assert mount["readOnly"]
    assert "subPath" not in mount, "a single file would not follow the Secret"
    settings = router_settings(of, monkeypatch)
    assert str(settings.management_token_file) == MANAGEMENT_FOLDER
    assert not settings.management_open_metrics
    # A container of an older pod that restarts reads the new ConfigMap, and has no volume of tokens.
    assert "ROUTER_MANAGEMENT_TOKEN_FILE" not in found(of, "ConfigMap")["data"]
    secret = build_management_secret(of)
    assert secret is not None
    assert secret["metadata"]["name"] == "rag-router-management"
    assert secret["metadata"]["ownerReferences"] == [of.owner]
    assert "data" not in secret
    assert not any(each["kind"] == "Secret" for each in desired_objects(of)), "it is made once, not applied"


def test_none_is_asked_for_by_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    of = cluster(router={"management": {"auth": "none"}}, monitoring={"podMonitor": True})
    assert management_secret(found(of, "Deployment")["spec"]["template"]) == ""
    assert router_settings(of, monkeypatch).management_token_file is None
    assert build_management_secret(of) is None
    assert "authorization" not in found(of, "PodMonitor")["spec"]["podMetricsEndpoints"][0]


@pytest.mark.parametrize(
    ("spec", "is_open"),
    [
        pytest.param({}, False, id="default"),
        pytest.param({"monitoring": {"scrapeAnnotations": True}}, True, id="annotations"),
        pytest.param({"router": {"management": {"auth": "tokenExceptMetrics"}}}, True, id="by choice"),
        pytest.param(
            {"monitoring": {"scrapeAnnotations": True}, "router": {"management": {"auth": "token"}}}, False, id="closed"
        ),
    ],
)
def test_a_scraper_that_has_no_token_reads_metrics_alone(
    spec: dict[str, Any], is_open: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = router_settings(cluster(**spec), monkeypatch)
    assert settings.management_token_file is not None
    assert settings.management_open_metrics is is_open


def test_prometheus_shows_the_token_to_routers_alone() -> None:
    of = cluster(monitoring={"podMonitor": True})
    (endpoint,) = found(of, "PodMonitor")["spec"]["podMetricsEndpoints"]
    credentials = {"name": "rag-router-management", "key": "token"}
    assert endpoint["authorization"] == {"type": "Bearer", "credentials": credentials}
    for endpoint in found(of, "PodMonitor", "rag-worker")["spec"]["podMetricsEndpoints"]:
        assert "authorization" not in endpoint


def test_the_installation_may_name_a_secret() -> None:
    of = cluster(replace(RELEASE, management_secret="shared"), monitoring={"podMonitor": True})
    assert management_secret(found(of, "Deployment")["spec"]["template"]) == "shared"
    assert found(of, "PodMonitor")["spec"]["podMetricsEndpoints"][0]["authorization"]["credentials"]["name"] == "shared"
    assert build_management_secret(of) is None


def test_a_file_that_the_spec_names_itself_stays() -> None:
    own = {"name": "ROUTER_MANAGEMENT_TOKEN_FILE", "value": "/own"}
    (container,) = found(cluster(router={"env": [own]}), "Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["env"] == [own]


def test_its_volume_is_the_pods_own() -> None:
    with pytest.raises(ValueError, match="the pods' own: call yours otherwise"):
        cluster(model={"volumes": [{"name": "kvcluster-management", "emptyDir": {}}]})
