"""Reading a manifest: what is accepted, the defaults, and the words in which the rest is refused.

Not covered: refusals by an API server (tests/kube/operator/test_bad_input).
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from controller.api.fields import cluster_only_in
from controller.api.load import MAX_BYTES, load_manifest, override, parse_manifest
from controller.api.model import EngineType, KVCluster
from controller.api.problems import ManifestError
from controller.api.routing import Strategy

EXAMPLES = Path(__file__).parents[2] / "examples"
HEAD = "apiVersion: kvcluster.dev/v1alpha1\nkind: KVCluster\nmetadata: {name: demo}\n"


def refused(text: str | bytes) -> list[str]:
    data = text if isinstance(text, bytes) else text.encode()
    with pytest.raises(ManifestError) as caught:
        parse_manifest(data, "bad.yaml")
    head, *problems = str(caught.value).splitlines()
    assert head == "bad.yaml is not a valid KVCluster:"
    assert problems == [f"  {problem}" for problem in caught.value.problems]
    return [problem.strip() for problem in problems]


def parsed(spec: str) -> KVCluster:
    return parse_manifest(f"{HEAD}spec:\n{spec}".encode())


def test_defaults_follow_the_profile():
    manifest = parse_manifest(HEAD.encode())
    spec = manifest.spec
    assert manifest.name == "demo"
    assert (spec.model_name, spec.max_model_len, spec.blocks) == ("meta-llama/Llama-2-13b-hf", 4096, 924)
    assert (spec.workers.replicas, spec.router.strategy, spec.engine.type) == (
        *(1, Strategy.CACHE_AWARE, EngineType.EMULATOR),
    )


def test_a_small_cache_bounds_the_longest_request():
    assert parsed("  cache: {blocks: 10}").spec.max_model_len == 160


# multi-namespace.yaml holds several documents, for kubectl.
SINGLE = [file for file in sorted(EXAMPLES.glob("*.yaml")) if file.stem != "multi-namespace"]


@pytest.mark.parametrize("file", SINGLE, ids=lambda file: file.stem)
def test_examples_are_valid(file: Path):
    load_manifest(file)  # raises for one that is not


def test_examples_are_what_they_promise():
    rag = load_manifest(EXAMPLES / "rag.yaml").spec
    assert (rag.workers.replicas, rag.router.replicas, rag.blocks) == (4, 1, 924)
    trace = load_manifest(EXAMPLES / "conversation-trace.yaml").spec
    assert (trace.workers.replicas, trace.blocks, trace.model.profile) == (8, 27_000, "llama-3.1-8b-h100-80gb")


def test_json_and_standard_input(monkeypatch):
    text = b'{"apiVersion": "kvcluster.dev/v1alpha1", "kind": "KVCluster", "metadata": {"name": "j"}}'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert load_manifest("-").name == "j"


def test_what_a_server_adds_is_left_out_of_account():
    text = HEAD.replace("{name: demo}", "{name: demo, uid: a1, resourceVersion: '7', managedFields: [{manager: x}]}")
    assert parse_manifest(f"{text}status: {{anything: 1}}\n".encode()).name == "demo"


def test_anchors_and_merges_work():
    spec = parsed("  engine:\n    env: [&one {name: A, value: b}, {<<: *one, name: C}]").spec
    assert [(variable.name, variable.value) for variable in spec.engine.env] == [("A", "b"), ("C", "b")]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("  wrokers: {}", "line 5: spec.wrokers: unknown field; did you mean workers? "
                          "(allowed: model, engine, cache, workers, router, autoscaling, monitoring, gateway, network, "
                          "networkPolicy)"),
        ("  cache: {block_size: 16}", "line 5: spec.cache.block_size: unknown field; did you mean blockSize? "
                                      "(allowed: blockSize, blocks)"),
        ("  strategy: cache_aware", "line 5: spec.strategy: unknown field; did you mean spec.router.strategy? "
                                    "(allowed: model, engine, cache, workers, router, autoscaling, monitoring, "
                                    "gateway, network, networkPolicy)"),
        ("  router:\n    strategy: cache-aware",
         f"line 6: spec.router.strategy: must be one of {', '.join(Strategy)}, "
         'not "cache-aware"; did you mean cache_aware?'),
        ("  engine: {type: sglang}", 'line 5: spec.engine.type: must be one of emulator, vllm, external, not "sglang"'),
        ("  model: {profile: llama-3.1-8b-h100}",
         "line 5: spec.model.profile: must be one of llama-2-13b-a100-40gb, llama-3.1-8b-h100-80gb, "
         'llama-3.1-8b-l4-24gb, gpt-oss-20b-h100-80gb, not "llama-3.1-8b-h100"; did you mean llama-3.1-8b-h100-80gb?'),
        ("  cache: {blocks: 0}", "line 5: spec.cache.blocks: must be 1 or more, not 0"),
        ("  cache: {blockSize: 2000}", "line 5: spec.cache.blockSize: must be 1,024 or less, not 2000"),
        ("  cache: {blocks: true}", "line 5: spec.cache.blocks: must be a whole number, not true"),
        ("  workers: {replicas: '4'}", 'line 5: spec.workers.replicas: must be a whole number, not "4"'),
        ("  workers: {replicas: 1.5}", "line 5: spec.workers.replicas: must be a whole number, not 1.5"),
        ("  workers: {replicas: -1}", "line 5: spec.workers.replicas: must be 0 or more, not -1"),
        ("  workers: null", "line 5: spec.workers: must be a mapping, not null"),
        ("  workers: [1]", "line 5: spec.workers: must be a mapping, not a list"),
        ("  workers: {resources: {limits: {cpu: many}}}",
         'line 5: spec.workers.resources.limits.cpu: must be a quantity such as 500m, 2 or 4Gi, not "many"'),
        ("  engine: {speed: 0}", "line 5: spec.engine.speed: must be more than 0, not 0"),
        ("  engine: {speed: .inf}", "line 5: spec.engine.speed: must be a finite number, not Infinity"),
        ("  engine: {speed: fast}", 'line 5: spec.engine.speed: must be a number, not "fast"'),
        ("  engine: {generator: ''}", 'line 5: spec.engine.generator: must not be empty, not ""'),
        ("  engine: {args: --seed}", 'line 5: spec.engine.args: must be a list, not "--seed"'),
        ("  engine: {args: [--dev-mode, --speed=2]}",
         'line 5: spec.engine.args[1]: "--speed=2": --speed is set by spec.engine.speed: use that field'),
        ("  engine: {args: [--port, '80']}",
         'line 5: spec.engine.args[0]: "--port": --port belongs to KVCluster: remove it'),
        pytest.param(
            "  router:\n    flowControl:\n      classes:\n        - {name: a, priority: 1}\n"
            "        - {name: b, priority: 1}",
            "line 9: spec.router.flowControl.classes[1].priority: 1: is that of another class: change one of the two",
            id="two classes of one priority"),
        ("  engine:\n    env:\n      - {name: A}\n      - {name: A, value: b}",
         'line 8: spec.engine.env[1].name: "A": is given twice: remove one of the two'),
        ("  engine: {env: [{name: A B}]}",
         'line 5: spec.engine.env[0].name: must match ^[A-Za-z_][A-Za-z0-9_]*$, not "A B"'),
        ("  engine: {env: [{value: a}]}", "line 5: spec.engine.env[0].name: is required"),
        ("  engine: {env: [{name: A, value: 3}]}",
         "line 5: spec.engine.env[0].value: must be a string (put it in quotes), not 3"),
        ("  model: {maxModelLen: 5000}",
         "line 5: spec.model.maxModelLen: 5000: profile llama-2-13b-a100-40gb handles at most 4096 tokens: "
         "lower maxModelLen, or choose another spec.model.profile"),
        ("  model: {maxModelLen: 1000}\n  cache: {blocks: 60}",
         "line 5: spec.model.maxModelLen: 1000: needs 63 blocks of 16 tokens, but the cache has 60 (960 tokens): "
         "set spec.cache.blocks to 63 or more, or spec.model.maxModelLen to 960 or less"),
        ("  engine: {type: vllm}",
         "line 4: spec.model.name: engine type vllm needs a Hugging Face id or a path to load"),
        ("  model: {name: facebook/opt-125m}\n  engine: {type: vllm, speed: 2}",
         "line 6: spec.engine.speed: 2: means something to the emulator alone: remove it for engine type vllm"),
        ("  engine: {cpuCache: {size: 12Mi}}",
         'line 5: spec.engine.cpuCache.size: "12Mi": a block takes 13,107,200 bytes: give it more, such as 32Gi'),
        ("  engine: {cpuCache: {size: 1Gi}, args: [--kv_transfer_config=x]}",
         'line 5: spec.engine.args[0]: "--kv_transfer_config=x": spec.engine.cpuCache sets this flag: remove one of '
         "the two"),
        ("  workers: {volumes: [{name: tmp, emptyDir: {}}]}",
         'line 5: spec.workers.volumes[0].name: "tmp": is the name of another volume, the pods\' own: call yours '
         "otherwise"),
        ("  model: {volumes: [{name: a}]}\n  workers: {volumes: [{name: b}, {name: a}]}",
         'line 6: spec.workers.volumes[1].name: "a": is the name of another volume, spec.model.volumes[0].name: rename '
         "one of the two"),
        ("  workers: {nodeSelector: {1: a}}",
         "line 5: spec.workers.nodeSelector[1]: a key must be a string (put it in quotes), not 1"),
        (f"  cache: {{blocks: 0x{'f' * 4000}}}",
         "line 5: spec.cache.blocks: must be 100,000,000 or less, not a number of 16000 bits"),
        ("  workers:\n    replicas: 1\n    replicas: 2",
         "line 7: spec.workers.replicas: is given twice (first on line 6): remove one of the two"),
    ],
)  # fmt: skip
def test_a_bad_spec_is_refused_with_line_path_value_and_what_is_allowed(spec: str, expected: str):
    assert refused(f"{HEAD}spec:\n{spec}\n") == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["is empty"]),
        ("# nothing\n---\n", ["is empty"]),
        ("just words", ['must be a mapping with apiVersion, kind, metadata and spec, not "just words"']),
        ("- a", ["must be a mapping with apiVersion, kind, metadata and spec, not a list"]),
        ("a: [b", ["line 1: is not YAML: while parsing a flow sequence expected ',' or ']', but got '<stream end>'"]),
        ("a: !!python/object:os.system {}",
         ["line 1: is not YAML: could not determine a constructor for the tag "
          "'tag:yaml.org,2002:python/object:os.system'"]),
        ("a: \x00", ["is not YAML: unacceptable character #x0000: special characters are not allowed in "
                     '"<unicode string>", position 3']),
        ("a: 2024-13-45", ["is not YAML: month must be in 1..12"]),
        (b"a: \xff", ["is not UTF-8 text: invalid start byte at byte 3"]),
        (b"#" * (MAX_BYTES + 1), ["is larger than 1,048,576 bytes"]),
        ("[" * 5_000, ["is nested too deeply"]),
        (f"{HEAD}---\n{HEAD}", ["line 5: holds 2 documents: put each KVCluster into a file of its own"]),
        ("apiVersion: apps/v1\nkind: Deployment\nspec: {x: 1}",
         ['line 1: apiVersion: must be kvcluster.dev/v1alpha1, not "apps/v1"',
          'line 2: kind: must be KVCluster, not "Deployment"']),
        ("kind: KVCluster", ["apiVersion: must be kvcluster.dev/v1alpha1, not null"]),
        ("apiVersion: kvcluster.dev/v1alpha1\nkind: KVCluster", ["metadata: is required"]),
        (HEAD.replace("demo", "Demo_1"),
         ['line 3: metadata.name: must match ^[a-z]([-a-z0-9]*[a-z0-9])?$, not "Demo_1"']),
        (HEAD.replace("demo", "no"), ["line 3: metadata.name: must be a string (put it in quotes), not false"]),
        (HEAD.replace("demo", "x" * 46),
         [f'line 3: metadata.name: must have at most 45 characters, not "{"x" * 46}"']),
        ("a: &a [*a]", ["line 1: a[0]: contains itself through an alias"]),
        ("a: &a [1,1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
         "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*d,*d,*d,*d,*d,*d,*d,*d,*d]\n",
         ["stands for more than 100,000 values"]),
    ],
    ids=[
        "nothing", "comments", "words", "a list", "no YAML", "a tag", "a control character", "no date", "no UTF-8",
        "too large", "too deep", "two documents", "another kind", "no apiVersion", "no metadata", "a wrong name",
        "a name that is no string", "a long name", "an alias of itself", "too many values",
    ],
)  # fmt: skip
def test_a_file_that_is_no_manifest_is_refused(text: str | bytes, expected: list[str]):
    assert refused(text) == expected


def test_all_problems_are_reported_together():
    assert len(refused(f"{HEAD}spec: {{cache: {{blocks: -1}}, workers: {{replicas: x}}, foo: 1}}")) == 3


@pytest.mark.parametrize(
    ("spec", "broken"),
    [
        ("  wrokers: {}\n  engine: {type: vllm}", "line 4: spec.model.name: engine type vllm needs"),
        ("  autoscaling: {min: 5, max: 2, mxa: 3}", "line 5: spec.autoscaling.min: 5: must not exceed max (2)"),
        ("  engine: {args: [--port=1], agrs: []}", 'line 5: spec.engine.args[0]: "--port=1": --port belongs to'),
        ("  cache: {blocks: 1, odd: 1}\n  model: {maxModelLen: 100, even: 2}", "spec.model.maxModelLen: 100: needs"),
    ],
)
def test_a_broken_rule_is_reported_beside_an_unknown_field(spec: str, broken: str):
    problems = refused(f"{HEAD}spec:\n{spec}")
    assert any("unknown field" in problem for problem in problems), problems
    assert sum(broken in problem for problem in problems) == 1, problems


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ManifestError, match="cannot be read: No such file or directory"):
        load_manifest(tmp_path / "none.yaml")
    with pytest.raises(ManifestError, match="cannot be read: Is a directory"):
        load_manifest(tmp_path)


def test_overrides_are_checked_like_the_manifest():
    manifest = parse_manifest(HEAD.encode())
    changed = override(manifest, {("spec", "router", "strategy"): "round_robin", ("spec", "engine", "speed"): 5.0}, "x")
    assert (changed.spec.router.strategy, changed.spec.engine.speed) == (Strategy.ROUND_ROBIN, 5.0)
    assert manifest.spec.router.strategy is Strategy.CACHE_AWARE
    with pytest.raises(ManifestError, match=r"spec\.router\.strategy: must be one of .*; did you mean"):
        override(manifest, {("spec", "router", "strategy"): "roundrobin"}, "demo with --strategy")


def test_fields_only_a_cluster_honours_are_found_where_they_are_set():
    manifest = parsed(
        "  workers: {nodeSelector: {gpu: a100}, tolerations: []}\n"
        "  router: {replicas: 2, resources: {requests: {cpu: 2, memory: 1Gi}}, service: {type: ClusterIP}}"
    )
    assert cluster_only_in(manifest) == [
        *("spec.workers.nodeSelector", "spec.router.resources", "spec.router.replicas"),
    ]


def test_variables_from_a_cluster_are_named_as_what_only_a_cluster_honours():
    spec = "  engine: {env: [{name: A, value: b}, {name: TOKEN, valueFrom: {secretKeyRef: {name: s, key: k}}}]}"
    assert cluster_only_in(parsed(spec)) == ["spec.engine.env[1].valueFrom"]


def test_what_only_a_cluster_honours_is_named_whole():
    found = cluster_only_in(load_manifest(EXAMPLES / "autoscaled.yaml"))
    assert "spec.autoscaling" in found
