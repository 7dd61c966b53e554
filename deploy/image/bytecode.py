"""Compiles what the image's processes import, into the folder that PYTHONPYCACHEPREFIX names.

    PYTHONPYCACHEPREFIX=VENV/pycache VENV/bin/python bytecode.py SITE-PACKAGES

Imports every module of ours, so that what they load later is loaded once here, and compiles all that was loaded; and
beyond that every small package and the standard library, of which modules are loaded by name at run time (codecs, event
loops, protocols).
"""

from __future__ import annotations

import compileall
import importlib
import pkgutil
import py_compile
import re
import sys
import sysconfig
from pathlib import Path

OURS = ("kvcache", "runtime", "worker", "router", "controller", "kvcluster")
LARGE = ("kubernetes", "transformers", "numpy", "huggingface_hub", "pygments", "torch", "bench")
"""Packages of which only what was imported is compiled."""
UNUSED = ("test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "ensurepip", "pydoc_data", "site-packages")
"""Parts of the standard library that no process imports."""
UNCHECKED = py_compile.PycInvalidationMode.UNCHECKED_HASH


def import_ours() -> None:
    """Imports every module of ours, as far as its libraries are in this image."""
    for package in OURS:
        folder = importlib.import_module(package).__path__
        for module in pkgutil.walk_packages(folder, f"{package}."):
            if module.name.endswith("__main__"):
                continue
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                if (error.name or "").partition(".")[0] in OURS:
                    raise
                # A library of an extra that this image goes without.


def compile_loaded(folder: Path) -> None:
    """Compiles the modules under this folder that were imported."""
    for module in tuple(sys.modules.values()):
        source = getattr(module, "__file__", None)
        if source and source.endswith(".py") and Path(source).is_relative_to(folder):
            py_compile.compile(source, doraise=True, invalidation_mode=UNCHECKED)


def compile_all(folder: Path, excluded: tuple[str, ...]) -> None:
    """Compiles every module under this folder but those in folders of these names directly beneath it."""
    pattern = re.compile(re.escape(f"{folder}/") + f"(?:{'|'.join(excluded)})/|/tests?/")
    # Some packages ship templates that are no Python of this version: they fail by themselves, when somebody asks.
    compileall.compile_dir(folder, maxlevels=20, quiet=2, rx=pattern, invalidation_mode=UNCHECKED, workers=1)


def main() -> None:
    """The command line above."""
    if sys.pycache_prefix is None:
        raise SystemExit("bytecode.py: PYTHONPYCACHEPREFIX names no folder")
    packages = Path(sys.argv[1])
    import_ours()
    compile_loaded(packages)
    compile_all(packages, LARGE)
    compile_all(Path(sysconfig.get_path("stdlib")), UNUSED)


if __name__ == "__main__":
    main()
