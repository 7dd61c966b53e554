"""Workload files: what they generate, by their own words, and how a bad one is refused.

Not covered: the built-in workloads that a part can name (test_workloads.py) and arrival processes (test_arrivals.py).
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import fmean, median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from bench.workloads import TimedRequest, WorkloadError, WorkloadSpec, build_workload
from bench.workloads.distributions import Distribution
from kvcache.tokens.tokenizer import load_tokenizer

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "workloads").glob("*.yaml"))
HEAD = "requests: 400\nrate: 20\nparts:\n"


def requests(folder: Path, text: str, **more: object) -> list[TimedRequest]:
    file = folder / "mine.yaml"
    file.write_text(text)
    return list(build_workload(WorkloadSpec(str(file), **more)).requests())


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_generates_ordered_requests_at_its_rate(file: Path) -> None:
    workload = build_workload(WorkloadSpec(str(file), limit=500))
    found = list(workload.requests())
    assert found == list(workload.requests())
    assert found != list(build_workload(WorkloadSpec(str(file), limit=500, seed=1)).requests())
    assert [r.index for r in found] == list(range(500))
    assert all(before.at <= after.at for before, after in pairwise(found))
    assert 500 / found[-1].at == pytest.approx(workload.config["rate"], rel=0.35)
    assert workload.name == file.stem


def test_parts_come_in_proportion_to_their_weights(tmp_path: Path) -> None:
    text = HEAD + (
        "  - {name: long, weight: 3, prompt: 100, output: 1}\n"
        "  - {name: turns, weight: 1, prompt: 10, output: 2, sessions: {turns: 4, pause: 1}}\n"
    )
    counts = Counter(r.max_tokens for r in requests(tmp_path, text, limit=8000))
    assert counts[1] / 8000 == pytest.approx(0.75, abs=0.03)


def test_prefixes_are_shared_and_the_rest_is_not(tmp_path: Path) -> None:
    text = HEAD + (
        "  - name: a\n    prefixes: [{tokens: 20}, {tokens: 30, pool: 4, zipf: 2}]\n"
        "    prompt: {distribution: uniform, min: 5, max: 9}\n"
    )
    prompts = [r.body["prompt"] for r in requests(tmp_path, text)]
    assert len({tuple(prompt[:20]) for prompt in prompts}) == 1
    documents = Counter(tuple(prompt[20:50]) for prompt in prompts)
    assert len(documents) == 4
    # Zipf with exponent 2: of four, the first has 1 / (1 + 1/4 + 1/9 + 1/16) of the requests.
    assert documents.most_common(1)[0][1] / 400 == pytest.approx(0.70, abs=0.1)
    assert len({tuple(prompt[50:]) for prompt in prompts}) == 400
    assert {len(prompt) for prompt in prompts} == set(range(55, 60))


def test_each_turn_repeats_its_session(tmp_path: Path) -> None:
    text = HEAD + (
        "  - name: a\n    prefixes: [{tokens: 8}]\n    prompt: 5\n    output: 3\n"
        "    sessions: {turns: 3, pause: {distribution: exponential, mean: 2}}\n"
    )
    found = requests(tmp_path, text)
    assert {len(r.body["prompt"]) for r in found} == {13, 21, 29}
    by_prefix = {tuple(r.body["prompt"]): r for r in found}
    for request in found:
        prompt = request.body["prompt"]
        if len(prompt) > 13 and (before := by_prefix.get(tuple(prompt[:-8]))) is not None:
            assert before.at <= request.at
    later = [r for r in found[-100:] if len(r.body["prompt"]) > 13]
    assert all(tuple(r.body["prompt"][:-8]) in by_prefix for r in later)
    # The rate is steady from the start: sessions had begun before it.
    assert len([r for r in found if r.at < found[-1].at / 2]) / 400 == pytest.approx(0.5, abs=0.15)


def test_a_session_ends_when_the_context_is_full(tmp_path: Path) -> None:
    text = HEAD + "  - {name: a, prompt: 50, output: 10, sessions: {turns: 30, pause: 1}}\n"
    longest = max(len(r.body["prompt"]) + r.max_tokens for r in requests(tmp_path, text, context=500))
    assert 400 < longest <= 500


def test_options_override_the_file(tmp_path: Path) -> None:
    text = HEAD + "  - {name: a, prompt: 5}\n"
    found = requests(tmp_path, text, limit=300, rate=100.0)
    assert len(found) == 300
    assert 300 / found[-1].at == pytest.approx(100, rel=0.3)


def test_as_text_prompts_have_as_many_tokens_and_share_as_much(tmp_path: Path) -> None:
    text = HEAD + "  - {name: a, prefixes: [{tokens: 64, pool: 2}], prompt: 40}\n"
    ids = requests(tmp_path, text, limit=30)
    words = requests(tmp_path, text, limit=30, as_text=True)
    tokenizer = load_tokenizer("gpt2")
    read = [tokenizer.encode(request.body["prompt"]) for request in words]
    assert [len(tokens) for tokens in read] == [len(request.body["prompt"]) for request in ids]
    assert len({tuple(tokens[:64]) for tokens in read}) == len({tuple(r.body["prompt"][:64]) for r in ids}) == 2
    assert len({tuple(tokens[64:]) for tokens in read}) == 30
    assert [request.at for request in words] == [request.at for request in ids]


TYPE: TypeAdapter[Distribution] = TypeAdapter(Distribution)


@pytest.mark.parametrize(
    ("fields", "middle", "average"),
    [
        (7, 7, 7),
        ({"distribution": "uniform", "min": 10, "max": 30}, 20, 20),
        ({"distribution": "normal", "mean": 50, "sd": 5}, 50, 50),
        ({"distribution": "lognormal", "median": 100, "sigma": 0.5}, 100, 113.3),
        ({"distribution": "exponential", "mean": 40}, 27.7, 40),
        ({"distribution": "geometric", "mean": 5}, 4, 5),
        ({"distribution": "choice", "values": [1, 10], "weights": [1, 3]}, 10, 7.75),
        ({"distribution": "constant", "value": 3}, 3, 3),
    ],
    ids=["number", "uniform", "normal", "lognormal", "exponential", "geometric", "choice", "constant"],
)
def test_a_distribution_has_its_mean_and_median(fields: object, middle: float, average: float) -> None:
    distribution, random = TYPE.validate_python(fields), Random(1)
    drawn = [distribution.draw(random) for _ in range(8000)]
    assert median(drawn) == pytest.approx(middle, rel=0.07)
    assert fmean(drawn) == pytest.approx(average, rel=0.05)


@settings(max_examples=30)
@given(st.sampled_from(["normal", "lognormal", "exponential"]), st.integers(0, 9), st.integers(0, 50), st.integers())
def test_bounds_hold(kind: str, low: int, more: int, seed: int) -> None:
    shape = {
        "normal": {"mean": 20, "sd": 30},
        "lognormal": {"median": 20, "sigma": 2},
        "exponential": {"mean": 20},
    }[kind]
    distribution = TYPE.validate_python({"distribution": kind, "min": low, "max": low + more, **shape})
    random = Random(seed)
    assert all(low <= distribution.draw(random) <= low + more for _ in range(50))


BAD = """requests: 12
rate: -1
arrivals: {process: poisson, cv: 3}
parts:
  - name: a
    weight: heavy
    prompt: {distribution: lognormal, median: 0, sigmma: 0.6}
  - name: b
    workload: ragg
    output: 3
  - name: c
    output: {distribution: triangle}
"""


def test_every_problem_is_named_with_its_line_and_field(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError) as refused:
        requests(tmp_path, BAD)
    said = str(refused.value).replace(f"{tmp_path}/mine.yaml, ", "").splitlines()
    for begins in (
        "line 2, rate: input should be greater than 0",
        "line 3, arrivals: a CV is for gamma arrivals",
        "line 6, parts[0].weight: input should be a valid number",
        "line 7, parts[0].prompt.median: input should be greater than 0",
        "line 7, parts[0].prompt.sigma: field required",
        "line 7, parts[0].prompt.sigmma: there is no such field",
        "line 9, parts[1].workload: input should be 'rag', 'chat'",
        "line 10, parts[1].output: there is no such field",
        "line 11, parts[2].prompt: field required",
        "line 12, parts[2].output: it must be a number, or a mapping whose distribution is constant",
    ):
        assert sum(line.startswith(begins) for line in said) == 1, (begins, said)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "line 1: it is not YAML"),
        ("- 1", "line 1: a workload is a mapping"),
        ("", "line 1: a workload is a mapping"),
        ("requests: &a 3\nrate: *a", "aliases"),
        ("requests: 3\nrate: 1\nparts: []\n", "line 3, parts: there must be at least one"),
        (HEAD + 2 * "  - {name: a, prompt: 1}\n", "two parts have the name 'a'"),
        (HEAD + "  - {name: a, prompt: {distribution: uniform, min: 3, max: 1}}\n", "min .3. is above max .1."),
        (HEAD + "  - {name: a, prompt: {distribution: choice, values: [1, 2], weights: [1]}}\n", "2 values take"),
        ("#" * 2**20 + "\n", "larger than 1 MiB"),
    ],
    ids=["no YAML", "a list", "empty", "aliases", "no parts", "same name", "bounds", "weights", "too large"],
)
def test_what_is_no_workload_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        requests(tmp_path, text)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="cannot read the workload"):
        build_workload(WorkloadSpec(str(tmp_path / "none.yaml")))
