"""The pods of routers and workers: security, images, settings, variables, probes, drains, vLLM and its agent.

Not covered: that Kubernetes runs such pods (tests/kube/e2e).
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from controller.objects.names import Release
from controller.objects.workers import SHARED_MEMORY
from router.settings import Settings as RouterSettings
from tests.controller.objects.support import SPECS, VLLM, containers, objects
from worker.agent.settings import Settings as AgentSettings
from worker.settings import Settings as WorkerSettings


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_our_own_containers_are_restricted(spec):
    made = objects(**spec)
    own = [
        container
        for component in ("router", "worker")
        for container in containers(made[f"Deployment/rag-{component}"]).values()
        if container["command"][0] == "python"
    ]
    assert own
    for container in own:
        context = container["securityContext"]
        assert context["runAsNonRoot"]
        assert context["readOnlyRootFilesystem"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["image"] == "kvcluster:1.2.3"
        assert container["imagePullPolicy"] == "Never"


RESTRICTED_PROFILE = {
    "allowPrivilegeEscalation": False,
    "runAsNonRoot": True,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}
"""What a namespace that enforces the Pod Security Standard `restricted` demands of every container."""


def test_an_engine_can_be_let_into_a_restricted_namespace():
    given = {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 2000}
    made = objects(**{**VLLM, "workers": {**VLLM["workers"], "securityContext": given}})
    pod = made["Deployment/rag-worker"]["spec"]["template"]["spec"]
    assert pod["securityContext"] == {"fsGroup": 2000}
    for container in containers(made["Deployment/rag-worker"]).values():
        assert container["securityContext"].items() >= RESTRICTED_PROFILE.items()
    engine = containers(made["Deployment/rag-worker"])["worker"]
    assert engine["securityContext"]["runAsUser"] == 1000
    env = {variable["name"]: variable.get("value") for variable in engine["env"]}
    assert (env["HOME"], env["USER"]) == ("/tmp", "vllm")  # noqa: S108
    assert {"name": "tmp", "mountPath": "/tmp"} in engine["volumeMounts"]  # noqa: S108
    for spec in ({}, {"workers": {"securityContext": {"readOnlyRootFilesystem": False}}}):
        emulator = containers(objects(**spec)["Deployment/rag-worker"])["worker"]
        assert emulator["securityContext"].items() >= RESTRICTED_PROFILE.items()
    home = {"name": "HOME", "value": "/models"}
    made = objects(**{**VLLM, "model": {**VLLM["model"], "env": [home]}, "workers": {"securityContext": given}})
    assert [each for each in containers(made["Deployment/rag-worker"])["worker"]["env"] if each["name"] == "HOME"] == [
        home
    ]


def test_no_image_is_whatever_is_latest():
    for item in objects(**VLLM).values():
        for container in containers(item).values() if item["kind"] == "Deployment" else ():
            tag = container["image"].rpartition(":")[2]
            assert re.fullmatch(r"v?\d+(\.\d+)+", tag), container["image"]


def test_a_pods_environment_is_what_its_process_reads(monkeypatch):
    made = objects(cache={"blocks": 100}, engine={"seed": 7}, router={"strategy": "round_robin"})
    for component in ("router", "worker"):
        for name, value in made[f"ConfigMap/rag-{component}"]["data"].items():
            monkeypatch.setenv(name, value)
    worker, router = WorkerSettings.load([]), RouterSettings.load([])
    assert (worker.blocks, worker.seed, worker.block_size, worker.port) == (100, 7, 16, 8100)
    assert (router.strategy, router.block_size, router.grace_period) == ("round_robin", 16, 30.0)


KEYS = {"router": {"auth": {"keysSecretRef": {"name": "api-keys", "key": "keys.yaml"}}}}


def test_routers_behind_a_gateway_serve_the_picker_where_its_service_leads(monkeypatch):
    made = objects(gateway={"inferencePool": True})
    for name, value in made["ConfigMap/rag-router"]["data"].items():
        monkeypatch.setenv(name, value)
    settings = RouterSettings.load([])
    [port] = made["Service/rag-router-picker"]["spec"]["ports"]
    [container] = containers(made["Deployment/rag-router"]).values()
    declared = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert settings.mode == "both"
    assert settings.picker_port == declared[port["targetPort"]]
    pool = made["InferencePool/rag-worker"]["spec"]["endpointPickerRef"]
    assert (pool["name"], pool["port"]["number"]) == ("rag-router-picker", port["port"])


@pytest.mark.parametrize(
    ("component", "prefix", "model", "spec"),
    [
        ("router", "ROUTER_", RouterSettings, {}),
        ("router", "ROUTER_", RouterSettings, {"gateway": {"inferencePool": True}, **KEYS}),
        ("worker", "WORKER_", WorkerSettings, {}),
        ("worker", "AGENT_", AgentSettings, {**VLLM, "cache": {"blocks": 10_000}}),
    ],
    ids=["router", "router behind a gateway, with keys", "worker", "agent"],
)
def test_no_setting_of_a_pod_goes_unread(component, prefix, model, spec):
    names = objects(**spec)[f"ConfigMap/rag-{component}"]["data"]
    assert all(name.startswith(prefix) for name in names)
    assert {name.removeprefix(prefix).lower() for name in names} <= model.model_fields.keys()


def test_a_change_of_the_settings_rolls_the_pods_it_concerns():
    def hashes(**spec: Any) -> list[str]:
        made = objects(**spec)
        return [
            made[f"Deployment/rag-{component}"]["spec"]["template"]["metadata"]["annotations"][
                "kvcluster.dev/config-hash"
            ]
            for component in ("worker", "router")
        ]

    worker, router = hashes()
    assert hashes(workers={"replicas": 9}) == [worker, router]
    other_worker, same_router = hashes(engine={"seed": 1})
    assert other_worker != worker
    assert same_router == router
    same_worker, other_router = hashes(router={"strategy": "round_robin"})
    assert same_worker == worker
    assert other_router != router


def test_pods_have_time_to_drain():
    made = objects(workers={"drainSeconds": 120})
    assert made["Deployment/rag-worker"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 160
    assert made["Deployment/rag-router"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 160
    worker, router = made["ConfigMap/rag-worker"]["data"], made["ConfigMap/rag-router"]["data"]
    assert (worker["WORKER_GRACE_PERIOD"], router["ROUTER_GRACE_PERIOD"]) == ("120", "120")
    assert (worker["WORKER_DRAIN_LIMIT"], router["ROUTER_DRAIN_LIMIT"]) == ("30", "30")
    assert router["ROUTER_KUBERNETES_OWN_SERVICE"] == "rag-router", "where a router sees whether another one serves"
    assert router["ROUTER_KUBERNETES_MANAGEMENT_SERVICE"] == "rag-router-management", "where its live page finds others"


def test_vllm_gets_an_agent_beside_it_and_a_feed_port():
    made = objects(**VLLM)
    found = containers(made["Deployment/rag-worker"])
    assert found["worker"]["command"] == ["vllm", "serve"]
    assert found["worker"]["args"][0] == "meta-llama/Llama-3.1-8B"
    assert found["agent"]["restartPolicy"] == "Always", "a native sidecar: it outlives the engine"
    assert {port["name"]: port["port"] for port in made["Service/rag-worker"]["spec"]["ports"]} == {
        "http": 8100,
        "feed": 8101,
    }
    assert made["ConfigMap/rag-worker"]["data"]["AGENT_TOKENIZER"] == "meta-llama/Llama-3.1-8B"
    assert made["ConfigMap/rag-router"]["data"]["ROUTER_TOKENIZER"] == "meta-llama/Llama-3.1-8B"


def test_vllm_of_several_engines_publishes_the_events_of_each_on_a_port_of_its_own():
    def ports(made: dict[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
        argument = next(
            each for each in containers(made["Deployment/rag-worker"])["worker"]["args"] if "events" in each
        )
        events = json.loads(argument.removeprefix("--kv-events-config="))
        return events, made["ConfigMap/rag-worker"]["data"]

    one, agent = ports(objects(**VLLM))
    assert (one["endpoint"], one["replay_endpoint"]) == ("tcp://*:5557", "tcp://127.0.0.1:5558")
    assert "AGENT_DATA_PARALLEL_SIZE" not in agent
    made = objects(**{**VLLM, "engine": {**VLLM["engine"], "dataParallel": {"size": 4}}})
    assert "--data-parallel-size=4" in containers(made["Deployment/rag-worker"])["worker"]["args"]
    several, agent = ports(made)
    assert (several["endpoint"], several["replay_endpoint"]) == ("tcp://*:5557", "tcp://127.0.0.1:5561")
    assert agent["AGENT_DATA_PARALLEL_SIZE"] == "4"
    assert agent["AGENT_REPLAY_ENDPOINT"] == several["replay_endpoint"]
    assert agent["AGENT_EVENTS_ENDPOINT"] == "tcp://127.0.0.1:5557"


def test_vllm_offloads_into_shared_memory_and_says_what_it_holds():
    engine = {**VLLM["engine"], "cpuCache": {"size": "32Gi", "bandwidth": "40G"}, "dataParallel": {"size": 2}}
    made = objects(**{**VLLM, "engine": engine})
    worker = containers(made["Deployment/rag-worker"])["worker"]
    (argument,) = (a for a in worker["args"] if a.startswith("--kv-transfer-config="))
    connector = json.loads(argument.removeprefix("--kv-transfer-config="))
    assert connector["kv_connector"] == "OffloadingConnector"
    assert connector["kv_connector_extra_config"] == {
        "cpu_bytes_to_use": 32 * 2**30,
        "self_describing_kv_events": True,
    }
    volumes = made["Deployment/rag-worker"]["spec"]["template"]["spec"]["volumes"]
    assert {"name": "cpu-cache", "emptyDir": {"medium": "Memory", "sizeLimit": f"{65 * 1024}Mi"}} in volumes
    assert {"name": "cpu-cache", "mountPath": SHARED_MEMORY} in worker["volumeMounts"]
    assert made["ConfigMap/rag-worker"]["data"]["AGENT_CPU_BANDWIDTH"] == "4e+10"
    own = [{"name": "shm", "mountPath": SHARED_MEMORY}]
    given = objects(**{**VLLM, "engine": engine, "workers": {**VLLM.get("workers", {}), "volumeMounts": own}})
    assert containers(given["Deployment/rag-worker"])["worker"]["volumeMounts"] == own


@pytest.mark.parametrize(
    ("model", "engine", "expected"),
    [
        pytest.param({}, {}, [], id="nothing that a server keeps"),
        pytest.param(
            {"adapters": [{"name": "sql", "source": "acme/sql"}]}, {}, ["--api-server-count=1"], id="adapters"
        ),
        pytest.param(
            {},
            {"env": [{"name": "VLLM_ENABLE_RESPONSES_API_STORE", "value": "1"}]},
            ["--api-server-count=1"],
            id="stored responses",
        ),
        pytest.param(
            {"adapters": [{"name": "sql", "source": "acme/sql"}]}, {"dataParallel": {"size": 1}}, [], id="one"
        ),
    ],
)
def test_several_engines_have_one_api_server_where_it_keeps_something(
    model: dict[str, Any], engine: dict[str, Any], expected: list[str]
):
    spec = {
        **VLLM,
        "model": {**VLLM["model"], **model},
        "engine": {**VLLM["engine"], "dataParallel": {"size": 2}, **engine},
    }
    arguments = containers(objects(**spec)["Deployment/rag-worker"])["worker"]["args"]
    assert [each for each in arguments if "api-server" in each] == expected


def test_agents_and_routers_get_the_engines_chat_settings():
    args = ["--chat_template", "/models/chat.jinja", "--trust-request-chat-template"]
    engine = {**VLLM["engine"], "args": args}
    made = objects(**{**VLLM, "engine": engine})
    assert containers(made["Deployment/rag-worker"])["worker"]["args"][-3:] == args
    for component, prefix in (("worker", "AGENT"), ("router", "ROUTER")):
        data = made[f"ConfigMap/rag-{component}"]["data"]
        assert data[f"{prefix}_CHAT_TEMPLATE"] == "/models/chat.jinja"
        assert data[f"{prefix}_TRUST_REQUEST_CHAT_TEMPLATE"] == "True"


def test_a_lost_cache_view_takes_no_worker_out_of_service():
    agent = containers(objects(**VLLM)["Deployment/rag-worker"])["agent"]
    assert "readinessProbe" not in agent
    assert "startupProbe" not in agent, "the engine would wait for it"


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_startup_probes_begin_when_the_process_can_have_started(spec):
    made = objects(**spec)
    for component in ("router", "worker"):
        for container in made[f"Deployment/rag-{component}"]["spec"]["template"]["spec"]["containers"]:
            assert container["startupProbe"]["initialDelaySeconds"] >= 2
            # Neither is asked anything before the startup probe has passed.
            assert {"readinessProbe", "livenessProbe"} <= container.keys()


@pytest.mark.parametrize(("spec", "seconds"), [({}, 30), (VLLM, 900)], ids=["emulator", "vllm"])
def test_a_router_may_wait_for_its_first_worker_for_as_long_as_an_engine_starts(spec, seconds):
    router = containers(objects(**spec)["Deployment/rag-router"])["router"]
    assert router["startupProbe"]["httpGet"]["path"] == f"/started?wait={seconds}"
    assert router["startupProbe"]["timeoutSeconds"] > seconds, "the kubelet would give up before the router answers"


def test_all_that_load_the_model_or_its_tokenizer_get_its_variables():
    token = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}}
    mirror = {"name": "HF_ENDPOINT", "value": "http://mirror"}
    made = objects(**{**VLLM, "model": {**VLLM["model"], "env": [token, mirror]}})
    for component in ("router", "worker"):
        for container in containers(made[f"Deployment/rag-{component}"]).values():
            env = {variable["name"]: variable for variable in container["env"]}
            assert env["HF_ENDPOINT"] == mirror
            expected = "t" if container["name"] == "worker" else "token"
            assert env["HF_TOKEN"]["valueFrom"]["secretKeyRef"]["key"] == expected, "the engine's own wins"


def test_the_routers_variables_are_theirs_alone_and_win_over_those_of_the_model():
    endpoint = {"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://collector:4318"}
    salt = {"name": "ROUTER_ACCESS_LOG_SALT", "valueFrom": {"secretKeyRef": {"name": "s", "key": "salt"}}}
    shared = [{"name": "HF_TOKEN", "value": "t"}, {"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://other"}]
    made = objects(model={"env": shared}, router={"env": [endpoint, salt], "accessLog": {"format": "text"}})
    router = containers(made["Deployment/rag-router"])["router"]["env"]
    assert router[:-1] == [shared[0], endpoint, salt]
    assert router[-1]["name"] == "ROUTER_MANAGEMENT_TOKEN_FILE"
    assert salt not in containers(made["Deployment/rag-worker"])["worker"]["env"]
    assert made["ConfigMap/rag-router"]["data"]["ROUTER_ACCESS_LOG"] == "text"
    assert "ROUTER_ACCESS_LOG_BLOCKS" not in made["ConfigMap/rag-router"]["data"]


@pytest.mark.parametrize(
    ("network", "ipv6", "expected"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"ipFamilies": ["IPv4"]}, True, False),
        ({"ipFamilies": ["IPv4", "IPv6"]}, False, True),
    ],
    ids=["IPv4 cluster", "IPv6 cluster", "IPv4 Services on IPv6", "both families"],
)
def test_vllm_listens_where_it_is_asked(network, ipv6, expected):
    release = Release("kvcluster:1.2.3", ipv6=ipv6)
    made = objects(release=release, **VLLM, network=network)
    assert ("--host=::" in containers(made["Deployment/rag-worker"])["worker"]["args"]) is expected


@pytest.mark.parametrize("engine", ["emulator", "vllm"])
def test_all_that_load_the_model_or_its_tokenizer_have_its_volumes(engine):
    volume = {"name": "models", "persistentVolumeClaim": {"claimName": "models", "readOnly": True}}
    mount = {"name": "models", "mountPath": "/models", "readOnly": True}
    model = {"name": "/models/llama", "servedNames": ["llama", "default"], "volumes": [volume], "volumeMounts": [mount]}
    made = objects(engine={"type": engine}, model=model)
    for component in ("router", "worker"):
        deployment = made[f"Deployment/rag-{component}"]
        assert volume in deployment["spec"]["template"]["spec"]["volumes"]
        for name, container in containers(deployment).items():
            assert mount in container["volumeMounts"], name
    router = made["ConfigMap/rag-router"]["data"]
    assert router["ROUTER_MODEL"] == "llama", "requests ask for the served name"
    worker = made["ConfigMap/rag-worker"]["data"]
    if engine == "vllm":
        args = containers(made["Deployment/rag-worker"])["worker"]["args"]
        assert args[0] == "/models/llama"
        where = args.index("--served-model-name")
        assert args[where + 1 : where + 3] == ["llama", "default"]
        assert args[where + 3].startswith("--"), "vLLM takes names up to the next flag"
        assert router["ROUTER_TOKENIZER"] == worker["AGENT_TOKENIZER"] == "/models/llama", "the path, not the name"
        assert worker["AGENT_MODEL"] == "llama"
    else:
        assert worker["WORKER_SERVED_MODEL_NAME"] == "llama,default"


def test_secrets_of_the_release_and_of_the_spec_pull_images():
    release = Release("kvcluster:1.2.3", image_pull_secrets=("shared", "mirror"))
    made = objects(release=release, engine={"imagePullSecrets": ["own", "shared"]})
    for component in ("router", "worker"):
        spec = made[f"Deployment/rag-{component}"]["spec"]["template"]["spec"]
        assert [each["name"] for each in spec["imagePullSecrets"]] == ["shared", "mirror", "own"]


def test_the_router_gets_the_time_limits_of_the_spec():
    router = {
        "timeouts": {"connectSeconds": 1, "answerSeconds": 5.5, "idleSeconds": 90, "keepAliveSeconds": 10},
        "retries": {"attempts": 2, "deadlineSeconds": 0},
        "liveness": {"silenceSeconds": 3, "viewSeconds": 20},
        "ejection": {"consecutive": 0, "rateGap": 0.7, "firstSeconds": 3, "share": 0.25, "pauseSeconds": 5},
    }
    data = objects(router=router)["ConfigMap/rag-router"]["data"]
    given = {
        "CONNECT_TIMEOUT": "1.0", "ANSWER_TIMEOUT": "5.5", "IDLE_TIMEOUT": "90.0", "KEEP_ALIVE": "10.0",
        "RETRY_ATTEMPTS": "2", "RETRY_DEADLINE": "0.0", "LIVENESS_TIMEOUT": "3.0", "VIEW_TIMEOUT": "20.0",
        "EJECT_AFTER": "0", "EJECT_RATE_GAP": "0.7", "EJECT_SECONDS": "3.0", "EJECT_SHARE": "0.25",
        "LONGEST_PAUSE": "5.0",
    }  # fmt: skip
    assert {f"ROUTER_{name}": value for name, value in given.items()}.items() <= data.items()
    assert not {f"ROUTER_{name}" for name in given} & set(objects()["ConfigMap/rag-router"]["data"])


def test_routers_alone_get_the_api_keys_in_a_folder_that_follows_the_secret():
    made = objects(router={"auth": {"keysSecretRef": {"name": "api-keys", "key": "team.yaml"}}})
    pod = made["Deployment/rag-router"]["spec"]["template"]["spec"]
    secret = {"secretName": "api-keys", "items": [{"key": "team.yaml", "path": "keys.yaml"}]}
    assert {"name": "kvcluster-keys", "secret": secret} in pod["volumes"]
    (mount,) = [each for each in pod["containers"][0]["volumeMounts"] if each["name"] == "kvcluster-keys"]
    assert mount["readOnly"]
    assert "subPath" not in mount
    assert made["ConfigMap/rag-router"]["data"]["ROUTER_API_KEYS_FILE"] == f"{mount['mountPath']}/keys.yaml"
    assert "api-keys" not in json.dumps(made["Deployment/rag-worker"])
    assert "ROUTER_API_KEYS_FILE" not in objects()["ConfigMap/rag-router"]["data"]


def test_routers_alone_get_the_certificate_in_a_folder_that_follows_its_secrets(monkeypatch):
    wanted = {"secretRef": {"name": "cert"}, "clientCASecretRef": {"name": "clients", "key": "roots.pem"}}
    made = objects(router={"tls": wanted})
    pod = made["Deployment/rag-router"]["spec"]["template"]["spec"]
    (volume,) = [each for each in pod["volumes"] if each["name"] == "kvcluster-tls"]
    own = [{"key": name, "path": name} for name in ("tls.crt", "tls.key")]
    clients = [{"key": "roots.pem", "path": "client-ca.crt"}]
    assert volume["projected"]["sources"] == [
        {"secret": {"name": "cert", "items": own}},
        {"secret": {"name": "clients", "items": clients}},
    ]
    (mount,) = [each for each in pod["containers"][0]["volumeMounts"] if each["name"] == "kvcluster-tls"]
    assert mount["readOnly"]
    for name, value in made["ConfigMap/rag-router"]["data"].items():
        monkeypatch.setenv(name, value)
    settings = RouterSettings.load([])
    assert str(settings.tls_cert_path) == mount["mountPath"]
    assert str(settings.tls_client_ca) == f"{mount['mountPath']}/client-ca.crt"
    assert made["Service/rag-router"]["spec"]["ports"][0]["appProtocol"] == "https"
    assert "kvcluster-tls" not in json.dumps(made["Deployment/rag-worker"])
    plain = objects()
    assert "appProtocol" not in plain["Service/rag-router"]["spec"]["ports"][0]
    assert not [name for name in plain["ConfigMap/rag-router"]["data"] if name.startswith("ROUTER_TLS")]
