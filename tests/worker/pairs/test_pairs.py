"""The emulator beside recorded answers of a vLLM 0.32 (a tiny Llama with GPT-2's vocabulary, context 2048).

Not covered: what `comparison.py` replaces by its kind: text, probabilities, times and cached tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.worker.pairs.comparison import Answer, differences

FOLDER = Path(__file__).parents[2] / "data" / "vllm"
FILES = ("pairs.jsonl", "pairs_random.jsonl", "pairs_agents.jsonl")
"""Chosen field by field; random ones; and agents' turns and tools that are refused. `tests.real_vllm.judge --record`
writes the last two."""

RECORDED: dict[str, dict[str, Any]] = {
    pair["name"]: pair for file in FILES for pair in map(json.loads, (FOLDER / file).read_text().splitlines())
}

DIFFERENT = {
    "y_generative_scoring": "scores of labels are no part of the emulator",
}
"""What is known to differ, and why."""


@pytest.mark.looptime
@pytest.mark.parametrize("name", sorted(RECORDED))
async def test_an_answer_equals_vllms(name, start) -> None:
    request, answer = RECORDED[name]["request"], RECORDED[name]["answer"]
    body = request["body"]
    raw = b"" if body is None else body.encode("latin-1") if isinstance(body, str) else json.dumps(body).encode()
    headers = request["headers"]
    if raw and "content-type" not in headers:
        headers = {"content-type": "application/json", **headers}
    harness = start(
        blocks=255, max_num_seqs=8, dev_mode=True, trust_request_chat_template=True, mean_output_tokens=1_000_000
    )
    headers = {header: value.strip() for header, value in headers.items()}  # the HTTP server does
    reply = await harness.client.request(request["method"], request["path"], raw, headers)
    ours = Answer(reply.status, dict(reply.headers), "" if request["method"] == "HEAD" else reply.text)
    real = Answer(answer["status"], answer["headers"], answer["body"])
    found = differences(request, real, ours)
    assert bool(found) == (name in DIFFERENT), "\n".join(found)
    assert harness.rank.async_engine.active == 0
