"""The command `kvcluster top`: what its arguments mean, lines of JSON, and exit codes.

Not covered: the terminal (test_app.py), and the process before a running cluster (tests/e2e/test_figures.py).
"""

from __future__ import annotations

import orjson
import pytest
from typer.testing import CliRunner

from kvcluster.cli import app
from kvcluster.commands.top import Target, print_json, target
from kvcluster.options import LOCAL_ROUTER
from kvcluster.top.sources import SourceError
from router.live.document import decode
from tests.kvcluster.top.scripted import ScriptedSource, change, whole
from tests.kvcluster.top.test_following import FIRST, SECOND
from tests.virtual import CountingLoop, run


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (None, Target(LOCAL_ROUTER)),
        ("http://10.0.0.7:9000/", Target("http://10.0.0.7:9000")),
        ("localhost:9000", Target("http://localhost:9000")),
        ("rag", Target(None, "rag", "ns")),
    ],
    ids=["nothing", "a URL", "host and port", "a name"],
)
def test_what_is_looked_at(text: str | None, meant: Target) -> None:
    assert target(text, "ns", None, None) == meant


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["http://127.0.0.1:1", "--once"], 1, "error: http://127.0.0.1:1 cannot be read: "),
        (["http://127.0.0.1:1", "--json"], 1, "error: http://127.0.0.1:1 cannot be read: "),
        (["--sort", "colour"], 2, "error: --sort takes one of worker, state, "),
        (["No_Name", "--once"], 2, "error: 'No_Name' is no name: use lower-case letters"),
        (["rag", "--kubeconfig", "/nowhere"], 2, "error: "),
    ],
    ids=["nobody there", "nobody there for lines", "no column", "no name", "no cluster"],
)
def test_refusals(args: list[str], code: int, said: str) -> None:
    result = CliRunner().invoke(app, ["top", *args])
    assert (result.exit_code, said in result.stderr) == (code, True), result.output


def test_each_document_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    found: list[bytes] = []
    source = ScriptedSource([[whole(FIRST), SourceError("it\x1b[2J broke off")], [whole(FIRST), change(FIRST, SECOND)]])

    def write(line: bytes) -> None:
        found.append(line)
        if len(found) == 3:
            raise BrokenPipeError

    async def main(loop: CountingLoop) -> None:
        await print_json(source, once=False, write=write)

    with pytest.raises(BrokenPipeError):
        run(main)
    assert [decode(line) for line in found] == [FIRST, FIRST, SECOND]
    assert capsys.readouterr().err == "error: it\\x1b[2J broke off; connecting again\n"


def test_what_sends_no_document_is_no_router() -> None:
    async def main(loop: CountingLoop) -> None:
        for pieces in ([], [b"<html>not a router</html>"]):
            with pytest.raises(SourceError, match="sends no live document: is it the management port of a router"):
                await print_json(ScriptedSource([pieces]), once=False)

    run(main)


def test_once_is_one_line() -> None:
    found: list[bytes] = []

    async def main(loop: CountingLoop) -> None:
        await print_json(ScriptedSource([[orjson.dumps(FIRST)]]), once=True, write=found.append)

    run(main)
    assert [decode(line) for line in found] == [FIRST]
