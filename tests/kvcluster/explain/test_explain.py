"""`kvcluster explain` as a command: its requests, its words for what is refused or missing, and its exit codes.

Not covered: a real API server (test_cluster), and the content of the page (test_page).
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from typer.testing import CliRunner

from kvcluster.cli import app, plugin
from tests.kvcluster.explain.support import EVENT, PODS, ROUTERS, STATUS, WORKERS, cluster, row

pytestmark = pytest.mark.process

CORE = "/api/v1/namespaces/ns"
CLUSTERS = "/apis/kvcluster.dev/v1alpha1/namespaces/ns/kvclusters"


def refusal(code: int, message: str) -> dict[str, Any]:
    return {"kind": "Status", "status": "Failure", "code": code, "message": message}


@dataclass
class ApiServer:
    """Answers by path; what is not there is 404. An answer is a body, (status, body), or a function of the query."""

    url: str
    answers: dict[str, Any]
    asked: list[tuple[str, dict[str, list[str]], str]] = field(default_factory=list)

    def kubeconfig(self, folder: Path, **context: Any) -> Path:
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "c", "cluster": {"server": self.url}}],
            "users": [{"name": "u", "user": {"token": "secret"}}],
            "contexts": [{"name": "test", "context": {"cluster": "c", "user": "u", **context}}],
        }
        file = folder / "kubeconfig"
        file.write_text(yaml.safe_dump(content))
        return file


def answers() -> dict[str, Any]:
    workers = {"workers": [row(worker) for worker in WORKERS]}
    routers = {
        f"{CORE}/pods/{router}:9000/proxy/{what}": body
        for router in ROUTERS
        for what, body in (("status", STATUS), ("workers", workers))
    }
    return {
        CLUSTERS: {"items": [cluster()]},
        f"{CLUSTERS}/rag": cluster(),
        f"{CORE}/pods": {"items": PODS},
        f"{CORE}/events": {"items": [EVENT]},
        **routers,
    }


@pytest.fixture
def api() -> Iterator[ApiServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            found.asked.append((parts.path, parse_qs(parts.query), self.headers.get("Authorization", "")))
            answer = found.answers.get(parts.path, (404, b"404 page not found"))
            answer = answer(parse_qs(parts.query)) if callable(answer) else answer
            status, body = answer if isinstance(answer, tuple) else (200, answer)
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            return None

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found = ApiServer(f"http://127.0.0.1:{server.server_address[1]}", answers())
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()


Explain = Callable[..., tuple[int, str, str]]


@pytest.fixture
def explain(api: ApiServer, tmp_path: Path) -> Explain:
    """Runs the command: exit code, standard output, standard error."""

    def run(*args: str, command: Any = app, **context: Any) -> tuple[int, str, str]:
        config = api.kubeconfig(tmp_path, **{"namespace": "ns", **context})
        result = CliRunner().invoke(command, ["explain", *args, "--kubeconfig", str(config)])
        return result.exit_code, result.stdout, result.stderr

    return run


def test_one_page(explain, api):
    code, text, said = explain("rag")
    assert (code, said) == (0, "")
    for words in ("rag in namespace ns", "rag-worker-3", "900 / 924", "prefix_match", "12 of 14", "12.5 ms", "Serving"):
        assert words in text
    assert {token for _, _, token in api.asked} == {"Bearer secret"}
    selectors = [query["labelSelector"][0] for path, query, _ in api.asked if path == f"{CORE}/pods"]
    assert selectors == [
        "app.kubernetes.io/name=kvcluster,app.kubernetes.io/instance=rag,app.kubernetes.io/component in (router,worker)"
    ]
    assert len(api.asked) == 8


def test_as_json(explain):
    code, text, _ = explain("rag", "--json")
    found = json.loads(text)
    assert code == 0
    assert (found["name"], found["hit_rate"], found["problems"], found["unread"]) == ("rag", "82.3%", [], [])
    assert len(found["conditions"]) == 6
    assert found["pods"][2]["worker"]["reuse_score"] == 265.0
    assert found["routers"][0]["report"]["decisions"] == {"prefix_match": 90, "no_match": 10}


def test_as_a_plugin_of_kubectl(explain):
    code, text, _ = explain("rag", "-n", "ns", command=plugin, namespace="other")
    assert code == 0
    assert "rag in namespace ns" in text


def test_without_a_namespace_it_is_default(explain):
    assert explain("rag", namespace=None)[2].startswith("error: http://127.0.0.1:")
    assert "does not know KVClusters" in explain("rag", namespace=None)[2]


def test_forbidden_proxies_leave_the_rest(explain, api):
    for path in api.answers:
        if "/proxy/" in path:
            api.answers[path] = (403, refusal(403, 'pods/proxy is forbidden: User "eve" cannot get'))
    code, text, _ = explain("rag")
    assert code == 0
    assert text.count('could not be asked: 403: pods/proxy is forbidden: User "eve" cannot get') == 2
    assert "82.3%" in text
    assert "rag-worker-3" in text


def test_forbidden_lists_leave_the_rest(explain, api):
    for what in ("pods", "events"):
        api.answers[f"{CORE}/{what}"] = (403, refusal(403, f"{what} is forbidden"))
    code, text, _ = explain("rag")
    assert code == 0
    for what in ("pods", "events"):
        assert text.count(f"{what} could not be read: 403: {what} is forbidden") == 1
    assert "CacheViewFresh" in text


def test_a_router_that_answers_nonsense(explain, api):
    api.answers[f"{CORE}/pods/rag-router-a:9000/proxy/status"] = b"<html>"
    code, text, _ = explain("rag")
    assert code == 0
    assert "rag-router-a could not be asked: Invalid JSON" in text
    assert "rag-router-b" in text


def test_only_warnings_about_our_own_objects(explain, api):
    def warning(name: str) -> dict[str, Any]:
        about = {"kind": "Pod", "name": name}
        return {**EVENT, "involvedObject": about, "type": "Warning", "reason": "BackOff", "message": name}

    ours = ["rag-worker-0", "rag-worker-5d8f9b7c6d-x2x4z", "rag-router", "rag-worker-5d8f9b7c6d"]
    foreign = ["rag-worker-worker-5d8f9b7c6d-x2x4z", "rag2-worker", "other"]
    warnings = [warning(name) for name in [*ours, *foreign]]
    api.answers[f"{CORE}/events"] = lambda query: {
        "items": warnings if query["fieldSelector"] == ["type=Warning"] else []
    }
    found = json.loads(explain("rag", "--json")[1])["events"]
    assert {event["message"] for event in found} == set(ours)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rga", "no KVCluster rga in namespace ns of http://127.0.0.1:"),
        ("rga", "there are: rag"),
        ("../pods", "'../pods' is no name"),
        ("", "'' is no name"),
    ],
)
def test_a_name_that_is_not_there(explain, name, message):
    code, text, said = explain(name)
    assert (code, text) == (2, "")
    assert message in said


def test_no_chart(explain, api):
    api.answers = {}
    code, _, said = explain("rag")
    assert code == 2
    assert "does not know KVClusters: install the chart" in said


@pytest.mark.parametrize("code", [401, 403, 500])
def test_a_kvcluster_that_may_not_be_read(explain, api, code):
    api.answers[f"{CLUSTERS}/rag"] = (code, refusal(code, "no"))
    assert explain("rag") == (1, "", f"error: KVCluster rag cannot be read: {code}: no\n")


def test_a_server_that_is_gone(explain, api):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        api.url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        code, _, said = explain("rag")
    assert code == 1
    assert f"the API server cannot be reached: {api.url}" in said


def kubeless(*args: str, monkeypatch: pytest.MonkeyPatch, home: Path, **env: str) -> tuple[int, str]:
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    result = CliRunner().invoke(app, ["explain", "rag", *args])
    return result.exit_code, result.stderr


def test_no_kubeconfig(monkeypatch, tmp_path):
    code, said = kubeless(monkeypatch=monkeypatch, home=tmp_path)
    assert code == 2
    assert said.startswith(
        "error: no cluster to talk to: there is no kubeconfig ~/.kube/config: name one with --kubeconfig"
    )


def test_a_kubeconfig_that_is_not_there(monkeypatch, tmp_path):
    code, said = kubeless("--kubeconfig", "/nowhere", monkeypatch=monkeypatch, home=tmp_path)
    assert (code, "there is no kubeconfig /nowhere" in said) == (2, True)
    code, said = kubeless(monkeypatch=monkeypatch, home=tmp_path, KUBECONFIG="/a:/b")
    assert (code, "there is no kubeconfig /a:/b" in said) == (2, True)


@pytest.mark.parametrize("content", ["", "[]", "text", "{}", "a: [", "clusters: 3", "contexts: []\ncurrent-context: x"])
def test_a_file_that_is_no_kubeconfig(content, monkeypatch, tmp_path):
    file = tmp_path / "config"
    file.write_text(content)
    code, said = kubeless(monkeypatch=monkeypatch, home=tmp_path, KUBECONFIG=str(file))
    assert code == 2
    assert said.startswith("error: no cluster to talk to")


def test_a_context_that_is_not_there(explain):
    code, _, said = explain("rag", "--context", "prod")
    assert code == 2
    assert "has no context 'prod'; it has: test" in said
