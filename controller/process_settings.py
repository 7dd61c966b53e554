"""The settings that a manifest implies for its workers and routers, in local mode and in a cluster alike.

Their names are those of the processes' settings, in kebab case. Local mode passes them as flags
(`--max-model-len=4096`), the controller as environment variables (`WORKER_MAX_MODEL_LEN=4096`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from controller.api.flow_control import FlowControl
from controller.api.model import KVClusterSpec
from controller.api.routing import LogForm
from kvcache.profiles import format_latency

Settings = Mapping[str, object]


def worker_settings(spec: KVClusterSpec) -> dict[str, object]:
    """Settings of an emulated worker, except for its name and address."""
    return {
        "model": spec.model_name,
        "served-model-name": ",".join(spec.model.served_names) or None,
        "tokenizer": spec.tokenizer,
        "profile": spec.model.profile,
        "latency": format_latency(spec.model.latency.times()) or None,
        "max-model-len": spec.max_model_len,
        "block-size": spec.cache.block_size,
        "blocks": spec.blocks,
        "data-parallel-size": data_parallel_size(spec),
        "cpu-blocks": spec.cpu_blocks or None,
        "cpu-bandwidth": f"{spec.cpu_bandwidth:g}" if spec.cpu_blocks else None,
        "speed": spec.engine.speed,
        **lora_settings(spec),
        "generator": spec.engine.generator,
        "seed": spec.engine.seed,
        "mean-output-tokens": spec.engine.mean_output_tokens,
        "grace-period": spec.workers.drain_seconds,
    }


def data_parallel_size(spec: KVClusterSpec) -> int | None:
    """The number of a worker's engines; None where there is one, as for every process that is not told otherwise."""
    size = spec.engine.data_parallel.size
    return size if size > 1 else None


def lora_settings(spec: KVClusterSpec) -> dict[str, object]:
    """Settings of an engine, by vLLM's names, that follow from the listed LoRA adapters."""
    listed = spec.model.adapters
    if not listed:
        return {}
    return {
        "enable-lora": True,
        # Up to a power of two, so that not every change of the list restarts the workers.
        "max-loras": spec.engine.max_loras or 1 << (len(listed) - 1).bit_length(),
        "max-lora-rank": max(adapter.rank for adapter in listed),
    }


def adapters_file(spec: KVClusterSpec) -> str:
    """The list of adapters as workers and agents read it (`worker.lora.wanted`)."""
    listed = [{"name": adapter.name, "source": adapter.source} for adapter in spec.model.adapters]
    return json.dumps(listed, indent=1, ensure_ascii=False)


def router_settings(spec: KVClusterSpec) -> dict[str, object]:
    """Settings of a router, except for its addresses and its source of workers."""
    limits, timeouts = spec.router.limits, spec.router.timeouts
    retries, liveness, ejection = spec.router.retries, spec.router.liveness, spec.router.ejection
    total, log = limits.max_total_body_bytes, spec.router.access_log
    return {
        "strategy": spec.router.strategy.value,
        "model": spec.model_name,
        "tokenizer": spec.tokenizer,
        "profile": spec.model.profile,
        "latency": format_latency(spec.model.latency.times()) or None,
        "block-size": spec.cache.block_size,
        "history-blocks": spec.cache.blocks if spec.is_external else None,
        "speed": spec.engine.speed,
        "max-body-bytes": limits.max_body_bytes,
        "max-total-body-bytes": max(total, limits.max_body_bytes) if total is not None else None,
        "cors-origins": ",".join(spec.router.cors_origins) or None,
        "allowed-paths": ",".join(spec.router.allowed_paths) or None,
        "max-header-bytes": limits.max_header_bytes,
        "max-headers": limits.max_headers,
        "max-concurrent-requests": limits.max_concurrent_requests,
        "connect-timeout": timeouts.connect_seconds,
        "answer-timeout": timeouts.answer_seconds,
        "idle-timeout": timeouts.idle_seconds,
        "header-timeout": timeouts.header_seconds,
        "body-timeout": timeouts.body_seconds,
        "write-timeout": timeouts.write_seconds,
        "keep-alive": timeouts.keep_alive_seconds,
        "retry-attempts": retries.attempts,
        "retry-deadline": retries.deadline_seconds,
        "retry-share": retries.share,
        "retry-floor": retries.floor,
        "liveness-timeout": liveness.silence_seconds,
        "stall-timeout": liveness.stall_seconds,
        "cut-timeout": liveness.cut_seconds,
        "view-timeout": liveness.view_seconds,
        "eject-after": ejection.consecutive,
        "eject-rate-gap": ejection.rate_gap,
        "eject-seconds": ejection.first_seconds,
        "eject-longest": ejection.longest_seconds,
        "eject-share": ejection.share,
        "longest-pause": ejection.pause_seconds,
        "session-ttl": spec.router.sessions.ttl_seconds,
        "session-limit": spec.router.sessions.limit,
        "access-log": log.format.value if log.format is not LogForm.OFF else None,
        "access-log-blocks": log.blocks or None,
        "resume-streams": spec.router.resume_streams or None,
        "grace-period": spec.workers.drain_seconds,
        **flow_settings(spec.router.flow_control),
        **chat_settings(spec),
    }


def flow_settings(flow: FlowControl) -> dict[str, object]:
    """Settings of a router about the requests that wait in it."""
    classes = [f"{each.name}={each.priority}:{each.ttl_seconds:.3f}:{each.max_mib}" for each in flow.classes]
    return {
        "flow-control": flow.enabled or None,
        "flow-classes": ",".join(classes) or None,
        "objectives": ",".join(f"{each.name}={each.priority}" for each in flow.objectives) or None,
        "tenant-header": flow.tenant_header,
        "flow-max-bytes": flow.max_mib * 2**20 if flow.max_mib is not None else None,
        "flow-max-requests": flow.max_requests,
        "flow-queue-limit": flow.queue_seconds,
        "flow-overtaken": flow.overtaken_seconds,
        "flow-quantum": flow.quantum_tokens,
    }


CHAT_FLAGS = (
    "chat-template",
    "chat-template-content-format",
    "default-chat-template-kwargs",
    "anthropic-disabled-thinking-effort",
)
CHAT_SWITCHES = ("exclude-tools-when-tool-choice-none", "trust-request-chat-template")
"""Flags in `engine.args` that change how the engine renders chats. Whatever reads its requests has to know them too."""


def chat_settings(spec: KVClusterSpec) -> dict[str, object]:
    """Settings of routers and agents that follow from the engine's own arguments. vLLM accepts `_` for `-` in flags."""
    found: dict[str, object] = {}
    args = spec.engine.args
    for at, argument in enumerate(args):
        flag, equals, value = argument.partition("=")
        if not flag.startswith("--"):
            continue
        name = flag.removeprefix("--").replace("_", "-")
        if name in CHAT_FLAGS and (equals or at + 1 < len(args)):
            found[name] = value if equals else args[at + 1]
        elif name in CHAT_SWITCHES:
            found[name] = True
    return found


def flags(settings: Settings) -> tuple[str, ...]:
    """The settings as command-line flags."""
    return tuple(
        f"--{name}" if value is True else f"--{name}={value}" for name, value in settings.items() if value is not None
    )


def environment(prefix: str, settings: Settings) -> dict[str, str]:
    """The settings as environment variables."""
    return {
        f"{prefix}_{name.upper().replace('-', '_')}": str(value)
        for name, value in settings.items()
        if value is not None
    }
