"""Flags and environment variables of an engine that a manifest may not set, and what to set instead."""

from __future__ import annotations

import re
from collections.abc import Mapping

RESERVED_FLAGS: Mapping[str, str] = {
    "--model": "spec.model.name",
    "--served-model-name": "spec.model.servedNames",
    "--tokenizer": "spec.model.tokenizer",
    "--profile": "spec.model.profile",
    "--latency": "spec.model.latency",
    "--max-model-len": "spec.model.maxModelLen",
    "--block-size": "spec.cache.blockSize",
    "--blocks": "spec.cache.blocks",
    "--num-gpu-blocks-override": "spec.cache.blocks",
    "--data-parallel-size": "spec.engine.dataParallel.size",
    "-dp": "spec.engine.dataParallel.size",
    "--cpu-blocks": "spec.engine.cpuCache.size",
    "--cpu-bandwidth": "spec.engine.cpuCache.bandwidth",
    "--kv-offloading-size": "spec.engine.cpuCache.size",
    "--kv-offloading-backend": "spec.engine.cpuCache",
    "--speed": "spec.engine.speed",
    "--generator": "spec.engine.generator",
    "--seed": "spec.engine.seed",
    "--mean-output-tokens": "spec.engine.meanOutputTokens",
    "--enable-lora": "spec.model.adapters",
    "--lora-modules": "spec.model.adapters",
    "--max-lora-rank": "spec.model.adapters[].rank",
    "--max-loras": "spec.engine.maxLoras",
    "--grace-period": "spec.workers.drainSeconds",
    "--shutdown-timeout": "spec.workers.drainSeconds",
}
"""Flags that a field of the manifest sets; `engine.args` may not set them a second time."""

OWNED_FLAGS = (
    "--host",
    "--port",
    "--fd",
    "--uds",
    "--worker-id",
    "--advertise-url",
    "--kv-events-config",
    "--adapters-file",
)
"""Flags that belong to KVCluster itself."""

_NO_KEY = (
    "routers, agents and probes ask the engine without a key, at the root: check keys and rewrite paths in front of "
    "the routers"
)

REFUSED_FLAGS: Mapping[tuple[str, ...], str] = {
    ("--data-parallel-*", "-dp*", "--headless", "--nnodes"): "all engines of a worker are in one pod, behind one "
    "port: set spec.engine.dataParallel.size, or raise spec.workers.replicas instead",
    ("--no-enable-prefix-caching",): "requests are routed by what the engines' prefix caches hold: remove it",
    (
        "--ssl-*",
        "--enable-ssl-refresh",
    ): "routers and probes speak plain HTTP to workers: terminate TLS at the routers "
    "(spec.router.tls), or in front of them (spec.router.ingress, spec.router.httpRoute)",
    ("--api-key", "--root-path"): _NO_KEY,
    ("--disable-log-stats", "--no-enable-prompt-tokens-details"): "queues and hit rates are read from what this "
    "turns off: remove it",
    ("--config",): "a file could set any of the flags that are refused: write its flags into spec.engine.args",
}
"""Flags with which the engine would run, but not the cluster -> why, and what to do. `*` stands for any ending."""

REFUSED_VARIABLES: Mapping[str, str] = {"VLLM_API_KEY": _NO_KEY}
"""Environment variables that do what a refused flag does -> why, and what to do."""

OWNED_VARIABLES = (
    "VLLM_HOST_IP",
    *(f"{who}_{what}" for who in ("WORKER", "AGENT", "ROUTER") for what in ("WORKER_ID", "HOST", "PORT", "FD")),
)
"""Our own environment variables in each pod. A second one of the same name would win, or be refused by Kubernetes."""


def pattern(*flags: str) -> str:
    """A regular expression, of Python and of RE2 alike, for arguments that set one of these flags: `--flag`,
    `--flag=value` and `--flag.key=value`, as vLLM takes parts of a JSON value. vLLM takes `_` for `-` too; here
    any character is, as an API server counts the expression's length."""
    exact = [flag[1:].replace("-", ".") for flag in flags if not flag.endswith("*")]
    begin = [flag[1:-1].replace("-", ".") for flag in flags if flag.endswith("*")]
    return f"^-({'|'.join([*begin, *([f'({chr(124).join(exact)})([=.]|$)'] if exact else [])])})"


def flag_problem(argument: str) -> str | None:
    """What is wrong with an argument of the engine, and what to do; None for one that is fine."""
    flag = re.split(r"[=.]", argument, maxsplit=1)[0]
    for reserved, field in RESERVED_FLAGS.items():
        if re.match(pattern(reserved), argument):
            return f"{flag} is set by {field}: use that field"
    if re.match(pattern(*OWNED_FLAGS), argument):
        return f"{flag} belongs to KVCluster: remove it"
    for flags, why in REFUSED_FLAGS.items():
        if re.match(pattern(*flags), argument):
            return f"{flag}: {why}"
    return None


def variable_problem(name: str) -> str | None:
    """What is wrong with setting this environment variable, and what to do; None for one that is fine."""
    if name in OWNED_VARIABLES:
        return f"{name} belongs to KVCluster: remove it"
    if (why := REFUSED_VARIABLES.get(name)) is not None:
        return f"{name}: {why}"
    return None
