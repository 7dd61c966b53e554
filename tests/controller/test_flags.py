"""Engine flags and variables that would break a cluster are refused, however they are written, with what to do instead.

Not covered: the same rules in the API server's language (test_crd, tests/kube/operator/test_bad_input).
"""

from __future__ import annotations

import re

import pytest

from controller.api.flags import OWNED_FLAGS, REFUSED_FLAGS, RESERVED_FLAGS, flag_problem, pattern, variable_problem
from controller.api.load import validate_manifest
from controller.api.problems import ManifestError

REFUSED = [
    ("--data-parallel-size=2", "set by spec.engine.dataParallel.size"),
    ("--data_parallel_size", "set by spec.engine.dataParallel.size"),
    ("-dp=4", "set by spec.engine.dataParallel.size"),
    ("-dpn", "set spec.engine.dataParallel.size, or raise spec.workers.replicas"),
    ("--data-parallel-size-local=1", "set spec.engine.dataParallel.size"),
    ("--data-parallel-external-lb", "set spec.engine.dataParallel.size"),
    ("--kv-offloading-size=4", "spec.engine.cpuCache.size"),
    ("--no-enable-prefix-caching", "remove it"),
    ("--ssl-keyfile=/tls/key", "spec.router.ingress"),
    ("--ssl_certfile", "spec.router.ingress"),
    ("--api-key=secret", "in front of the routers"),
    ("--disable-log-stats", "remove it"),
    ("--config=vllm.yaml", "spec.engine.args"),
    ("--uds=/tmp/socket", "remove it"),
    ("--kv-events-config.publisher=null", "remove it"),
    ("--served-model-name", "spec.model.servedNames"),
    ("--max_model_len=9", "spec.model.maxModelLen"),
    ("--shutdown-timeout=9", "spec.workers.drainSeconds"),
]
TAKEN = [
    "--enable-prefix-caching", "--data", "-d", "--tensor-parallel-size=2", "--kv-transfer-config={}", "--modelx",
    "--speculative-config.model=x", "--chat-template=/x.jinja", "x--model", "--configure",
]  # fmt: skip


@pytest.mark.parametrize(("argument", "remedy"), REFUSED)
def test_it_is_refused_by_name_with_a_remedy(argument: str, remedy: str):
    found = flag_problem(argument)
    assert found is not None
    assert found.startswith(re.split("[=.]", argument)[0])
    assert remedy in found
    spec = {"engine": {"args": ["--x", argument]}}
    head = {"apiVersion": "kvcluster.dev/v1alpha1", "kind": "KVCluster", "metadata": {"name": "rag"}}
    with pytest.raises(ManifestError, match=r"spec\.engine\.args\[1\]"):
        validate_manifest({**head, "spec": spec})


@pytest.mark.parametrize("argument", TAKEN)
def test_others_are_taken(argument: str):
    assert flag_problem(argument) is None


def test_every_flag_of_the_tables_is_refused():
    for flag in (*RESERVED_FLAGS, *OWNED_FLAGS, *(flag for flags in REFUSED_FLAGS for flag in flags)):
        plain = flag.removesuffix("*")
        assert flag_problem(plain) is not None, flag
        assert re.match(pattern(flag), f"{plain}=1")


@pytest.mark.parametrize("part", ["engine", "model", "router"])
@pytest.mark.parametrize(
    ("variable", "remedy"),
    [("VLLM_API_KEY", "in front of the routers"), ("VLLM_HOST_IP", "remove it"), ("WORKER_WORKER_ID", "remove it")],
)
def test_variables_that_do_the_same_are_refused_too_whatever_their_value(part: str, variable: str, remedy: str):
    head = {"apiVersion": "kvcluster.dev/v1alpha1", "kind": "KVCluster", "metadata": {"name": "rag"}}
    secret = {"name": variable, "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}
    with pytest.raises(ManifestError, match=rf"spec\.{part}\.env\[1\]\.name: .*{variable}.*{remedy}"):
        validate_manifest({**head, "spec": {part: {"env": [{"name": "HF_TOKEN"}, secret]}}})
    assert variable_problem("VLLM_LOGGING_LEVEL") is None
