"""docs/router.md lists every flag with its default, every cause and every reason."""

from __future__ import annotations

import re
from pathlib import Path

from router.core.decision import Reason
from router.discovery.listwatch import Cause as DiscoveryCause
from router.discovery.listwatch import Relist
from router.settings import Settings
from router.upstream.interface import FailureCause

DOCUMENT = (Path(__file__).parents[2] / "docs" / "router.md").read_text()


def test_every_flag_is_documented() -> None:
    flags = {"--" + name.replace("_", "-") for name in Settings.model_fields}
    rows = re.findall(r"^\| (`--[^|]*) \| ([^|]*)\|", DOCUMENT, re.MULTILINE)
    documented = {flag: defaults for flags_, defaults in rows for flag in re.findall(r"--[a-z-]+", flags_)}
    assert flags == set(documented)
    for name, field in Settings.model_fields.items():
        if isinstance(field.default, int | float | str) and not isinstance(field.default, bool):
            shown = documented["--" + name.replace("_", "-")]
            text = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
            assert re.search(rf"(^|\W){re.escape(text)}(\.0)?(\W|$)", shown), (name, field.default, shown)


def test_every_cause_and_reason_is_documented() -> None:
    for name in [*FailureCause, *Reason, *DiscoveryCause, *Relist]:
        assert f"`{name.value}`" in DOCUMENT, name
