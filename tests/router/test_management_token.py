"""Tokens at the management port: what is open, who is let in, their rotation, and the callers that show them.

Not covered: the page (tests/router/page).
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kvcluster.options import management_headers
from router.credentials import token_file
from router.settings import Settings
from runtime.http.tokens import TokenFileError, parse, token_headers
from runtime.settings import SettingsError
from tests.router.conftest import StartRouter
from tests.router.fakes import fake_workers, good
from worker.feed.push import PushError, posting_to

TOKEN, NEXT = "token-0123456789", "token-of-tomorrow"
READ = ("/metrics", "/status", "/workers", "/live", "/live/events", "/live/report", "/openapi.json", "/nowhere")


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"# of today\n{TOKEN}\n\n")
    return path


def write(path: Path, content: str) -> None:
    path.write_text(content)


async def test_what_shows_no_token_is_refused_before_a_byte_of_its_body_has_come(
    start_router: StartRouter, tokens: Path
) -> None:
    async with start_router(management_token_file=tokens) as router:
        base = router.management.base_url
        for shown, status in ((b"", 401), (b"x-kvcluster-token: %b\r\n" % TOKEN.encode(), 100)):
            reader, writer = await asyncio.open_connection(base.host, base.port)
            head = b"POST /internal/sync HTTP/1.1\r\nhost: h\r\ncontent-length: 100000000\r\nexpect: 100-continue\r\n"
            writer.write(head + shown + b"\r\n")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 %d " % status)
            writer.close()


async def test_everything_but_probes_and_the_page_itself_needs_a_token(start_router: StartRouter, tokens: Path) -> None:
    async with fake_workers(good) as workers, start_router(workers, management_token_file=tokens) as router:
        ask = router.management.get
        for path in ("/health", "/ready", "/started", "/", "/page/main.js"):
            assert (await ask(path)).status_code == 200, path
        for path in READ:
            answer = await ask(path)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), path
            assert TOKEN not in answer.text
        for path in ("/internal/heartbeat", "/route/explain", "/ready", "/"):
            assert (await router.management.post(path)).status_code == 401, path
        for wrong in (f"Bearer {TOKEN}x", TOKEN, f"Basic {TOKEN}", "Bearer", ""):
            assert (await ask("/status", headers={"authorization": wrong})).status_code == 401, wrong
        for shown in ({"authorization": f"bearer {TOKEN}"}, token_headers(TOKEN)):
            assert (await ask("/status", headers=shown)).status_code == 200
        assert (await router.client.get("/v1/models")).status_code == 200  # the data port asks for none


async def test_tokens_are_rotated_without_a_restart_and_a_broken_file_changes_nothing(
    start_router: StartRouter, tokens: Path
) -> None:
    async with fake_workers(good) as workers, start_router(workers, management_token_file=tokens) as router:
        held = router.router.tokens
        assert held is not None

        async def status(token: str) -> int:
            return (await router.management.get("/status", headers=token_headers(token))).status_code

        write(tokens, f"{NEXT}\n{TOKEN}\n")
        held.refresh()
        assert [await status(token) for token in (TOKEN, NEXT)] == [200, 200]
        write(tokens, "short")
        held.refresh()
        assert [await status(token) for token in (TOKEN, NEXT, "short")] == [200, 200, 401]
        assert held.problem
        write(tokens, NEXT)
        held.refresh()
        assert [await status(token) for token in (TOKEN, NEXT)] == [401, 200]


async def test_all_files_of_a_folder_hold_tokens_and_the_one_called_token_is_shown(
    start_router: StartRouter, tmp_path: Path
) -> None:
    folder = tmp_path / "secret"
    folder.mkdir()
    (folder / "..data").mkdir()  # as the kubelet has it
    write(folder / "next", f"{NEXT}\n")
    write(folder / "token", TOKEN)
    async with fake_workers(good) as workers, start_router(workers, management_token_file=folder) as router:
        held = router.router.tokens
        assert held is not None
        assert held.first == TOKEN
        write(folder / "token", NEXT)
        (folder / "next").rename(folder / "previous")
        write(folder / "previous", TOKEN)
        held.refresh()
        assert held.first == NEXT
        for token in (TOKEN, NEXT):
            assert (await router.management.get("/status", headers=token_headers(token))).status_code == 200
        (folder / "previous").unlink()
        held.refresh()
        assert (await router.management.get("/status", headers=token_headers(TOKEN))).status_code == 401


async def test_metrics_may_be_open_and_nothing_else_is(start_router: StartRouter, tokens: Path) -> None:
    options = {"management_token_file": tokens, "management_open_metrics": True}
    async with fake_workers(good) as workers, start_router(workers, **options) as router:
        for path in READ:
            assert (await router.management.get(path)).status_code == (200 if path == "/metrics" else 401), path


async def test_routers_show_theirs_to_one_another(start_router: StartRouter, tokens: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text(NEXT)
    async with (
        fake_workers(good) as workers,
        start_router(workers, management_token_file=tokens) as first,
        start_router(workers, management_token_file=other) as third,
    ):
        peers = [str(each.management.base_url).rstrip("/") for each in (first, third)]
        async with start_router(workers, management_token_file=tokens, peers=peers) as second:
            answer = await second.management.get("/live", headers=token_headers(TOKEN))
            reasons = {router["url"]: router["reason"] or "" for router in answer.json()["routers"]}
            assert "token" not in reasons[peers[0]]
            assert reasons[peers[1]] == "it does not accept this router's management token"


async def test_a_worker_that_pushes_shows_a_token_from_its_file(start_router: StartRouter, tokens: Path) -> None:
    async with fake_workers(good) as workers, start_router(workers, management_token_file=tokens) as router:
        url = str(router.management.base_url).rstrip("/")
        async with posting_to(url, tokens) as post:
            with pytest.raises(PushError, match="refused: 400"):  # let in, and not understood
                await post("/internal/heartbeat", b"{}", "application/json")
        async with posting_to(url) as post:
            with pytest.raises(PushError, match="refused: 401"):
                await post("/internal/heartbeat", b"{}", "application/json")


def test_commands_show_the_token_in_their_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVCLUSTER_MANAGEMENT_TOKEN", raising=False)
    plain = management_headers()
    monkeypatch.setenv("KVCLUSTER_MANAGEMENT_TOKEN", f"{TOKEN}\n")
    assert management_headers() == plain | token_headers(TOKEN)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b"", "no token", id="empty"),
        pytest.param(b"# secret-secret-secret", "no token", id="a comment"),
        pytest.param(b"secret", "token 1 must have 16", id="too short"),
        pytest.param(b"secret-secret secret", "no spaces", id="a space"),
        pytest.param("secret-secret-sécret".encode(), "printable ASCII", id="no ASCII"),
        pytest.param(b"secret\n" * 20_000, "more than 65536 bytes", id="too large"),
    ],
)
def test_a_file_that_cannot_be_used_is_explained_without_its_content(content: bytes, says: str) -> None:
    with pytest.raises(TokenFileError, match=says) as raised:
        parse(content)
    assert "secret" not in str(raised.value)


def test_a_router_does_not_start_without_its_tokens(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"--management-token-file .* cannot be used: No such file"):
        token_file(Settings.load([f"--management-token-file={tmp_path}/missing"]))
