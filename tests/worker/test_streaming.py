"""The course of an answer: when tokens come, what ends it, and what remains when its client disconnects.

Not covered: the fields of the chunks (`test_answers.py`), and real sockets (`test_process.py`).
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytestmark = pytest.mark.looptime

IDS = list(range(1000, 1160))  # ten blocks


def completion(**fields: Any) -> dict[str, Any]:
    return {"prompt": IDS, "max_tokens": 5, "stream": True, "ignore_eos": True} | fields


def texts(reply: Any) -> list[str]:
    return [chunk["choices"][0]["text"] for chunk in reply.chunks if chunk["choices"]]


def released(harness: Any) -> bool:
    """No request is known, no block referenced."""
    load = harness.rank.engine.load()
    busy = (load.running, load.waiting, load.prefill_tokens, load.total_blocks - load.free_blocks)
    return busy == (0, 0, 0, 0)


async def test_the_head_comes_at_once_and_tokens_at_the_times_of_the_latency_model(start) -> None:
    harness = start()
    began = asyncio.get_running_loop().time()
    reply = await harness.client.post("/v1/completions", completion())
    times = [at - began for at, part in reply.writes]
    # prefill 5 ms + 10 blocks of 2.5 ms; then a step takes 15 ms, 0.156 ms a sequence and 0.62 us a token of context
    step = 0.015 + 0.000156 + 161 * 0.62e-6
    assert times == pytest.approx([0.030 + step * tokens for tokens in range(5)], abs=0.0015)  # a timer is 1 ms late
    again = asyncio.get_running_loop().time()
    reply = await harness.client.post("/v1/completions", completion(max_tokens=1))
    assert reply.writes[0][0] - again == pytest.approx(0.0005, abs=0.0015)  # all cached


async def test_speed_divides_every_latency(start) -> None:
    began = asyncio.get_running_loop().time()
    reply = await start(speed=10).client.post("/v1/completions", completion())
    assert reply.writes[-1][0] - began == pytest.approx(0.009, abs=0.0015)


async def test_an_idle_worker_sleeps(start) -> None:
    harness = start()
    await harness.client.post("/v1/completions", completion())
    assert harness.rank.engine.next_event() is None
    assert not harness.rank.async_engine.armed


async def test_a_stop_string_ends_the_answer_and_names_itself(start) -> None:
    client = start().client
    words = "".join(texts(await client.post("/v1/completions", completion(max_tokens=30)))).split(" ")
    stop = words[7]
    reply = await client.post("/v1/completions", completion(max_tokens=30, stop=["never", stop]))
    shown = "".join(texts(reply))
    assert " ".join(words).startswith(shown)
    assert stop not in shown
    last = reply.chunks[-1]["choices"][0]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", stop)
    plain = await client.post("/v1/completions", completion(max_tokens=30, stop=stop, stream=False))
    assert plain.json()["choices"][0]["text"] == shown
    kept = completion(max_tokens=30, stop=stop, stream=False, include_stop_str_in_output=True)
    assert (await client.post("/v1/completions", kept)).json()["choices"][0]["text"] == shown + stop


async def test_a_stop_string_releases_the_engine_at_once(start) -> None:
    harness = start()
    first = texts(await harness.client.post("/v1/completions", completion()))[1].strip()
    await harness.client.post("/v1/completions", completion(max_tokens=1000, stop=first))
    assert released(harness)
    assert harness.rank.engine.stats.finished["stop"] == 1


async def test_min_tokens_outlasts_a_stop_string_and_the_end_of_the_answer(start) -> None:
    client = start(mean_output_tokens=2).client
    short = await client.post("/v1/completions", completion(max_tokens=200, ignore_eos=False, stream=False))
    assert short.json()["choices"][0]["finish_reason"] == "stop"
    assert short.json()["usage"]["completion_tokens"] < 50
    body = completion(max_tokens=200, min_tokens=50, ignore_eos=False, stream=False, stop=" ")
    reply = (await client.post("/v1/completions", body)).json()
    assert reply["usage"]["completion_tokens"] >= 50


async def test_ignore_eos_runs_to_max_tokens(start) -> None:
    client = start(mean_output_tokens=2).client
    reply = (await client.post("/v1/completions", completion(max_tokens=200, stream=False))).json()
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 200


async def test_stop_token_ids_end_the_answer_without_their_text(start) -> None:
    client = start().client
    body = completion(max_tokens=8, stream=False, return_token_ids=True)
    full = (await client.post("/v1/completions", body)).json()["choices"][0]
    stopped = (await client.post("/v1/completions", body | {"stop_token_ids": [full["token_ids"][3]]})).json()
    choice = stopped["choices"][0]
    assert choice["token_ids"] == full["token_ids"][:4]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", full["token_ids"][3])
    assert full["text"].startswith(choice["text"])
    assert len(choice["text"].split()) == 3


async def test_the_choices_of_one_prompt_differ_and_share_its_blocks(start) -> None:
    """vLLM reports what the choice that finished last found: the blocks of its siblings."""
    reply = await start().client.post("/v1/completions", completion(n=3, stream=False))
    choices = reply.json()["choices"]
    assert len({choice["text"] for choice in choices}) == 3
    usage = reply.json()["usage"]
    assert (usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]) == (160, 144)


async def test_every_choice_of_a_chat_stream_begins_with_its_role(start) -> None:
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "n": 2,
        "max_tokens": 3,
        "stream": True,
        "ignore_eos": True,
    }
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    reply = await start().client.post("/v1/chat/completions", body)
    roles = [chunk["choices"][0] for chunk in reply.chunks[:2]]
    assert [(choice["index"], choice["delta"]["role"]) for choice in roles] == [(0, "assistant"), (1, "assistant")]
    tokens = reply.chunks[0]["usage"]["prompt_tokens"]
    counts = [chunk["usage"]["completion_tokens"] for chunk in reply.chunks]
    assert counts == [0, 0, 1, 1, 2, 2, 3, 3, 6]
    assert reply.chunks[-1]["usage"]["prompt_tokens"] == tokens
    assert [chunk["choices"][0]["finish_reason"] for chunk in reply.chunks[-3:-1]] == ["length", "length"]
    assert list(reply.chunks[0]) == [
        "id", "object", "created", "model", "choices", "usage", "prompt_token_ids", "prompt_text",
    ]  # fmt: skip


async def test_the_last_chunk_of_each_choice_names_the_system(start) -> None:
    reply = await start().client.post("/v1/completions", completion(n=2))
    assert ["system_fingerprint" in chunk for chunk in reply.chunks] == [False] * 8 + [True] * 2


async def test_a_client_that_reads_late_gets_several_tokens_in_one_chunk(start) -> None:
    client = start().client
    gate = asyncio.Event()
    gate.set()
    task, late = client.begin("POST", "/v1/completions", completion(max_tokens=20), gate=gate)
    await asyncio.sleep(0.05)
    gate.clear()
    await asyncio.sleep(0.2)
    gate.set()
    await task
    prompt = await client.post("/v1/completions", completion(max_tokens=20))
    assert "".join(texts(late)) == "".join(texts(prompt))
    assert len(late.chunks) < len(prompt.chunks) == 20


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_disconnects_releases_its_blocks_at_once(start, stream) -> None:
    harness = start()
    task, _ = harness.client.begin("POST", "/v1/completions", completion(max_tokens=500, n=2, stream=stream))
    await asyncio.sleep(0.2)
    assert harness.rank.engine.load().running == 2
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert released(harness)
    assert harness.worker.service.in_progress == 0
    assert harness.rank.engine.stats.finished["abort"] == 2


async def test_a_client_that_disconnects_while_it_waits_is_removed_from_the_queue(start) -> None:
    harness = start(max_num_seqs=1, max_num_batched_tokens=2048)
    first, _ = harness.client.begin("POST", "/v1/completions", completion(max_tokens=50))
    second, _ = harness.client.begin("POST", "/v1/completions", completion(prompt=[7] * 50))
    await asyncio.sleep(0.1)
    assert harness.rank.engine.load().waiting == 1
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    assert harness.rank.engine.load().waiting == 0
    await first
    assert released(harness)


async def test_closing_finishes_requests_in_flight_and_refuses_new_ones(start) -> None:
    harness = start()
    task, reply = harness.client.begin("POST", "/v1/completions", completion(max_tokens=20))
    await asyncio.sleep(0.05)
    draining = asyncio.create_task(harness.worker.finish_requests(10.0))
    await asyncio.sleep(0)
    health = await harness.client.get("/health")
    assert (health.status, health.body) == (503, b"")
    refused = await harness.client.post("/v1/completions", {"prompt": "x"})
    assert refused.status == 503
    assert refused.json()["error"]["type"] == "ServiceUnavailableError"
    assert refused.header("retry-after") == "1"
    assert (await harness.client.get("/cache/state")).status == 503
    assert await draining is True
    await task
    assert reply.chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_the_end_of_the_grace_period_ends_streams_with_abort(start) -> None:
    harness = start()
    task, reply = harness.client.begin("POST", "/v1/completions", completion(max_tokens=1000))
    plain, whole = harness.client.begin("POST", "/v1/completions", completion(max_tokens=1000, stream=False))
    await asyncio.sleep(0.05)
    assert await harness.worker.finish_requests(0.5) is False
    await asyncio.gather(task, plain)
    assert reply.chunks[-1]["choices"][0]["finish_reason"] == "abort"
    assert reply.data[-1] == "[DONE]"
    assert whole.json()["choices"][0]["finish_reason"] == "abort"
    assert released(harness)


async def test_a_dying_engine_ends_streams_with_vllms_error_event(start, capture, monkeypatch) -> None:
    harness = start()
    stream, streamed = harness.client.begin("POST", "/v1/completions", completion(max_tokens=500))
    plain, answered = harness.client.begin("POST", "/v1/completions", completion(max_tokens=500, stream=False))
    await asyncio.sleep(0.1)

    def broken(now: float) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(harness.rank.engine, "advance", broken)
    await asyncio.gather(stream, plain)
    events = streamed.text.split("\n\n")
    error = capture("engine_death_nonstream")
    assert events[-3].startswith('data: {"error": {"message": "EngineCore encountered an issue.')
    assert events[-2:] == ["data: [DONE]", ""]
    assert (answered.status, answered.text) == (500, error.body.partition("curl")[0].strip())
    assert harness.rank.async_engine.dead.is_set()
    assert (await harness.client.get("/health")).status == 503
    assert (await harness.client.post("/v1/completions", {"prompt": "x"})).status == 500


async def test_load_counts_requests_in_flight(start) -> None:
    harness = start()
    task, _ = harness.client.begin("POST", "/v1/completions", completion(n=3))
    await asyncio.sleep(0.01)
    assert (await harness.client.get("/load")).json() == {"server_load": 1}
    await task
    assert (await harness.client.get("/load")).json() == {"server_load": 0}
