"""The emulated engine's answers compared with those of a running vLLM, for random requests to every endpoint.

Not covered: values that depend on weights, cache or clock, and how many tokens share an event
(tests/worker/pairs/comparison.py leaves these out).
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.real_vllm.conftest import Engine
from tests.real_vllm.fields import AnyRequests
from tests.real_vllm.judge import ask
from tests.worker.pairs.comparison import differences

FLAGS = ("--dev-mode", "--enable-auto-tool-choice", "--trust-request-chat-template", "--mean-output-tokens", "1000000")


@pytest.fixture
def emulator(engine: Engine) -> Iterator[str]:
    """Its URL. The socket listens before the process starts, so that the first request waits for it."""
    with closing(socket.create_server(("127.0.0.1", 0))) as sock:
        command = [
            *(sys.executable, "-m", "worker.main", "--fd", str(sock.fileno()), "--log-level", "warning", *FLAGS),
            *("--tokenizer", engine.tokenizer, "--model", engine.model, "--max-model-len", str(engine.max_model_len)),
        ]
        process = subprocess.Popen(command, pass_fds=[sock.fileno()])
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            process.terminate()
            process.wait()


@pytest.mark.timeout(1800)
def test_at_least_95_of_100_answers_are_equal(engine: Engine, emulator: str, seed: int, number: int) -> None:
    requests = AnyRequests(seed)
    equal = 0
    for _ in range(number):
        request = requests.next()
        found = differences(request, ask(engine.url, request), ask(emulator, request))
        equal += not found
        if found:
            print(request, *found, sep="\n  ")  # noqa: T201
    print(f"{equal} of {number} answers are equal")  # noqa: T201
    assert equal >= 0.95 * number
