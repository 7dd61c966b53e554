"""`python -m runtime.envoy.seed FILE`: makes the file in which Envoy finds the workers, so that it can start.

Envoy does not start without the file, which only the router fills: later, and never anew if it is there already.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from runtime.envoy.bootstrap import endpoints


def main() -> None:
    """The command line above."""
    file = Path(sys.argv[1])
    if not file.exists():
        file.write_text(json.dumps(endpoints((), 0)), encoding="utf-8")


if __name__ == "__main__":
    main()
