"""`python -m tests.real_vllm.record URL`: records what a running vLLM makes of random requests, for tests without a
vLLM.

The engine must serve the model of docs/real-vllm.md, with `--trust-request-chat-template` and `--enable-scale-out`.
Requests that it refuses are left out, because it does not matter how the router reads them.
"""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from pathlib import Path
from typing import Any

import httpx

from tests.real_vllm.agent_requests import AgentRequests
from tests.real_vllm.requests import Requests

DATA = Path(__file__).parents[1] / "data" / "vllm"
FILE, AGENTS_FILE = DATA / "chat_prompts.json", DATA / "agent_prompts.json"
SEED, COUNT, AGENTS = 7, 120, 80


def digest(tokens: list[int]) -> str:
    """Of token ids, 16 hexadecimal digits."""
    return hashlib.sha256(array("I", tokens).tobytes()).hexdigest()[:16]


def prompts(client: httpx.Client, path: str, body: dict[str, Any]) -> list[list[int]] | None:
    """The token ids of a request's prompts as the engine computes them; None if it refuses the request."""
    answer = client.post(path, json=body | {"return_token_ids": True})
    if answer.status_code != 200:
        return None
    found = answer.json()
    return [found["prompt_token_ids"]] if "messages" in body else [one["prompt_token_ids"] for one in found["choices"]]


def rendered(client: httpx.Client, path: str, body: dict[str, Any]) -> list[int] | None:
    """The token ids of a request of the Messages or Responses API, by vLLM's render endpoint (`--enable-scale-out`);
    None if the engine refuses the request."""
    answer = client.post(f"{path}/render", json=body)
    assert answer.status_code not in (403, 404), "start the engine with --enable-scale-out"
    return answer.json()["token_ids"] if answer.status_code == 200 else None


def record_agents(client: httpx.Client, version: str, model: str) -> None:
    """Record requests of the Messages and Responses APIs."""
    made = AgentRequests(SEED, model)
    pairs: list[dict[str, Any]] = []
    while len(pairs) < AGENTS:
        path = "/v1/messages" if len(pairs) % 2 else "/v1/responses"
        body = made.messages() if len(pairs) % 2 else made.responses()
        if (ids := rendered(client, path, body)) is not None:
            pairs.append({"path": path, "body": body, "tokens": len(ids), "digest": digest(ids)})
    write(AGENTS_FILE, version, pairs)


def write(file: Path, version: str, pairs: list[dict[str, Any]]) -> None:
    lines = ",\n".join(json.dumps(pair, ensure_ascii=False) for pair in pairs)
    file.write_text(f'{{"vllm": {json.dumps(version)}, "pairs": [\n{lines}\n]}}\n', encoding="utf-8")


def main(url: str) -> None:
    with httpx.Client(base_url=url, timeout=60) as client:
        version = client.get("/version").json()["version"]
        model = client.get("/v1/models").json()["data"][0]["id"]
        made = Requests(SEED, model)
        pairs: list[dict[str, Any]] = []
        while len(pairs) < COUNT:
            chat = len(pairs) % 5 != 0
            body = made.chat() if chat else made.completion()
            path = "/v1/chat/completions" if chat else "/v1/completions"
            found = prompts(client, path, body)
            if found is None:
                continue
            texts = [client.post("/detokenize", json={"tokens": ids}).json()["prompt"] for ids in found]
            expected = [
                {"tokens": len(ids), "digest": digest(ids), "text": text}
                for ids, text in zip(found, texts, strict=True)
            ]
            pairs.append({"path": path, "body": body, "prompts": expected})
        write(FILE, version, pairs)
        record_agents(client, version, model)


if __name__ == "__main__":
    main(sys.argv[1])
