"""The file of API keys: what it may hold, what is said about one that cannot be used, and what a change of it keeps.

Not covered: requests with these keys (test_auth.py), rates over time (tests/router/core/test_rates.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import pytest

from router.core.rates import Rates
from router.server.key_file import MAX_BYTES, KeyFile, KeyFileError, digest, parse
from router.settings import Settings
from runtime.settings import SettingsError
from tests.router.conftest import StartRouter

KEY = "sk-0123456789abcdef"
ENTRY = f"- {{key: {KEY}, tenant: a}}"


def test_a_key_has_a_tenant_and_may_have_a_priority_rates_and_an_end() -> None:
    other = hashlib.sha256(b"sk-another-key-of-it").hexdigest()
    keys = parse(
        f"""
keys:
- key: {KEY}
  tenant: team-a
  priority: 10
  requests_per_minute: 60
  tokens_per_minute: 100000
  expires: 2027-01-01T00:00:00Z
- sha256: {other}
  tenant: team-a
""".encode()
    )
    first, second = keys.values()
    assert (first.tenant, first.priority, first.rates) == ("team-a", 10, Rates(60, 100_000))
    assert first.expires == 1_798_761_600
    assert keys[digest(b"sk-another-key-of-it")] is second
    assert (second.tenant, second.priority, second.expires) == ("team-a", None, None)
    assert KEY not in repr(keys)


def test_json_is_read_too() -> None:
    assert digest(KEY.encode()) in parse(json.dumps({"keys": [{"key": KEY, "tenant": "a"}]}).encode())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "the file: ", id="empty"),
        pytest.param("keys: [", "no YAML in line", id="no YAML"),
        pytest.param("\x00", "no YAML", id="a control character"),
        pytest.param(KEY, "the file: ", id="a key alone"),
        pytest.param(f"{KEY}: 1\nkeys: []", "the file has a field that is not known", id="a key as a name"),
        pytest.param(f"keys: [{{key: {KEY}}}]", "keys[0].tenant: Field required", id="no tenant"),
        pytest.param("keys: [{tenant: a}]", "keys[0] needs either key or sha256", id="no key"),
        pytest.param("keys: [{tenant: a, key: sk-short}]", "keys[0].key must have 16", id="a short key"),
        pytest.param("keys: [{tenant: a, key: 12345678901234567}]", "keys[0].key: Input should be a", id="a number"),
        pytest.param(f"keys:\n{ENTRY}\n{ENTRY}", "keys[1] is the same key as an earlier one", id="the same twice"),
        pytest.param("keys: [{tenant: a, sha256: abc}]", "keys[0].sha256: String should match", id="no digest"),
        pytest.param(f"keys: [{{key: {KEY}, tenant: ''}}]", "keys[0].tenant: ", id="an empty tenant"),
        pytest.param(
            f"keys: [{{key: {KEY}, tenant: a, requests_per_minute: 0}}]",
            "keys[0].requests_per_minute: Input should be greater than 0",
            id="a rate of 0",
        ),
        pytest.param(
            f"keys: [{{key: {KEY}, tenant: a, expires: 2027-01-01}}]",
            "keys[0].expires: Input should have timezone info",
            id="an end without a time zone",
        ),
        *(
            pytest.param(f"keys: [{{key: {KEY}, tenant: a, expires: {text}}}]", "it is no YAML", id=text)
            for text in ("2027-13-01", "!!timestamp soon", "!!bool perhaps", "!!int ''", "!!float x")
        ),
        pytest.param("#" * (MAX_BYTES + 1), "1048576 are the most", id="too large"),
    ],
)
def test_a_file_that_cannot_be_used_is_explained_without_a_word_of_its_keys(text: str, message: str) -> None:
    with pytest.raises(KeyFileError) as caught:
        parse(text.encode())
    assert message in str(caught.value)
    assert "sk-" not in str(caught.value)


async def test_a_change_of_the_file_keeps_what_keys_have_used(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    entry = f"- {{key: {KEY}, tenant: a, requests_per_minute: 2}}"
    path.write_text(f"keys:\n{entry}\n")
    file = KeyFile(path, lambda: 0.0)
    _, limiter = file.keys[digest(KEY.encode())]
    assert limiter.arrive(0.0) is None

    path.write_text(f"keys:\n{entry}\n- {{key: sk-another-key-of-it, tenant: b}}\n")
    await file.refresh()

    assert len(file.keys) == 2
    assert file.keys[digest(KEY.encode())][1] is limiter
    assert limiter.arrive(0.0) is None
    assert limiter.arrive(0.0) is not None


async def test_a_broken_file_keeps_the_last_good_keys_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(f"keys:\n{ENTRY}\n")
    file = KeyFile(path, lambda: 0.0)
    with caplog.at_level(logging.INFO):
        for text in (f"keys: [{KEY}", f"keys: [{KEY}"):
            path.write_text(text)
            await file.refresh()
        assert (file.public()["known"], file.public()["healthy"]) == (1, False)
        assert file.problem.startswith("it is no YAML in line ")
        path.unlink()
        await file.refresh()
        assert file.public() == {"known": 1, "healthy": False, "error": "No such file or directory"}
        path.write_text(f"keys:\n{ENTRY}\n")
        await file.refresh()
    assert file.public() == {"known": 1, "healthy": True, "error": ""}
    assert [record.message for record in caplog.records].count("api_keys_unusable") == 2
    assert KEY not in caplog.text


def test_a_router_does_not_start_without_the_keys_that_it_should_ask_for(tmp_path: Path) -> None:
    from router.assembly import key_file

    with pytest.raises(SettingsError, match=r"--api-keys-file .*missing.yaml cannot be used: No such file"):
        key_file(Settings.load([f"--api-keys-file={tmp_path}/missing.yaml"]), lambda: 0.0)


async def test_readiness_status_and_metrics_say_that_the_file_is_broken(
    start_router: StartRouter, tmp_path: Path
) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(f"keys:\n{ENTRY}\n")
    async with start_router(api_keys_file=path) as router:
        assert router.metric("api_keys") == 1
        assert router.metric("api_keys_unusable") == 0
        path.write_text("keys: 7")
        assert router.router.keys is not None
        await router.router.keys.refresh()
        for page in ("/ready", "/status"):
            stated = (await router.management.get(page)).json()["api_keys"]
            assert stated["known"] == 1
            assert not stated["healthy"]
            assert stated["error"].startswith("keys: Input should be")
        assert router.metric("api_keys_unusable") == 1
