"""The file that lists the adapters an engine should have loaded.

A JSON array of objects with `name` and `source` (a folder, or a Hugging Face id); further fields are ignored. It may
change at any time: in a pod it is a mounted ConfigMap.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson


class WantedAdaptersError(ValueError):
    """The file cannot be read; the message says why."""


def read_wanted(path: Path) -> Mapping[str, str]:
    """Source of each adapter, by name. Raises `WantedAdaptersError`."""
    try:
        entries = orjson.loads(path.read_bytes())
    except OSError as error:
        raise WantedAdaptersError(f"{path} cannot be read: {error.strerror or error}") from None
    except orjson.JSONDecodeError as error:
        raise WantedAdaptersError(f"{path} is not JSON: {error}") from None
    if not isinstance(entries, list):
        raise WantedAdaptersError(f"{path} must hold a JSON array of adapters, each with name and source")
    return dict(_entry(entry, path) for entry in entries)


def _entry(entry: Any, path: Path) -> tuple[str, str]:
    name, source = (entry.get("name"), entry.get("source")) if isinstance(entry, dict) else (None, None)
    if not (isinstance(name, str) and name and isinstance(source, str) and source):
        raise WantedAdaptersError(f"{path}: an adapter is an object with name and source, not {entry!r:.80}")
    return name, source
