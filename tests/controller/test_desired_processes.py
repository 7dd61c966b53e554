"""The local processes that a manifest asks for, their environment, and how their ends are counted and described.

Not covered: that the processes run (test_cluster), and that they understand their flags (test_agreement).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from controller.local.desired_processes import Addresses, Guard, LocalModeError, Role, check, desired_processes
from controller.local.envoy import EnvoyParts
from controller.local.process import describe_exit, environment, failures_in_a_row
from router.settings import Settings as RouterSettings

ADDRESSES = Addresses(("http://127.0.0.1:1", "http://127.0.0.1:2"), "http://127.0.0.1:8000", "http://127.0.0.1:9000")


def flags(process):
    return dict(arg.removeprefix("--").split("=", 1) for arg in process.args)


def test_workers_get_what_the_manifest_says(make_manifest):
    manifest = make_manifest(
        model={"name": "m", "profile": "llama-3.1-8b-l4-24gb", "maxModelLen": 512},
        engine={
            "speed": 4,
            "seed": 7,
            "generator": "gpt2",
            "meanOutputTokens": 9,
            "env": [{"name": "A"}],
        },
        cache={"blockSize": 32, "blocks": 100},
        workers={"replicas": 2, "drainSeconds": 5},
    )
    first, second, _ = desired_processes(manifest, ADDRESSES)
    assert (first.name, second.name) == ("demo-worker-0", "demo-worker-1")
    assert (first.role, first.program, first.grace) == (Role.WORKER, "worker.main", 5)
    assert (second.url, second.probe) == ("http://127.0.0.1:2", "http://127.0.0.1:2/health")
    assert second.listeners == (("--fd", "http://127.0.0.1:2"),)
    assert first.env == {"A": ""}
    assert flags(first) == {
        "worker-id": "demo-worker-0",
        "advertise-url": "http://127.0.0.1:1",
        "model": "m",
        "tokenizer": "gpt2",
        "profile": "llama-3.1-8b-l4-24gb",
        "max-model-len": "512",
        "block-size": "32",
        "blocks": "100",
        "speed": "4.0",
        "generator": "gpt2",
        "seed": "7",
        "mean-output-tokens": "9",
        "grace-period": "5",
    }


def test_workers_and_router_agree_on_what_makes_a_block_key(make_manifest):
    manifest = make_manifest(workers={"replicas": 2}, cache={"blockSize": 8})
    worker, _, router = desired_processes(manifest, ADDRESSES)
    for name in ("block-size", "tokenizer", "profile", "speed"):
        assert flags(worker)[name] == flags(router)[name]


def test_the_router_knows_the_workers_and_its_limits(make_manifest):
    manifest = make_manifest(
        workers={"replicas": 2}, router={"strategy": "least_loaded", "limits": {"maxBodyBytes": 4096}}
    )
    router = desired_processes(manifest, ADDRESSES)[-1]
    assert (router.name, router.role, router.url) == ("demo-router", Role.ROUTER, ADDRESSES.router)
    assert router.listeners == (("--fd", ADDRESSES.router), ("--management-fd", ADDRESSES.management))
    assert router.probe == "http://127.0.0.1:9000/ready"
    assert flags(router)["workers"] == "http://127.0.0.1:1,http://127.0.0.1:2"
    assert (flags(router)["strategy"], flags(router)["max-body-bytes"]) == ("least_loaded", "4096")


def test_the_router_gets_origins_and_paths_of_the_spec(make_manifest):
    plain = flags(desired_processes(make_manifest(workers={"replicas": 2}), ADDRESSES)[-1])
    assert {"cors-origins", "allowed-paths", "max-total-body-bytes"}.isdisjoint(plain)
    router = {
        "corsOrigins": ["https://a.example.com", "http://localhost:3000"],
        "allowedPaths": ["/v1/load_lora_adapter"],
        "limits": {"maxBodyBytes": 4096, "maxTotalBodyBytes": 2048},
    }
    given = flags(desired_processes(make_manifest(workers={"replicas": 2}, router=router), ADDRESSES)[-1])
    assert given["cors-origins"] == "https://a.example.com,http://localhost:3000"
    assert (given["allowed-paths"], given["max-total-body-bytes"]) == ("/v1/load_lora_adapter", "4096")


def test_the_router_gets_its_variables_and_its_access_log(make_manifest):
    secret = {"secretKeyRef": {"name": "s", "key": "k"}}
    env = [{"name": "OTEL_SDK_DISABLED", "value": "true"}, {"name": "IN_A_CLUSTER", "valueFrom": secret}]
    given = {"env": env, "accessLog": {"format": "json", "blocks": True}}
    manifest = make_manifest(workers={"replicas": 2}, model={"env": [{"name": "HF_TOKEN", "value": "t"}]}, router=given)
    worker, _, router = desired_processes(manifest, ADDRESSES)
    assert router.env == {"HF_TOKEN": "t", "OTEL_SDK_DISABLED": "true"}
    assert worker.env == {"HF_TOKEN": "t"}
    assert {"--access-log=json", "--access-log-blocks"} <= set(router.args)
    plain = desired_processes(make_manifest(workers={"replicas": 2}), ADDRESSES)[-1]
    assert not [arg for arg in plain.args if arg.startswith("--access-log")]


def test_engine_args_come_last(make_manifest):
    manifest = make_manifest(workers={"replicas": 2}, engine={"args": ["--dev-mode", "--max-num-seqs=8"]})
    assert desired_processes(manifest, ADDRESSES)[0].args[-2:] == ("--dev-mode", "--max-num-seqs=8")


def test_the_router_gets_the_engines_chat_settings(make_manifest):
    args = ["--chat-template", "/t.jinja", "--default-chat-template-kwargs={}", "--trust-request-chat-template"]
    worker, _, router = desired_processes(make_manifest(workers={"replicas": 2}, engine={"args": args}), ADDRESSES)
    assert worker.args[-4:] == tuple(args)
    assert router.args[-3:] == (
        "--chat-template=/t.jinja", "--default-chat-template-kwargs={}", "--trust-request-chat-template",
    )  # fmt: skip
    settings = RouterSettings.load(router.args)
    assert (settings.chat_template, settings.trust_request_chat_template) == (Path("/t.jinja"), True)


def test_one_address_a_worker(make_manifest):
    with pytest.raises(ValueError, match="2 addresses for 3 workers"):
        desired_processes(make_manifest(workers={"replicas": 3}), ADDRESSES)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"engine": {"type": "vllm"}, "model": {"name": "m"}}, r"spec\.engine\.type: vllm engines need a cluster"),
        ({"workers": {"replicas": 0}}, r"spec\.workers\.replicas: 0 leaves nothing to run"),
    ],
    ids=["vllm", "no workers"],
)
def test_what_a_machine_alone_cannot_run_is_said(make_manifest, spec, message):
    with pytest.raises(LocalModeError, match=message):
        check(make_manifest(**spec))


def test_a_process_that_was_ready_for_long_begins_its_count_of_failures_anew():
    assert failures_in_a_row(0, ready_for=0.0) == 1
    assert failures_in_a_row(7, ready_for=9.9) == 8
    assert failures_in_a_row(7, ready_for=10.0) == 1


def test_exits_are_described_in_words():
    assert describe_exit(3) == "exited with code 3"
    assert describe_exit(-9) == "was killed by SIGKILL"
    assert describe_exit(-63) == "was killed by signal 63"


def test_settings_of_other_processes_do_not_leak_in():
    inherited = {"PATH": "/bin", "WORKER_SPEED": "9", "ROUTER_PORT": "1", "ROUTING_STRATEGY": "x", "HF_HOME": "/hf"}
    assert environment(inherited, {"A": "b"}) == {"PATH": "/bin", "HF_HOME": "/hf", "PYTHONUNBUFFERED": "1", "A": "b"}


ENVOY = dataclasses.replace(ADDRESSES, envoy=EnvoyParts("/bin/envoy", "/run/demo"))


def envoys(make_manifest, **router):
    manifest = make_manifest(workers={"replicas": 2}, router={"dataPlane": "envoy", **router})
    *_, asked, envoy = desired_processes(manifest, ENVOY)
    return asked, envoy, {Path(path).name: json.loads(text) for path, text in envoy.files.items()}


def test_envoy_takes_the_port_of_the_router_which_is_asked_over_a_socket(make_manifest):
    router, envoy, files = envoys(make_manifest)
    settings = RouterSettings.load(router.args)
    assert (settings.mode, settings.picker_port, settings.picker_health_port) == ("picker", -1, -1)
    assert settings.picker_socket == Path("/run/demo/picker.sock")
    assert (settings.envoy_endpoints, settings.envoy_admin) == (
        Path("/run/demo/endpoints.json"), Path("/run/demo/admin.sock"),
    )  # fmt: skip
    assert (router.url, router.listeners) == (ADDRESSES.management, (("--management-fd", ADDRESSES.management),))
    assert (envoy.name, envoy.role, envoy.url, envoy.listeners) == ("demo-envoy", Role.ENVOY, ADDRESSES.router, ())
    assert (envoy.program, envoy.guard) == ("/bin/envoy", Guard.EXECUTABLE)
    (clients,) = files["envoy.json"]["static_resources"]["listeners"]
    assert clients["address"] == {"socket_address": {"address": "127.0.0.1", "port_value": 8000}}
    listed = files["endpoints.json"]["resources"][0]["endpoints"][0]["lb_endpoints"]
    assert [each["endpoint"]["address"]["socket_address"]["port_value"] for each in listed] == [1, 2]


def asking(files):
    (clients,) = files["envoy.json"]["static_resources"]["listeners"]
    filters = clients["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
    return next(each["typed_config"] for each in filters if each["name"] == "picker")


def test_what_the_routers_environment_says_of_keys_and_certificates_holds_for_envoy(make_manifest):
    assert asking(envoys(make_manifest)[2])["failure_mode_allow"]
    keys = {"name": "ROUTER_API_KEYS_FILE", "value": "/etc/keys.json"}
    certificate = {"name": "ROUTER_TLS_CERT_PATH", "value": "/etc/tls"}
    *_, files = envoys(make_manifest, env=[keys, certificate])
    assert not asking(files)["failure_mode_allow"], "without the router nobody knows the keys"
    (clients,) = files["envoy.json"]["static_resources"]["listeners"]
    assert clients["filter_chains"][0]["transport_socket"]["name"] == "envoy.transport_sockets.tls"
    (secret,) = files["certificate.json"]["resources"]
    assert secret["tls_certificate"]["certificate_chain"] == {"filename": "/etc/tls/tls.crt"}


def test_without_envoy_the_message_says_how_to_install_it(make_manifest, monkeypatch):
    manifest = make_manifest(router={"dataPlane": "envoy"})
    check(manifest)
    monkeypatch.setitem(sys.modules, "envoy", None)
    with pytest.raises(LocalModeError, match=r"^spec\.router\.dataPlane: envoy, .*pip install 'kvcluster\[envoy\]'$"):
        check(manifest)
