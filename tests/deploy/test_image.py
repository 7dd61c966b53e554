"""The image: what its Dockerfile says, and (where KVCLUSTER_IMAGE_VENV names one) the environment that goes into it.

Not covered: the build by Docker itself (.github/workflows), and the base image.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import tomllib
from asyncio import create_subprocess_exec
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest

from deploy.helm.docs import CHART, ROOT
from tests.processes import eventually, free_port

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
VENV_SCRIPT = (ROOT / "deploy" / "image" / "venv.sh").read_text(encoding="utf-8")
PACKAGES = ("kvcache", "runtime", "worker", "router", "controller", "bench", "kvcluster")

BASE_MEGABYTES = 130
"""Of python:3.12-slim, uncompressed."""
IMAGE_MEGABYTES = 485


def instructions(text: str) -> list[tuple[str, str]]:
    """Instruction and argument of each line, continued lines joined."""
    lines = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.strip().partition(" ") for line in lines) if word]


def stages() -> list[list[tuple[str, str]]]:
    """The instructions of each stage, from its FROM on."""
    found: list[list[tuple[str, str]]] = []
    for word, rest in instructions(DOCKERFILE):
        if word == "FROM":
            found.append([])
        if found:
            found[-1].append((word, rest))
    return found


def test_two_stages_of_one_base_that_a_build_argument_names() -> None:
    assert [stage[0] for stage in stages()] == [("FROM", "${BASE} AS builder"), ("FROM", "${BASE}")]
    [base] = [rest for word, rest in instructions(DOCKERFILE) if word == "ARG" and rest.startswith("BASE=")]
    assert re.fullmatch(r"BASE=python:3\.\d+-slim", base)


def test_the_final_stage_installs_nothing_and_runs_as_a_numeric_user() -> None:
    words = [word for word, _ in stages()[-1]]
    assert not {"RUN", "ENTRYPOINT", "CMD", "ADD"} & set(words)
    user = dict(stages()[-1])["USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert f'"default": {user.partition(":")[0]}' in (CHART / "values.schema.json").read_text(encoding="utf-8")


def test_what_the_build_copies_is_let_in() -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = re.search(r"cp -R (.*?) \"\$copy\"", VENV_SCRIPT)
    assert copied is not None
    assert set(PACKAGES) <= set(copied[1].split())
    assert {f"!{path}" for path in copied[1].split()} <= set(ignore)
    assert {"*", "!deploy/image", "**/__pycache__"} <= set(ignore)


def test_every_package_and_data_file_is_in_the_wheel() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert {f"{package}*" for package in PACKAGES} == set(setuptools["packages"]["find"]["include"])
    for package in PACKAGES:
        folder = ROOT / package
        covered = {file for glob in setuptools["package-data"].get(package, ()) for file in folder.glob(glob)}
        data = {file for file in folder.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
        assert data <= covered, f"pyproject.toml leaves out {sorted(map(str, data - covered))}"
        assert all((file.parent / "__init__.py").exists() for file in folder.rglob("*.py")), package


PROCESSES = ["controller.main", "router.main", "worker.main", "worker.agent.main"]
"""What the containers of the chart and of the controller's Deployments run."""


def test_the_image_finds_the_bytecode_where_its_build_puts_it() -> None:
    [installed] = re.findall(r"venv\.sh python (\S+)", DOCKERFILE)
    environment = " ".join(rest for word, rest in stages()[-1] if word == "ENV")
    assert f"PYTHONPYCACHEPREFIX={installed}/pycache" in environment
    assert '/pycache" ' in VENV_SCRIPT


@pytest.mark.parametrize("module", PROCESSES)
def test_what_pods_run_exists(module: str) -> None:
    assert importlib.util.find_spec(module) is not None


# --- the environment itself -------------------------------------------------------------------------------

VENV = os.environ.get("KVCLUSTER_IMAGE_VENV")
CACHED = {"PYTHONPYCACHEPREFIX": f"{Path(VENV).resolve() / 'pycache'}" if VENV else ""}
"""Where the image's processes find bytecode."""
needs_venv = pytest.mark.skipif(
    not VENV, reason="KVCLUSTER_IMAGE_VENV names no environment (deploy/image/venv.sh makes one)"
)


@needs_venv
def test_the_image_is_small() -> None:
    files = [file for file in Path(str(VENV)).rglob("*") if not file.is_symlink() and file.is_file()]
    # Bytecode beside its source is what other tests' processes left: the image's lies in a folder of its own.
    megabytes = sum(file.stat().st_size for file in files if "__pycache__" not in file.parts) / 1e6
    assert megabytes + BASE_MEGABYTES < IMAGE_MEGABYTES
    assert not [file for file in files if file.parts[-2:] == ("pip", "__init__.py")]


@needs_venv
@pytest.mark.process
@pytest.mark.parametrize("module", PROCESSES)
def test_every_process_starts_from_it(module: str) -> None:
    python = str(Path(str(VENV)) / "bin" / "python")
    environment = {"PATH": os.environ["PATH"], "HOME": "/proc", "PYTHONSAFEPATH": "1"}
    command = [python, "-m", module, "--help"]
    ended = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert module in ended.stdout


UNCOMPILED = """
import importlib, pathlib, sys
for module in {modules!r}:
    importlib.import_module(module)
for module in tuple(sys.modules.values()):
    cached = getattr(getattr(module, "__spec__", None), "cached", None)
    if cached and not pathlib.Path(cached).exists():
        print(module.__name__)
"""


@needs_venv
@pytest.mark.process
@pytest.mark.parametrize("module", [*PROCESSES, "router.discovery.kubernetes"])
def test_nothing_is_compiled_at_the_start_of_a_process(module: str) -> None:
    python = str(Path(str(VENV)) / "bin" / "python")
    environment = {"PATH": os.environ["PATH"], **CACHED, "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    code = UNCOMPILED.format(modules=[module])
    ended = subprocess.run([python, "-c", code], cwd="/", env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout == ""


@needs_venv
@pytest.mark.process
def test_a_tokenizer_that_only_transformers_can_read_is_read_in_it(tmp_path: Path) -> None:
    for name, there in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        (tmp_path / there).write_bytes((ROOT / "kvcache" / "data" / "gpt2" / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    code = (
        "import sys; from kvcache.tokens.tokenizer import load_tokenizer; "
        "print(load_tokenizer(sys.argv[1]).encode('def hello():') == load_tokenizer('gpt2').encode('def hello():'))"
    )
    command = [str(Path(str(VENV)) / "bin" / "python"), "-c", code, str(tmp_path)]
    environment = {"PATH": os.environ["PATH"], "HOME": "/proc", "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=False)
    assert ended.stdout.strip() == "True", ended.stderr


@asynccontextmanager
async def _process(folder: Path, module: str, *flags: str) -> AsyncIterator[Process]:
    """A process as a pod runs it: nothing but /tmp can be written, and the source code is not at hand."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": "/proc",
        "TMPDIR": str(folder),
        "HF_HOME": str(folder / "huggingface"),
        "PYTHONSAFEPATH": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        **CACHED,
    }
    python = str(Path(str(VENV)) / "bin" / "python")
    process = await create_subprocess_exec(
        python, "-m", module, *flags, cwd="/", env=environment, stdout=PIPE, stderr=STDOUT
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        output = (await process.stdout.read()).decode()
        assert await process.wait() == 0, output


@needs_venv
@pytest.mark.process
async def test_a_worker_and_a_router_run_from_it(tmp_path: Path) -> None:
    worker_port, port, management = str(free_port()), str(free_port()), str(free_port())
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(httpx.AsyncClient(timeout=30, trust_env=False))
        worker = f"http://127.0.0.1:{worker_port}"
        flags = ("--host=127.0.0.1", f"--port={worker_port}", "--speed=100")
        await stack.enter_async_context(_process(tmp_path, "worker.main", *flags))
        flags = ("--host=127.0.0.1", f"--port={port}", f"--management-port={management}", f"--workers={worker}")
        await stack.enter_async_context(_process(tmp_path, "router.main", *flags))

        async def ready() -> bool:
            try:
                return (await client.get(f"http://127.0.0.1:{management}/ready")).status_code == 200
            except httpx.HTTPError:
                return False

        await eventually(ready, "the router is ready", 60)
        body = {"prompt": "def hello():", "max_tokens": 8}
        answer = await client.post(f"http://127.0.0.1:{port}/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] > 0
