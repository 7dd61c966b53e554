"""The model that a body states, wherever it stands, and nothing that only looks like it.

Not covered: bodies whose prompt is read (test_prompts.py)."""

from __future__ import annotations

from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.tokens.tokenizer import Tokenizer
from router.server.bodies import SCANNED, model_of, scan
from tests.router.conftest import StartRouter, until
from tests.router.fakes import fake_workers, good

LONG = "x" * (3 * SCANNED)
NESTED = {"a": [{"model": "inner"}], "model": "deep"}


@pytest.mark.parametrize(
    ("fields", "model"),
    [
        pytest.param({"model": "m", "input": "x"}, "m", id="short"),
        pytest.param({"input": NESTED}, None, id="of an object within"),
        pytest.param({"model": "m\u00e9", "input": LONG}, "m\u00e9", id="long: first"),
        pytest.param({"n": 1, "stop": ["a"], "model": "m", "input": LONG}, "m", id="long: among the first"),
        pytest.param({"input": LONG, "model": "m"}, "m", id="long: last"),
        pytest.param({"input": LONG, "model": "m", "tools": [NESTED], "n": 1}, "m", id="long: among the last"),
        pytest.param({"input": LONG, "metadata": NESTED}, None, id="long: of an object within, last"),
        pytest.param({"metadata": NESTED, "input": LONG}, None, id="long: of an object within, first"),
        pytest.param({"metadata": NESTED, "model": "m", "input": LONG}, "m", id="long: after an object within"),
        pytest.param({"input": LONG + '"model": "text"'}, None, id="long: of the text"),
        pytest.param({"input": LONG, "model": 5}, None, id="long: a number"),
        pytest.param([{"model": "m"}], None, id="a list"),
        pytest.param({"input": [NESTED] * 9000}, None, id="long: of thousands of objects within"),
    ],
)
def test_only_the_bodys_own_field_counts(fields: Any, model: str | None) -> None:
    assert model_of(orjson.dumps(fields)) == model


def test_a_form_states_its_model() -> None:
    for data in ({"model": "whisper", "language": "en"}, {"language": "en", "model": "whisper"}):
        request = httpx.Request("POST", "http://h/", data=data, files={"file": ("a.wav", b"\r\nRIFF\0" * 50_000)})
        assert model_of(request.read()) == "whisper"
    assert model_of(httpx.Request("POST", "http://h/", files={"file": ("model", b"model")}).read()) is None


@settings(max_examples=60)
@given(st.binary(max_size=80), st.integers(0, 2))
def test_no_body_is_too_strange(body: bytes, copies: int) -> None:
    for whole in (body, b"{" + body, b"--" + body, body + b'"model":"m"}' * copies):
        model_of(whole)
        scan(whole)


async def test_a_request_without_a_prompt_goes_to_a_worker_of_its_model(
    start_router: StartRouter, tokenizer: Tokenizer
) -> None:
    form = {"data": {"model": "b"}, "files": {"file": ("a.wav", b"RIFF")}}
    async with fake_workers(good, good) as workers:
        for worker, worker.model in zip(workers, "ab", strict=True):
            worker.serve_feed(tokenizer.fingerprint, worker.model)
        async with start_router(workers) as router:
            await until(lambda: all(status.matching for status in router.router.fleet.workers(router.router.clock())))
            for path, content in (("/rerank", {"json": {"model": "b"}}), ("/v1/audio/transcriptions", form)):
                for _ in range(3):
                    assert (await router.client.post(path, **content)).status_code == 200
    assert [len(worker.received) for worker in workers] == [0, 6]
