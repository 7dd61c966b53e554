"""The commands of docs/vllm.md, followed beside a running vLLM.

Not covered: the installation in docs/real-vllm.md, and everything that needs a GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.real_vllm.conftest import Engine
from tests.real_vllm.documents import follow

pytestmark = [pytest.mark.real_vllm, pytest.mark.timeout(240)]


async def test_the_page_is_followed(engine: Engine, tmp_path: Path) -> None:
    await follow(tmp_path, engine=engine.url, events=engine.events, replay=engine.replay, tokenizer=engine.tokenizer)
