"""The commands' refusals: messages, exit codes, and that nothing is started before the input is checked.

Not covered: what the commands do (test_up, tests/bench, tests/kvcluster/explain).
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvcluster.cli import app
from kvcluster.commands.route import NoExplanationError, ask_router, candidates_table, request_body
from runtime.sockets import listen

ROOT = Path(__file__).parents[2]
RAG = str(ROOT / "examples" / "rag.yaml")

EXPLANATION = {
    "decision": {
        "worker_id": "rag-worker-1",
        "url": "http://127.0.0.1:2",
        "strategy": "cache_aware",
        "reason": "prefix_match",
        "prompt_blocks": 12,
        "predicted_ttft": 0.0105,
    },
    "candidates": [
        {"worker": "rag-worker-0", "matched_blocks": 0, "cost": 0.045, "in_flight": 0,
         "cost_parts": {"queue": 0, "load": 0, "prefill": 0.035, "decode": 0.01, "charge": 0}},
        {"worker": "rag-worker-1", "matched_blocks": 10, "cost": 0.0135, "in_flight": 1,
         "cost_parts": {"queue": 0.0005, "load": 0, "prefill": 0.01, "decode": 0.001, "charge": 0.002}},
    ],
}  # fmt: skip


def run(*args: str) -> tuple[int, str]:
    """Exit code and standard error of a command that ends before it starts an event loop."""
    result = CliRunner().invoke(app, args)
    return result.exit_code, result.stderr


def run_process(*args: str) -> tuple[int, str]:
    """The same as a process: an event loop of its own would get in the way of the test runner's."""
    ended = subprocess.run(
        [sys.executable, "-m", "kvcluster", *args], capture_output=True, text=True, cwd=ROOT, check=False
    )
    return ended.returncode, ended.stderr


def test_help_names_every_command_and_loads_none():
    code = "import sys; from kvcluster.cli import app; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not {"pydantic", "httpx", "matplotlib", "bench", "controller", "tokenizers"} & set(loaded.split())
    shown = CliRunner().invoke(app, ["--help"]).stdout
    assert all(name in shown for name in ("up", "route", "bench", "compare"))


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["up", "none.yaml"], 2, "cannot be read: No such file"),
        (["up", RAG, "--strategy", "best"], 2, "rag with --strategy best is not a valid KVCluster"),
        (["up", RAG, "--speed", "0"], 2, "spec.engine.speed: must be more than 0, not 0.0"),
        (["compare", RAG, "--strategies", "cache_aware,best"], 2, "spec.router.strategy: must be one of"),
        (["compare", RAG, "--strategies", ","], 2, "--strategies names no strategy"),
        (["bench", "http://127.0.0.1:1", "--speed", "0"], 2, "speed must be above 0"),
        (["simulate", RAG, "--find-rate"], 2, "needs an SLO: give --slo-ttft or --slo-tpot or both"),
        (["simulate", RAG, "--slo-ttft", "soon"], 2, "--slo-ttft: 'soon' is no duration; write for example 500ms"),
        (["simulate", RAG, "--warm-up", "some"], 2, "--warm-up takes a number of requests or a time: 'some'"),
        (["simulate", RAG, "--warm-up", "600"], 2, "a warm-up of 600 requests leaves none of the 600"),
        (["simulate", RAG, "--repeats", "99"], 2, "--repeats must be between 1 and 31"),
        (["simulate", RAG, "--arrivals", "random"], 2, "--arrivals must be one of constant, poisson, gamma"),
        (["simulate", RAG, "--cv", "3"], 2, "add --arrivals gamma"),
        (["simulate", RAG, "--sweep", "workers=1,2", "--repeats", "2"], 2, "leave the options about measurement out"),
        (["compare", RAG, "--router", "x"], 2, "write a router as NAME='COMMAND'"),
        (["compare", RAG, "--router", "cache_aware=x {port} {workers}"], 2, "a strategy or another router has this"),
        (["route", ""], 2, "the prompt is empty"),
        (["route", "hi", "--router", "http://127.0.0.1:1"], 1, "no router answers at http://127.0.0.1:1"),
    ],
    ids=[
        "missing file", "unknown strategy", "zero speed", "one unknown strategy of two", "no strategy",
        "zero speed of a bench", "rate without an SLO", "no duration", "no warm-up", "a warm-up of everything",
        "too many repeats", "unknown arrivals", "a spread of nothing", "a repeated sweep", "no command of a router",
        "a router with a strategy's name", "empty prompt", "no router",
    ],
)  # fmt: skip
def test_refusals(args, code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exit_code, said = run(*args)
    assert (exit_code, message in said) == (code, True), said
    assert said.startswith("error: ")
    assert "Traceback" not in said


@pytest.mark.process
@pytest.mark.parametrize(
    "args",
    [["compare", RAG, "--out", "/nowhere"], ["bench", "http://127.0.0.1:1"]],
    ids=["compare", "bench"],
)
def test_unknown_workloads_are_refused_before_anything_starts(args):
    code, said = run_process(*args, "--workload", "none")
    assert (code, said) == (
        2,
        "error: unknown workload 'none'; use one of: rag, chat, uniform, hot, answers, adapters, agents, trace, or the "
        "path of a YAML file\n",
    )


def test_vllm_engines_need_a_cluster(tmp_path):
    file = tmp_path / "vllm.yaml"
    file.write_text(
        "apiVersion: kvcluster.dev/v1alpha1\nkind: KVCluster\nmetadata: {name: v}\n"
        "spec: {model: {name: facebook/opt-125m}, engine: {type: vllm}}\n"
    )
    assert run("up", str(file))[0] == 2
    assert "vllm engines need a cluster" in run("up", str(file))[1]


@pytest.mark.process
def test_a_taken_port_is_named_with_its_flag():
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        code, said = run_process("up", RAG, "--port", port)
    assert code == 1
    assert f"port {port} on 127.0.0.1 is taken by another process: choose another with --port" in said


def test_a_prompt_is_asked_as_completion_or_chat():
    assert request_body("hi", chat=False, model=None) == {"prompt": "hi"}
    assert request_body("hi", chat=True, model="m") == {
        "messages": [{"role": "user", "content": "hi"}],
        "model": "m",
    }


def answering(status: int, content: bytes) -> httpx.MockTransport:
    return httpx.MockTransport(lambda request: httpx.Response(status, content=content))


def test_the_candidates_cheapest_first_and_the_chosen_marked():
    explanation = ask_router("http://router", {}, answering(200, json.dumps(EXPLANATION).encode()))
    out = io.StringIO()
    Console(width=120, file=out).print(candidates_table(explanation))
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("rag-worker-1 (cache_aware: prefix_match), first token expected in 10.5 ms")
    rows = [line for line in lines if "rag-worker-" in line][1:]
    assert "→ rag-worker-1" in rows[0]
    assert "10 of 12" in rows[0]
    heads = [head.strip() for head in lines[2].replace("┃", "|").split("|")[1:-1]]
    assert heads == ["worker", "matched blocks", "queue", "prefill", "decode", "charge", "cost", "in flight"]
    cells = [cell.strip() for cell in rows[0].replace("│", "|").split("|")[1:-1]]
    assert cells[2:7] == ["0.5 ms", "10.0 ms", "1.0 ms", "2.0 ms", "13.5 ms"], "the parts add up to the cost"
    assert "35.0 ms" in rows[1]


@pytest.mark.parametrize(
    ("status", "content", "message"),
    [
        (503, b'{"error": {"message": "no worker is ready"}}', "answered 503: no worker is ready"),
        (404, b'{"detail": "Not Found"}', "answered 404: {'detail': 'Not Found'}"),
        (200, b"<html>", "answered 200: <html>"),
    ],
    ids=["refusal", "not found", "HTML"],
)
def test_answers_that_explain_nothing(status, content, message):
    with pytest.raises(NoExplanationError, match=message):
        ask_router("http://router", {}, answering(status, content))
