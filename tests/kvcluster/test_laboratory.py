"""The commands of docs/laboratory.md in virtual time work as they are written, and the others have options that exist.

Not covered: `compare` and `bench` against processes (tests/e2e), and figures of runs as long as those on the page.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from kvcluster.cli import app

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "laboratory.md").read_text(encoding="utf-8")
TRACES = {
    "BurstGPT_3.csv": "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    + "".join(f"{n}.0,{n % 3},1,GPT-4,{60 + n},20,{80 + n},Conversation log\n" for n in range(20)),
    "AzureLLMInferenceTrace_conv.csv.gz": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    + "".join(f"2023-11-16 18:15:{n:02}.6805900,{600 + n},20\n" for n in range(20)),
}
"""In place of the traces that the page names: files of their form."""


def commands() -> list[list[str]]:
    """The words of every command on the page."""
    blocks = re.findall(r"^```console\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix("$ ")) for line in lines if line.startswith("$ ")]


SIMULATED = [words[1:] for words in commands() if words[1] == "simulate"]


@pytest.mark.simulation
@pytest.mark.parametrize("words", SIMULATED, ids=lambda words: " ".join(words[2:])[:70])
def test_a_simulation_on_the_page_runs(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # drawing takes seconds, and has its own tests
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name, text in TRACES.items():
        (tmp_path / name).write_text(text)
    short = re.sub(r"--limit \d+", "--limit 60" if "--warm-up" in words else "--limit 12", shlex.join(words))
    ended = CliRunner().invoke(app, [*shlex.split(short), "--tolerance", "0.5", "--out", "results"])
    assert ended.exit_code == 0, ended.output
    assert (tmp_path / "results" / "report.html").stat().st_size > 5000


def test_every_option_on_the_page_exists() -> None:
    cli = get_command(app)
    for _, name, *words in commands():
        known = {option for parameter in cli.commands[name].params for option in parameter.opts}  # type: ignore[attr-defined]
        assert {word for word in words if re.fullmatch(r"--?[a-z-]+", word)} <= known
    mentioned = set(re.findall(r"`(--[a-z-]+)", PAGE)) - {"--save-result", "--save-detailed", "--dataset-name"}
    measuring = [cli.commands[name] for name in ("bench", "compare", "simulate")]  # type: ignore[attr-defined]
    options = {option for command in measuring for parameter in command.params for option in parameter.opts}
    assert mentioned <= options


def test_every_option_about_workloads_and_measurement_is_on_the_page() -> None:
    from kvcluster.options import LoadOptions, MeasureOptions

    elsewhere = {"workload", "api", "format"}
    for group in (LoadOptions, MeasureOptions):
        for name in group.__dataclass_fields__:
            if name not in elsewhere:
                assert f"--{name.replace('_', '-')}" in PAGE, name
