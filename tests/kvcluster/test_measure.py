"""What `kvcluster bench` prints and writes for programs, in front of a real router.

Not covered: the figures (tests/bench, tests/e2e/test_figures.py) and the tables (tests/bench/test_table.py).
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from typer.testing import CliRunner

from kvcache.tokens.tokenizer import load_tokenizer
from kvcluster.cli import app
from tests.router.conftest import StartRouter, router_starter
from tests.router.fakes import fake_workers, good


async def test_json_is_a_line_for_each_run_and_all_else_goes_to_stderr(tmp_path: Path) -> None:
    start: StartRouter = router_starter(load_tokenizer("gpt2"))
    async with fake_workers(good) as workers, start(workers, model="m") as router:
        words = ["bench", str(router.client.base_url), "--model", "m", "--limit", "3", "--repeats", "2", "--rate", "50"]
        file = str(tmp_path / "first.json")
        ended = await asyncio.to_thread(CliRunner().invoke, app, [*words, "--json", "--result", file])
    assert ended.exit_code == 0, ended.output
    printed = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [(each["seed"], each["requests"]) for each in printed] == [(0, 3), (1, 3)]
    assert json.loads((tmp_path / "first.json").read_text()) == printed[0]
    assert "round_robin" in ended.stderr
