"""docs/vllm.md and docs/real-vllm.md: their commands do what the pages say, and their flags are those that count."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvcache.tokens.tokenizer import load_tokenizer
from router.settings import Settings as RouterSettings
from tests.real_vllm.documents import PAGE, ROOT, engine_flags, follow
from tests.worker.agent.miniature import MiniatureEngine
from worker.agent.settings import Settings as AgentSettings

REAL = (ROOT / "docs" / "real-vllm.md").read_text(encoding="utf-8")


@pytest.mark.process
@pytest.mark.timeout(240)
async def test_the_page_is_followed_beside_an_engine_in_miniature(tmp_path: Path) -> None:
    async with MiniatureEngine(load_tokenizer("gpt2")) as engine:
        await follow(
            tmp_path,
            engine=engine.url,
            events=engine.events_endpoint,
            replay=engine.replay_endpoint,
            tokenizer="gpt2",
        )


def test_the_engines_flags_are_what_agent_and_router_expect() -> None:
    flags, agent = engine_flags(), AgentSettings()
    assert agent.engine_url == f"http://127.0.0.1:{flags['--port']}"
    events = flags["--kv-events-config"]
    assert (events["enable_kv_cache_events"], events["publisher"], events["topic"]) == (True, "zmq", agent.topic)
    assert events["endpoint"].replace("*", "127.0.0.1") == agent.events_endpoint
    assert events["replay_endpoint"].replace("*", "127.0.0.1") == agent.replay_endpoint
    assert int(flags["--block-size"]) == RouterSettings().block_size
    assert flags.keys() >= {"--enable-prefix-caching", "--enable-prompt-tokens-details", "--shutdown-timeout"}


def test_every_setting_of_the_agent_is_on_the_page() -> None:
    listed = set(re.findall(r"`(--[a-z-]+)`", PAGE))
    assert {"--" + name.replace("_", "-") for name in AgentSettings.model_fields} <= listed


def test_the_suite_is_named_as_it_is() -> None:
    folder = ROOT / "tests" / "real_vllm"
    for file in re.findall(r"`(test_\w+\.py)`", REAL):
        assert (folder / file).is_file()
    assert {path.name for path in folder.glob("test_*.py")} == set(re.findall(r"`(test_\w+\.py)`", REAL))
    for module in re.findall(r"-m (tests\.\w+(?:\.\w+)*)", REAL):
        assert ROOT.joinpath(*module.split(".")).with_suffix(".py").is_file()
    source = "".join(path.read_text() for path in folder.glob("*.py"))
    variables = set(re.findall(r"REAL_VLLM_[A-Z]+", REAL))
    assert variables == set(re.findall(r"REAL_VLLM_[A-Z]+", source))
