"""The workloads: the same requests for the same seed, what their prompts share, and which parameters are refused.

Not covered: what the workloads do to a cluster (test_simulate.py).
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path

import orjson
import pytest

from bench.prompts import Prompt, pooled_hit_rate, prompts
from bench.workloads import CHAT, MESSAGES, WORKLOADS, Workload, WorkloadError, WorkloadSpec, build_workload
from bench.workloads.base import FIRST_TOKEN_ID, TOKEN_IDS, token_ids
from bench.workloads.rag import excerpts, standard_library
from kvcache.profiles import profile
from kvcache.tokens.tokenizer import load_tokenizer

SEEDED = tuple(name for name in WORKLOADS if name != "trace")


@cache
def build(name: str, seed: int = 0, limit: int = 40, rate: float | None = None) -> Workload:
    return build_workload(WorkloadSpec(name, seed=seed, limit=limit, rate=rate))


@pytest.mark.parametrize("name", SEEDED)
def test_the_same_seed_yields_the_same_requests_and_another_yields_others(name: str) -> None:
    once, again, other = build(name), build_workload(WorkloadSpec(name, seed=0, limit=40)), build(name, seed=1)
    assert list(once.requests()) == list(once.requests()) == list(again.requests())
    assert list(once.requests()) != list(other.requests())


@pytest.mark.parametrize("name", SEEDED)
def test_requests_are_numbered_and_ordered_by_arrival(name: str) -> None:
    requests = list(build(name).requests())
    assert [r.index for r in requests] == list(range(40))
    assert all(before.at <= after.at for before, after in pairwise(requests))
    assert all(r.body["max_tokens"] == r.max_tokens and r.body["ignore_eos"] is True for r in requests)


@pytest.mark.parametrize("name", SEEDED)
def test_the_rate_is_the_mean_of_arrivals(name: str) -> None:
    rate = 5.0 if name == "agents" else 50.0  # agents make short pauses first, and take some turns to be steady
    last = list(build(name, limit=1500, rate=rate).requests())[-1]
    assert 1500 / last.at == pytest.approx(rate, rel=0.25)


@cache
def agent_prompts(context: int, api: str = "chat") -> list[Prompt]:
    spec = WorkloadSpec("agents", limit=260, rate=0.8, context=context, api=api)
    return list(prompts(build_workload(spec), load_tokenizer("gpt2")))


@pytest.mark.parametrize("context", [4_096, 8_192])
def test_agents_fill_the_context_and_no_more(context: int) -> None:
    longest = max(len(prompt.tokens) + prompt.request.max_tokens for prompt in agent_prompts(context))
    assert 0.6 * context < longest <= context


def test_agents_repeat_their_history_and_share_their_tools() -> None:
    """One agent's prompts grow by one call and its result; a session of coding has 40 turns."""
    sessions: dict[str, list[dict]] = {}
    spec = WorkloadSpec("agents", limit=400, rate=0.8, context=32_768)
    for body in (dict(request.body) for request in build_workload(spec).requests()):
        sessions.setdefault(body["messages"][1]["content"], []).append(body)
    for bodies in sessions.values():
        for before, after in pairwise(bodies):
            assert after["tools"] == before["tools"]
            assert after["messages"][:-2] == before["messages"]
            call, result = after["messages"][-2:]
            assert call["tool_calls"][0]["id"] == result["tool_call_id"]
    assert max(map(len, sessions.values())) == 40
    assert len({orjson.dumps(bodies[0]["tools"]) for bodies in sessions.values()}) == 5


def test_agents_say_the_same_in_both_apis() -> None:
    chat, messages = agent_prompts(8_192), agent_prompts(8_192, "messages")
    assert {prompt.request.path for prompt in messages} == {MESSAGES}
    assert [prompt.tokens for prompt in messages] == [prompt.tokens for prompt in chat]


def test_token_ids_are_a_pure_function_of_their_name() -> None:
    ids = token_ids("hash 7", 512)
    assert ids[:100] == token_ids("hash 7", 100)
    assert ids != token_ids("hash 8", 512)
    assert FIRST_TOKEN_ID <= min(ids) <= max(ids) < FIRST_TOKEN_ID + TOKEN_IDS


def test_rag_asks_about_real_documents_that_fit_the_pooled_caches_but_not_one() -> None:
    """Sized for four workers of the default profile."""
    one = profile("llama-2-13b-a100-40gb").blocks(16)
    workload, tokenizer = build("rag", limit=600), load_tokenizer("gpt2")
    documents = {
        prompt.request.body["messages"][0]["content"]: len(prompt.tokens) // 16
        for prompt in prompts(workload, tokenizer)
    }
    assert len(documents) > 80
    assert 2 * one < sum(documents.values()) < 4 * one
    everything = prompts(workload, tokenizer)
    assert pooled_hit_rate(everything, 4 * one, 16) > 1.3 * pooled_hit_rate(prompts(workload, tokenizer), one, 16)


def test_rag_puts_the_question_last_and_names_what_the_document_describes() -> None:
    for request in build("rag").requests():
        system, user = request.body["messages"]
        assert request.path == CHAT
        assert (system["role"], user["role"]) == ("system", "user")
        assert "# Module" in system["content"]
        assert user["content"].endswith(("?", "."))


def test_popular_documents_are_asked_about_more_often() -> None:
    asked: dict[str, int] = {}
    for request in build("rag", limit=1500, rate=50.0).requests():
        document = request.body["messages"][0]["content"]
        asked[document] = asked.get(document, 0) + 1
    counts = sorted(asked.values(), reverse=True)
    assert counts[0] > 4 * counts[len(counts) // 2]


def test_excerpts_hold_whole_lines_of_documentation() -> None:
    functions = [f"def f{i}(a, b={i}):\n    '''Say {i}.\n\n    {'More words. ' * 9}\n    '''\n" for i in range(20)]
    made = excerpts("m", "'''About m.'''\n" + "".join(functions) + "def _private():\n    'Hidden'\n", 900)
    assert len(made) >= 2
    for each in made:
        assert 600 < len(each.text) <= 900
        assert all(f"def {name}(a, b=" in each.text for name in each.names)
        assert "Hidden" not in each.text
    assert made[0].text.startswith("# Module m\n\nAbout m.\n\ndef m.f0(a, b=0)\nSay 0.\n")


def test_the_standard_library_has_documents() -> None:
    assert {"bisect", "json", "argparse"} <= {name for name, _ in standard_library()}


def test_a_conversation_repeats_its_former_turns() -> None:
    conversations: dict[str, list[list[dict[str, str]]]] = {}
    for request in build("chat", limit=300).requests():
        messages = request.body["messages"]
        conversations.setdefault(messages[1]["content"], []).append(messages)
    several = [turns for turns in conversations.values() if len(turns) > 1]
    assert len(several) > 20
    for turns in several:
        for before, after in pairwise(turns):
            assert after[: len(before)] == before
            assert [m["role"] for m in after[len(before) :]] == ["assistant", "user"]


def test_uniform_shares_nothing_and_hot_shares_its_prefix() -> None:
    plain = [r.body["prompt"] for r in build("uniform").requests()]
    assert len({tuple(p[:16]) for p in plain}) == len(plain)
    hot = [r.body["prompt"] for r in build("hot").requests()]
    assert len({tuple(p[:1024]) for p in hot}) == 1
    assert len({tuple(p[1024:1040]) for p in hot}) == len(hot)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        pytest.param(
            WorkloadSpec("rags"),
            "unknown workload 'rags'; use one of: rag, chat, uniform, hot, answers, adapters, agents, trace",
            id="unknown name",
        ),
        pytest.param(WorkloadSpec("rag", limit=0), "limit must be 1 or more", id="no request"),
        pytest.param(WorkloadSpec("rag", rate=0.0), "rate must be above 0", id="no rate"),
        pytest.param(WorkloadSpec("rag", trace=Path("t.jsonl")), "replays no file", id="trace of another workload"),
        pytest.param(WorkloadSpec("trace"), "--trace FILE", id="trace without a file"),
        pytest.param(WorkloadSpec("agents", context=1000), "4096 tokens or more", id="short context"),
        pytest.param(WorkloadSpec("agents", api="soap"), "unknown api 'soap'", id="unknown api"),
        pytest.param(WorkloadSpec("rag", api="messages"), "one way only", id="api of another workload"),
    ],
)
def test_a_wrong_parameter_is_refused(spec: WorkloadSpec, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        build_workload(spec)
