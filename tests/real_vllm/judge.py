"""`python -m tests.real_vllm.judge REAL OURS [--seed N] [--count N] [--agents] [--show]`: how often two engines answer
alike.

Both get the same random requests (`tests.real_vllm.fields`). `tests.worker.pairs.comparison` decides what is alike.
The vLLM must serve the model of docs/real-vllm.md, the emulator the same tokenizer, at speed 1:
`python -m worker.main --tokenizer FOLDER --model tiny-llama --blocks 255 --max-model-len 2048 --max-num-seqs 8
--dev-mode --mean-output-tokens 1000000`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.real_vllm.fields import AnyRequests, agents_requests
from tests.worker.pairs.comparison import HEADERS, Answer, differences

LONGEST = 8_000
"""Pairs of so many bytes are not recorded: pages, and prompts that are long for their own sake."""


def ask(url: str, request: dict[str, Any]) -> Answer:
    """One answer. A connection that breaks is an answer, too: status 0."""
    where = urlsplit(url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=120)
    body, headers = request["body"], dict(request["headers"])
    raw = None if body is None else body.encode("latin-1") if isinstance(body, str) else json.dumps(body).encode()
    if raw is not None and "content-type" not in headers:
        headers["content-type"] = "application/json"
    try:
        connection.request(request["method"], request["path"], raw, headers)
        reply = connection.getresponse()
        text = reply.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        return Answer(0, {}, type(error).__name__)
    finally:
        connection.close()
    return Answer(reply.status, {name.lower(): value for name, value in reply.getheaders()}, text)


def record(name: str, request: dict[str, Any], answer: Answer) -> str:
    """One line of a file of pairs."""
    headers = {name: value for name, value in answer.headers.items() if name in HEADERS}
    pair = {
        "name": name,
        "request": request,
        "answer": {"status": answer.status, "headers": headers, "body": answer.body},
    }
    return json.dumps(pair, separators=(",", ":"), ensure_ascii=False)


def main(arguments: list[str]) -> int:
    """Send the requests to both engines and report. Exit code 1 if fewer than 95 % of the answers are alike."""
    parser = argparse.ArgumentParser(prog="python -m tests.real_vllm.judge")
    parser.add_argument("real")
    parser.add_argument("ours")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument(
        "--agents", action="store_true", help="each kind of an agent's turns, instead of random requests"
    )
    parser.add_argument("--record", type=Path, help="write the requests with the real engine's answers to this file")
    parser.add_argument("--show", action="store_true", help="each request that was answered otherwise")
    chosen = parser.parse_args(arguments)
    made = AnyRequests(chosen.seed)
    requests = list(agents_requests()) if chosen.agents else [made.next() for _ in range(chosen.count)]
    name = "agent" if chosen.agents else f"random_{chosen.seed}"
    equal, paths, lines = 0, Counter[str](), []
    for number, request in enumerate(requests):
        real = ask(chosen.real, request)
        if not chosen.agents or real.status != 200:  # the length of a prompt depends on the chat template
            lines.append(record(f"{name}_{number}", request, real))
        found = differences(request, real, ask(chosen.ours, request))
        if found and "event-stream" in real.headers.get("content-type", ""):  # somebody may have been late
            found = differences(request, ask(chosen.real, request), ask(chosen.ours, request))
        equal += not found
        if found:
            paths[request["path"]] += 1
            if chosen.show:
                print(json.dumps(request)[:700], *(f"  {line}" for line in found), sep="\n", flush=True)  # noqa: T201
    if chosen.record is not None:
        chosen.record.write_text("\n".join(line for line in lines if len(line) < LONGEST) + "\n")
    print(f"{equal} of {len(requests)} equal ({100 * equal / len(requests):.1f} %); others: {dict(paths)}")  # noqa: T201
    return 0 if equal >= 0.95 * len(requests) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
