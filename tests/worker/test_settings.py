"""Settings: flags override the environment and the environment the defaults; errors name the flag and the remedy.

Not covered: what the flags of chat templates do (`tests/kvcache`).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from runtime.settings import SettingsError
from worker.settings import Settings


def test_the_defaults_are_llama_2_13b_on_an_a100() -> None:
    settings = Settings.load([])
    assert settings.served_model == "meta-llama/Llama-2-13b-hf"
    assert (settings.usable_blocks, settings.model_len()) == (924, 4096)


def test_flags_win_over_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("WORKER_SPEED", "5")
    monkeypatch.setenv("WORKER_BLOCKS", "77")
    settings = Settings.load(["--speed", "3"])
    assert (settings.speed, settings.blocks) == (3.0, 77)


@pytest.mark.parametrize(
    "argv",
    [
        pytest.param(["--router-url", "http://a:1,http://b:2/"], id="commas"),
        pytest.param(["--router-url", "http://a:1", "--router-url", "http://b:2"], id="repeated"),
    ],
)
def test_several_routers(argv, monkeypatch) -> None:
    assert Settings.load(argv).router_url == ("http://a:1", "http://b:2")
    monkeypatch.setenv("WORKER_ROUTER_URL", "http://a:1, http://b:2")
    assert Settings.load([]).router_url == ("http://a:1", "http://b:2")


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        pytest.param(["--speed", "0"], "--speed: Input should be greater than 0", id="speed"),
        pytest.param(["--blocks", "none"], "--blocks: Input should be a valid integer", id="blocks"),
        pytest.param(["--profile", "abacus"], "unknown profile 'abacus'; use one of: ", id="profile"),
        pytest.param(
            ["--router-url", "ftp://x"], "--router-url: URL scheme should be 'http' or 'https'", id="router-url"
        ),
        pytest.param(["--log-level", "loud"], "--log-level", id="log-level"),
        pytest.param(["--port", "70000"], "--port", id="port"),
    ],
)
def test_a_bad_value_is_named_with_its_flag(argv, complaint) -> None:
    with pytest.raises(SettingsError) as refused:
        Settings.load(argv)
    assert complaint in str(refused.value)


def test_the_default_context_is_lowered_to_what_the_cache_holds() -> None:
    assert Settings.load(["--blocks", "100"]).model_len() == 1600
    assert Settings.load(["--blocks", "100", "--max-model-len", "1600"]).model_len() == 1600


def test_a_context_that_the_cache_cannot_hold_is_refused_with_both_figures_and_the_fix() -> None:
    with pytest.raises(SettingsError) as refused:
        Settings.load(["--blocks", "100", "--max-model-len", "1601"]).model_len()
    message = str(refused.value)
    assert "--max-model-len 1601 needs 101 blocks of 16 tokens" in message
    assert "the cache has 100 (1600 tokens)" in message
    assert "--max-model-len 1600 or less, or --blocks 101 or more" in message


DOCUMENT = Path(__file__).parents[2] / "docs" / "worker.md"


def test_the_document_lists_every_flag_and_no_other() -> None:
    listed = re.findall(r"^\| `--([a-z-]+)` \|", DOCUMENT.read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(name.replace("_", "-") for name in Settings.model_fields)
