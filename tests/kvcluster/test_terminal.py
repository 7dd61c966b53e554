"""What becomes of a command whose standard output is closed, full, or read by nobody.

Not covered: what each command writes there (the tests of the commands).
"""

from __future__ import annotations

import subprocess
import sys

import pytest

WRITE = """
import sys
from kvcluster.terminal import exits, writing

@exits()
def command():
    with writing():
        sys.stdout.write("a figure")

raise SystemExit(command())
"""


@pytest.mark.parametrize(
    ("redirect", "code", "said"),
    [
        pytest.param(">&-", 1, "error: standard output is closed", id="closed"),
        pytest.param(">/dev/full", 1, "error: standard output cannot be written: No space left on device", id="full"),
        pytest.param("| :", 0, "", id="nobody reads"),
        pytest.param(">/dev/null", 0, "", id="well"),
    ],
)
def test_output_that_cannot_be_written(redirect: str, code: int, said: str) -> None:
    shell = f'set -o pipefail; "$0" -c "$1" {redirect}'
    ended = subprocess.run(["bash", "-c", shell, sys.executable, WRITE], capture_output=True, text=True, check=False)
    assert (ended.stderr.strip(), ended.returncode) == (said, code)
