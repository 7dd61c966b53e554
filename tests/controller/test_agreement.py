"""The manifest's settings are those that workers and routers take, though the controller does not import them.

Not covered: what the processes do with their settings (tests/worker, tests/router).
"""

from __future__ import annotations

import pytest

from controller.api.flags import RESERVED_FLAGS
from controller.api.model import KVCluster
from controller.api.routing import Ejection, Limits, Liveness, Retries, Sessions, Strategy, Timeouts
from controller.local.desired_processes import Addresses, desired_processes
from kvcluster.commands.simulate import flow_of
from router.core.flow import FlowClass, FlowPolicy
from router.core.strategies import STRATEGIES
from router.settings import Settings as RouterSettings
from worker.settings import Settings as WorkerSettings

ADDRESSES = Addresses(("http://127.0.0.1:1", "http://127.0.0.1:2"), "http://127.0.0.1:8000", "http://127.0.0.1:9000")


@pytest.fixture
def manifest(make_manifest) -> KVCluster:
    return make_manifest(
        model={"name": "m", "maxModelLen": 512},
        engine={"speed": 2.5, "seed": 7, "meanOutputTokens": 9, "args": ["--dev-mode"]},
        cache={"blockSize": 32, "blocks": 100},
        workers={"replicas": 2, "drainSeconds": 5},
        router={
            "strategy": "least_loaded",
            "limits": {"maxConcurrentRequests": 77},
            "resumeStreams": True,
            "accessLog": {"format": "json", "blocks": True},
        },
    )


def test_strategies_are_the_routers():
    assert {strategy.value for strategy in Strategy} == set(STRATEGIES)


def test_a_worker_understands_its_command_line(manifest):
    plan = desired_processes(manifest, ADDRESSES)[1]
    settings = WorkerSettings.load([*plan.args, "--fd=5"])
    assert (settings.worker_id, settings.advertise_url, settings.fd) == ("demo-worker-1", "http://127.0.0.1:2", 5)
    assert (settings.served_model, settings.usable_blocks, settings.block_size) == ("m", 100, 32)
    assert (settings.model_len(), settings.speed, settings.seed) == (512, 2.5, 7)
    assert (settings.mean_output_tokens, settings.grace_period, settings.dev_mode) == (9, 5.0, True)


def test_a_worker_of_several_engines_is_told_their_number(make_manifest):
    manifest = make_manifest(engine={"dataParallel": {"size": 3}}, workers={"replicas": 2})
    assert WorkerSettings.load([*desired_processes(manifest, ADDRESSES)[0].args, "--fd=5"]).data_parallel_size == 3


@pytest.mark.parametrize(
    ("cache", "blocks", "seconds"),
    [
        pytest.param({"size": "12Gi"}, 983, 13_107_200 / 25.2e9, id="the profile's bandwidth"),
        pytest.param({"size": "13108M", "bandwidth": "10G"}, 1000, 13_107_200 / 10e9, id="a given bandwidth"),
    ],
)
def test_a_worker_is_told_its_cpu_cache_in_blocks(make_manifest, cache, blocks, seconds):
    manifest = make_manifest(engine={"cpuCache": cache}, workers={"replicas": 2})
    settings = WorkerSettings.load([*desired_processes(manifest, ADDRESSES)[0].args, "--fd=5"])
    assert settings.cpu_blocks == blocks
    assert settings.cpu_block_seconds == pytest.approx(seconds)


def test_a_router_understands_its_command_line(manifest):
    plan = desired_processes(manifest, ADDRESSES)[-1]
    settings = RouterSettings.load([*plan.args, "--fd=5", "--management-fd=6"])
    assert (settings.workers, settings.strategy) == (ADDRESSES.workers, "least_loaded")
    assert (settings.model, settings.block_size, settings.speed) == ("m", 32, 2.5)
    assert (settings.max_concurrent_requests, settings.fd, settings.management_fd) == (77, 5, 6)
    assert settings.resume_streams
    assert (settings.access_log, settings.access_log_blocks) == ("json", True)


def test_a_router_takes_every_time_limit_of_the_spec(make_manifest):
    shares = {"share", "rate_gap"}
    router: dict[str, dict[str, float]] = {
        part: {info.alias or name: 1 if name in shares else 7 for name, info in model.model_fields.items()}
        for part, model in (
            *(("timeouts", Timeouts), ("retries", Retries), ("liveness", Liveness), ("ejection", Ejection)),
            ("sessions", Sessions),
        )
    }
    plan = desired_processes(make_manifest(workers={"replicas": 2}, router=router), ADDRESSES)[-1]
    changed = {
        name
        for name, value in RouterSettings.load([*plan.args, "--fd=5", "--management-fd=6"])
        if value != getattr(RouterSettings.load([]), name)
        and (value == 7 or name in {"retry_share", "eject_share", "eject_rate_gap"})
    }
    assert len(changed) == sum(map(len, router.values())), changed


def test_a_worker_answers_to_every_served_name(make_manifest):
    manifest = make_manifest(model={"name": "/models/llama", "servedNames": ["llama", "default"]})
    plan = desired_processes(manifest, Addresses(ADDRESSES.workers[:1], ADDRESSES.router, ADDRESSES.management))[0]
    settings = WorkerSettings.load([*plan.args, "--fd=5"])
    assert (settings.served_model, settings.served_models) == ("llama", ("llama", "default"))


def test_limits_default_to_the_routers_own():
    settings, limits = RouterSettings.load([]), Limits()
    for name in Limits.model_fields:
        assert getattr(limits, name) == getattr(settings, name), name


def test_defaults_are_the_workers_own(make_manifest):
    spec, settings = make_manifest().spec, WorkerSettings.load([])
    assert (spec.blocks, spec.max_model_len, spec.model_name) == (
        *(settings.usable_blocks, settings.model_len(), settings.served_model),
    )
    assert (spec.engine.mean_output_tokens, spec.engine.seed, spec.engine.generator) == (
        *(settings.mean_output_tokens, settings.seed, settings.generator),
    )
    assert (spec.tokenizer, spec.model.profile) == (settings.tokenizer, settings.profile)


FLOW_CONTROL = {
    "enabled": True,
    "classes": [{"name": "chat", "priority": 10, "ttlSeconds": 2.5, "maxMib": 4}, {"name": "batch", "priority": -3}],
    "objectives": [{"name": "interactive", "priority": 10}],
    "tenantHeader": "x-team",
    "maxMib": 8,
    "maxRequests": 9,
    "queueSeconds": 0.5,
    "overtakenSeconds": 0,
    "quantumTokens": 77,
}


def test_flow_control_is_the_same_in_routers_and_in_the_simulator(make_manifest):
    manifest = make_manifest(workers={"replicas": 2}, router={"flowControl": FLOW_CONTROL})
    settings = RouterSettings.load([*desired_processes(manifest, ADDRESSES)[-1].args, "--fd=5", "--management-fd=6"])
    chat, batch = FlowClass("chat", 10, 2.5, 4 * 2**20), FlowClass("batch", -3, 30.0, 128 * 2**20)
    assert settings.flow_control
    assert settings.flow_policy == FlowPolicy((chat, batch), 8 * 2**20, 9, 0.5, 77, 0.0)
    assert (settings.objectives, settings.tenant_header) == ((("interactive", 10),), "x-team")
    assert flow_of(manifest.spec.router.flow_control) == settings.flow_policy


def test_without_flow_control_neither_has_any_and_its_defaults_are_the_same(make_manifest):
    manifest = make_manifest(workers={"replicas": 2})
    args = [*desired_processes(manifest, ADDRESSES)[-1].args, "--fd=5", "--management-fd=6"]
    assert not RouterSettings.load(args).queues
    settings = RouterSettings.load([*args, "--flow-control"])
    assert flow_of(manifest.spec.router.flow_control) is None
    assert flow_of(manifest.spec.router.flow_control, enabled=True) == settings.flow_policy == FlowPolicy()


def test_reserved_flags_exist():
    known = {f"--{name.replace('_', '-')}" for name in WorkerSettings.model_fields}
    # vLLM's names for --blocks, --grace-period, --data-parallel-size and --cpu-blocks.
    offloading = {"--kv-offloading-size", "--kv-offloading-backend"}
    assert set(RESERVED_FLAGS) - known == {"--num-gpu-blocks-override", "--shutdown-timeout", "-dp", *offloading}
