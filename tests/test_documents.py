"""What the documents state about the code is true: links, paths and names, the drawing of the packages, metrics, and
the flags and settings on the pages about vLLM.

Not covered: commands (tests/e2e/test_documents.py, tests/deploy/test_helm_docs.py), and the generated tables and
figures of single pages, which the tests of those parts hold (docs/manifest.md, docs/status.md, docs/router.md,
docs/routing.md, docs/worker.md, docs/profiles.md, docs/states.md, docs/dashboards.md).
"""

from __future__ import annotations

import ast
import json
import re
import tomllib
from collections.abc import Iterable
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.parser import text_string_to_metric_families

from controller.metrics import ClusterCollector
from controller.metrics import Metrics as ControllerMetrics
from controller.reconcile.inventory import Inventory
from kvcache.paths import RESOURCES
from kvcache.tokens.tokenizer import load_tokenizer
from router.assembly import Router
from router.discovery.sources import StaticDiscovery
from router.metrics import DiscoveryCollector, FleetCollector, FlowCollector
from router.metrics.picker import PickerMetrics
from router.settings import Settings as RouterSettings
from tests.real_vllm.documents import PAGE, engine_flags
from worker.agent.agent import Agent
from worker.agent.main import App
from worker.agent.prompts import Expected
from worker.agent.settings import Settings as AgentSettings
from worker.emulator.generators import make_generator
from worker.main import Worker
from worker.settings import Settings as WorkerSettings

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(path.relative_to(ROOT) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")))
PACKAGES = ("kvcache", "runtime", "worker", "router", "controller", "bench", "kvcluster")
FOLDERS = (*PACKAGES, "tests", "docs", "deploy", "examples")
CHANGES = Path("CHANGELOG.md")
"""It may name what is gone."""


@cache
def text_of(document: Path) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


@cache
def files() -> frozenset[str]:
    """Every file of the repository's folders and at its root."""
    found = [*ROOT.glob("*"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*"))]
    return frozenset(
        str(file.relative_to(ROOT)) for file in found if file.is_file() and "__pycache__" not in file.parts
    )


# --- links and names ---


def anchors(document: Path) -> set[str]:
    """The anchors of a page's headings, as the repository host makes them."""
    prose = re.sub(r"^```.*?^```", "", text_of(document), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_somewhere(document: Path) -> None:
    prose = re.sub(r"`[^`\n]*`", "", text_of(document))
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        page = (ROOT / document.parent / path).resolve() if path else ROOT / document
        assert page.exists(), target
        if anchor:
            assert anchor in anchors(page.relative_to(ROOT)), target


def exists(path: str) -> bool:
    """Whether this is a file or a folder of the repository; `*` stands for part of a name."""
    pattern = re.compile(
        re.escape(path.rstrip("/")).replace(r"\*", "[^/]*") + ("/.*" if path.endswith("/") else "(/.*)?")
    )
    return any(pattern.fullmatch(file) for file in files())


def names(body: Iterable[ast.stmt], prefix: str = "") -> set[str]:
    """The names that a module defines, those of classes' members with the class before them."""
    found: set[str] = set()
    for statement in body:
        match statement:
            case ast.ClassDef():
                found |= {prefix + statement.name} | names(statement.body, f"{prefix}{statement.name}.")
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                found.add(prefix + statement.name)
            case ast.Assign():
                found |= {prefix + target.id for target in statement.targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                found.add(prefix + name)
    return found


def mentioned(document: Path) -> list[tuple[str, str]]:
    """(path, name or nothing) of every `path` and `path:name` in backticks, those within commands too."""
    prose = re.sub(r"^```.*?^```", "", text_of(document), flags=re.MULTILINE | re.DOTALL)
    path = re.compile(rf"((?:{'|'.join(FOLDERS)})/[\w./*-]*?)(?::([A-Za-z_][\w.]*))?")
    words = [word for span in re.findall(r"`([^`]+)`", prose) for word in span.split()]
    return [(found[1], found[2] or "") for word in words if (found := path.fullmatch(word))]


@pytest.mark.parametrize("document", [each for each in DOCUMENTS if each != CHANGES], ids=str)
def test_paths_and_names_exist(document: Path) -> None:
    missing = [
        f"{path}:{name}" if name else path
        for path, name in mentioned(document)
        if not exists(path) or (name and name not in names(ast.parse((ROOT / path).read_text()).body))
    ]
    assert missing == []


def test_the_walks_name_functions() -> None:
    assert len([name for _, name in mentioned(Path("ARCHITECTURE.md")) if name]) > 30


# --- the drawing of the packages ---


@cache
def imports() -> frozenset[tuple[str, str]]:
    """(package, package that it imports), from every import statement."""
    found = set()
    for file in files():
        package = file.partition("/")[0]
        if package not in PACKAGES or not file.endswith(".py"):
            continue
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found |= {(package, other) for each in modules if (other := each.partition(".")[0]) in PACKAGES}
    return frozenset((package, other) for package, other in found if package != other)


def reachable(edges: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    closure = set(edges)
    while more := {(a, d) for a, b in closure for c, d in closure if b == c} - closure:
        closure |= more
    return closure


def test_the_drawing_of_the_packages_shows_their_imports() -> None:
    drawing = re.search(r"^```mermaid\n(.*?)^```", text_of(Path("CONTRIBUTING.md")), re.MULTILINE | re.DOTALL)
    assert drawing is not None
    drawn = set(re.findall(r"^\s*(\w+) --> (\w+)$", drawing[1], re.MULTILINE))
    assert {package for edge in drawn for package in edge} == set(PACKAGES)
    assert reachable(drawn) == reachable(imports())
    assert all(reachable(drawn - {edge}) != reachable(drawn) for edge in drawn), "an arrow that others imply"


def test_the_drawing_keeps_to_the_import_contracts() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    forbidden = set()
    for contract in contracts:
        if contract["type"] == "independence":
            forbidden |= set(permutations(contract["modules"], 2))
        elif contract["type"] == "forbidden":
            forbidden |= {(a, b) for a in contract["source_modules"] for b in contract["forbidden_modules"]}
    between = {(a, b) for a, b in forbidden if a in PACKAGES and b in PACKAGES}
    assert between, "the contracts are read"
    assert not between & reachable(imports())


# --- docs/metrics.md ---

Described = dict[str, tuple[str, frozenset[str]]]
"""Name -> type and labels."""

ENGINE = {"engine", "model_name"}
CONFIGURATION = frozenset({"(configuration)"})


def documented(prefix: str) -> Described:
    rows = re.findall(r"^\| `([\w:]+)` \| (\w+) \|([^|]*)\|", text_of(Path("docs/metrics.md")), re.MULTILINE)
    assert len({name for name, _, _ in rows}) == len(rows), "a metric is documented twice"
    return {
        name: (kind, frozenset(filter(None, labels.strip().split(", "))))
        for name, kind, labels in rows
        if name.startswith(prefix)
    }


def exported(families: Iterable[Metric], prefix: str) -> Described:
    found: Described = {}
    for family in families:
        name = f"{family.name}_total" if family.type == "counter" else family.name
        if name.startswith(prefix) and not name.endswith("_created"):
            labels = {label for sample in family.samples for label in sample.labels} - {"le"}
            found[name] = (family.type, frozenset(labels))
    return found


async def ask_worker(path: str, **settings: Any) -> str:
    """The body of a new emulated worker's answer to GET."""
    tokenizer = load_tokenizer("gpt2")
    generator = make_generator("sampler", tokenizer, seed=0, mean_tokens=10)
    worker = Worker(WorkerSettings(**settings), tokenizer, generator, 8100)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(worker.app), base_url="http://worker") as client:
        text = (await client.get(path)).text
    worker.close()
    return text


async def test_the_routers_metrics() -> None:
    source = StaticDiscovery([])
    router = Router(RouterSettings(flow_control=True), source)
    picker = PickerMetrics(router.registry)
    # A family with labels has no sample before the first event, so its labels are read off its declaration.
    found = exported(router.registry.collect(), "kvcluster_router_")
    declared = [
        (family, metric)
        for metric in (*vars(router.metrics).values(), *vars(picker).values())
        for family in metric.describe()
    ]
    declared += [(family, family) for family in FleetCollector(router.fleet, router.clock).describe()]
    assert router.admission is not None
    declared += [(family, family) for family in FlowCollector(router.admission.flow).describe()]
    declared += [(family, family) for family in DiscoveryCollector(source.status).describe()]
    for family, labelled in declared:
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert name in found, f"{name} is not registered"
        labels = labelled.label_names if hasattr(labelled, "label_names") else labelled._labelnames
        found[name] = (family.type, frozenset(labels))
    await router.close()
    assert documented("kvcluster_router_") == found


async def test_the_agents_metrics() -> None:
    agent = Agent(AgentSettings(), lambda: Expected("-", ()), 8101)
    transport = httpx.ASGITransport(App(agent))
    async with httpx.AsyncClient(transport=transport, base_url="http://agent") as client:
        text = (await client.get("/metrics")).text
    agent.close()
    assert documented("kvcluster_agent_") == exported(text_string_to_metric_families(text), "kvcluster_agent_")


async def test_the_workers_metrics() -> None:
    families = list(text_string_to_metric_families(await ask_worker("/metrics", cpu_blocks=1)))
    assert documented("kvcluster_worker_") == exported(families, "kvcluster_worker_")
    expected = documented("vllm:")
    found = exported(families, "vllm:")
    assert expected.keys() == found.keys()
    for name, (kind, labels) in expected.items():
        assert found[name][0] == kind, name
        if labels != CONFIGURATION:
            assert found[name][1] == labels | ENGINE, name


def test_the_controllers_metrics() -> None:
    registry = CollectorRegistry()
    metrics, clusters = ControllerMetrics(registry), ClusterCollector(Inventory(), lambda: 0, dict)
    found: Described = {}
    for declared in (*vars(metrics).values(), clusters):
        for family in declared.describe():
            name = f"{family.name}_total" if family.type == "counter" else family.name
            labels = family._labelnames if declared is clusters else declared._labelnames
            found[name] = (family.type, frozenset(labels))
    assert documented("kvcluster_controller_") == found


# --- endpoints ---


def section(document: str, heading: str) -> str:
    """The text under a heading of the second level, up to the next heading."""
    found = re.search(rf"^## {heading}\n(.*?)^##", text_of(Path(document)), re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


async def test_every_endpoint_of_the_management_port_is_documented() -> None:
    router = Router(RouterSettings(), StaticDiscovery([]))
    served = {
        (method, route.path.replace(":path}", "}"))
        for route in router.management_app().routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    await router.close()
    documented = set()
    for cell in re.findall(r"^\| ([^|]*)\|", section("docs/router.md", "Management port"), re.MULTILINE):
        method = re.search(r"`(GET|POST) ", cell)
        documented |= {(method[1], path) for path in re.findall(r"(/[\w/{}]*)", cell) if method is not None}
    assert documented == served


async def test_every_endpoint_of_a_worker_is_documented() -> None:
    served = json.loads(await ask_worker("/openapi.json", dev_mode=True, allow_runtime_lora_updating=True))["paths"]
    documented = set(re.findall(r"(?<![\w.])(/[\w/]+)`", section("docs/worker.md", "Endpoints")))
    undescribed = {"/docs", "/redoc", "/openapi.json", "/v1/responses/ID", "/v1/responses/ID/cancel"}
    assert served.keys() - undescribed == documented - undescribed


def test_every_open_path_of_the_data_port_is_documented() -> None:
    (row,) = re.findall(
        r"^\| the rest of the inference APIs under `/v1/`:(.*)$", text_of(Path("docs/router.md")), re.MULTILINE
    )
    assert {*re.findall(r"`(\w+)`", row), "completions"} == RESOURCES


# --- the pages about vLLM ---

REAL = Path("docs/real-vllm.md")


def test_the_engines_flags_are_what_agent_and_router_expect() -> None:
    flags, agent = engine_flags(), AgentSettings()
    assert agent.engine_url == f"http://127.0.0.1:{flags['--port']}"
    events = flags["--kv-events-config"]
    assert (events["enable_kv_cache_events"], events["publisher"], events["topic"]) == (True, "zmq", agent.topic)
    assert events["endpoint"].replace("*", "127.0.0.1") == agent.events_endpoint
    assert events["replay_endpoint"].replace("*", "127.0.0.1") == agent.replay_endpoint
    assert int(flags["--block-size"]) == RouterSettings().block_size
    assert flags.keys() >= {"--enable-prefix-caching", "--enable-prompt-tokens-details", "--shutdown-timeout"}


def test_every_setting_of_the_agent_is_on_the_page() -> None:
    listed = set(re.findall(r"`(--[a-z-]+)`", PAGE))
    assert {"--" + name.replace("_", "-") for name in AgentSettings.model_fields} <= listed


def test_the_suite_is_named_as_it_is() -> None:
    folder = ROOT / "tests" / "real_vllm"
    for file in re.findall(r"`(test_\w+\.py)`", text_of(REAL)):
        assert (folder / file).is_file()
    assert {path.name for path in folder.glob("test_*.py")} == set(re.findall(r"`(test_\w+\.py)`", text_of(REAL)))
    for module in re.findall(r"-m (tests\.\w+(?:\.\w+)*)", text_of(REAL)):
        assert ROOT.joinpath(*module.split(".")).with_suffix(".py").is_file()
    source = "".join(path.read_text() for path in folder.glob("*.py"))
    variables = set(re.findall(r"REAL_VLLM_[A-Z]+", text_of(REAL)))
    assert variables == set(re.findall(r"REAL_VLLM_[A-Z]+", source))
