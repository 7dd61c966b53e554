"""The endpoints beside the APIs: those for operators, browsers and SageMaker.

Not covered: health and draining (`test_streaming.py`, `test_process.py`), /tokenize (`test_answers.py`).
"""

from __future__ import annotations

import asyncio

import pytest

COMPLETION = {"prompt": "a b", "max_tokens": 400, "ignore_eos": True, "stream": True}


@pytest.mark.looptime
async def test_a_request_is_aborted_by_the_id_of_its_answer(start) -> None:
    harness = start(dev_mode=True)
    tasks = [
        harness.client.begin("POST", "/v1/completions", COMPLETION, headers={"X-Request-Id": name})[0]
        for name in ("one", "two")
    ]
    await asyncio.sleep(1)
    reply = await harness.client.post("/abort_requests", {"request_ids": ["cmpl-one"]})
    assert reply.json() == {"status": "aborted", "aborted": 1}
    first = await tasks[0]
    assert first.chunks[-1]["choices"][0]["finish_reason"] == "abort"
    assert harness.rank.async_engine.active == 1
    assert (await harness.client.post("/abort_requests", {})).json() == {"status": "aborted", "aborted": 1}
    assert (await tasks[1]).chunks[-1]["choices"][0]["finish_reason"] == "abort"
    assert harness.worker.service.running == {}


async def test_what_a_development_server_does_is_not_served_by_others(start) -> None:
    client = start().client
    for method, path in (
        ("POST", "/abort_requests"),
        ("POST", "/reset_mm_cache"),
        ("GET", "/server_info"),
        ("GET", "/is_sleeping"),
        ("GET", "/is_paused"),
    ):
        assert (await client.request(method, path, b"{}")).status == 404


async def test_a_slash_too_many_is_redirected_with_the_query(start) -> None:
    reply = await start().client.request("POST", "/v1/completions/?a=1", b"{}", {"host": "engine:8100"})
    assert (reply.status, reply.header("location")) == (307, "http://engine:8100/v1/completions?a=1")


async def test_no_page_of_another_site_may_call(start) -> None:
    headers = {"origin": "http://elsewhere", "access-control-request-method": "POST"}
    reply = await start().client.request("OPTIONS", "/v1/completions", b"", headers)
    assert (reply.status, reply.text) == (400, "Disallowed CORS origin")
    assert reply.header("access-control-allow-origin") is None


async def test_the_document_names_every_path_and_only_requests_it_describes(start) -> None:
    client = start().client
    document = (await client.get("/openapi.json")).json()
    assert {"/v1/completions", "/v1/responses", "/v1/messages", "/tokenize", "/health"} <= document["paths"].keys()
    schemas = document["components"]["schemas"]
    del document["paths"]["/cache/events"]  # which never ends
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert (await client.request(method.upper(), path, b"")).status not in (404, 405), path
            schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            for entry in schema.get("anyOf", [schema] if schema else []):
                assert entry["$ref"].rsplit("/", 1)[-1] in schemas
    assert "CompletionRequest" in schemas


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
async def test_the_pages_show_the_document(path, start) -> None:
    reply = await start().client.get(path)
    assert (reply.status, reply.header("content-type")) == (200, "text/html; charset=utf-8")
    assert "/openapi.json" in reply.text


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({"prompt": "a"}, id="completion"),
        pytest.param({"messages": [{"role": "user", "content": "a"}]}, id="chat"),
    ],
)
async def test_an_invocation_is_a_chat_or_a_completion(body, start) -> None:
    answer = (await start(speed=1000).client.post("/invocations", body | {"max_tokens": 1})).json()
    assert answer["object"] == ("text_completion" if "prompt" in body else "chat.completion")


async def test_an_invocation_that_fits_nothing_is_refused(start) -> None:
    reply = await start().client.post("/invocations", {"messages": 5})
    assert (reply.status, reply.json()["error"]["type"]) == (400, "BadRequestError")


async def test_several_conversations_get_an_answer_each(start) -> None:
    turns = [[{"role": "user", "content": word}] for word in ("a", "b", "c")]
    client = start(speed=1000).client
    batch = (await client.post("/v1/chat/completions/batch", {"messages": turns, "max_tokens": 2})).json()
    alone = [
        (await client.post("/v1/chat/completions", {"messages": one, "max_tokens": 2})).json()["choices"][0]["message"]
        for one in turns
    ]
    assert [choice["index"] for choice in batch["choices"]] == [0, 1, 2]
    assert [choice["message"] for choice in batch["choices"]] == alone
