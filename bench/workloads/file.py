"""Workload files: the model of the YAML, and reading it. What it generates is in `bench/workloads/mixed.py`.

Every problem of a file is reported with its line and field, all of them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from bench.workloads.arrivals import Arrivals, Process
from bench.workloads.base import WorkloadError
from bench.workloads.distributions import Constant, Distribution, Positive, Strict

MAX_BYTES = 2**20
SUFFIXES = (".yaml", ".yml")
BuiltIn = Literal["rag", "chat", "uniform", "hot", "answers", "agents"]
"""Those that one model serves and that can be a part of others."""


class ArrivalProcess(Strict):
    """How requests, or sessions, come; see `bench/workloads/arrivals.py`."""

    process: Process = Process.POISSON
    cv: Annotated[float | None, Field(description="Coefficient of variation of gamma's gaps.")] = None

    @model_validator(mode="after")
    def _valid(self) -> Self:
        self.arrivals()
        return self

    def arrivals(self) -> Arrivals:
        """The process. Raises `ValueError` for a CV that does not go with it."""
        return Arrivals(self.process, self.cv)


class Prefix(Strict):
    """Tokens at the beginning that prompts share: each has one of `pool` different ones."""

    tokens: Annotated[int, Field(ge=1, le=10_000_000)]
    pool: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    zipf: Annotated[float, Field(ge=0, le=10)] = 0.0
    """The one of rank r is chosen with a weight of 1 / r**zipf; 0: all alike."""


class Sessions(Strict):
    """Each prompt repeats the prompts and answers of its session before it."""

    turns: Distribution
    """Requests of a session."""
    pause: Distribution
    """Seconds from one turn to the next, whenever the answer comes: the loop is open."""


class _Part(Strict):
    name: Annotated[str, Field(min_length=1, max_length=100)]
    weight: Positive = 1.0
    """Its share of the requests, in proportion to the other parts."""


class BuiltInPart(_Part):
    """The requests of a built-in workload, which decides everything but how many there are."""

    workload: BuiltIn


class Part(_Part):
    """Requests that the file describes."""

    prefixes: Annotated[tuple[Prefix, ...], Field(max_length=16)] = ()
    """They follow one another, then comes what no other request has."""
    prompt: Distribution
    """Tokens of a prompt that no other request has; in a session, those of each turn."""
    output: Distribution = Constant(value=32)
    """Tokens of the answer."""
    sessions: Sessions | None = None


def _kind(part: object) -> str:
    return "built-in" if isinstance(part, BuiltInPart) or (isinstance(part, dict) and "workload" in part) else "part"


AnyPart = Annotated[
    Annotated[BuiltInPart, Tag("built-in")] | Annotated[Part, Tag("part")],
    Discriminator(_kind),
]


class WorkloadFile(Strict):
    """A whole file."""

    name: Annotated[str | None, Field(max_length=100)] = None
    """Default: the name of the file."""
    requests: Annotated[int, Field(ge=1, le=100_000_000)]
    """How many; `--limit` overrides it."""
    rate: Positive
    """Requests a second on average, of all parts together; `--rate` overrides it."""
    arrivals: ArrivalProcess = ArrivalProcess()
    """Of each part's requests or sessions; `--arrivals` and `--cv` override it."""
    parts: Annotated[tuple[AnyPart, ...], Field(max_length=64)]

    @field_validator("parts")
    @classmethod
    def _distinct(cls, parts: tuple[AnyPart, ...]) -> tuple[AnyPart, ...]:
        names = [part.name for part in parts]
        if not parts:
            raise ValueError("there must be at least one")
        if len(set(names)) < len(names):
            raise ValueError(f"two parts have the name {next(name for name in names if names.count(name) > 1)!r}")
        return parts


def load_file(path: Path) -> WorkloadFile:
    """The workload in this file. Raises `WorkloadError`, with the line and the field of every problem."""
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise WorkloadError(f"cannot read the workload {path}: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise WorkloadError(f"the workload {path} is larger than {MAX_BYTES // 2**20} MiB")
    try:
        # No aliases: a few lines of nested ones can stand for billions of values.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(data, Loader=yaml.SafeLoader)):
            raise WorkloadError(f"the workload {path} has YAML aliases, which are not supported")
        tree = yaml.compose(data, Loader=yaml.SafeLoader)
        fields = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise WorkloadError(f"{path}{where}: it is not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(fields, dict):
        raise WorkloadError(f"{path}, line 1: a workload is a mapping with requests, rate and parts")
    try:
        return WorkloadFile.model_validate(fields)
    except ValidationError as invalid:
        problems = [_problem(tree, error["loc"], _message(error["msg"])) for error in invalid.errors()]
        raise WorkloadError("\n".join(f"{path}, {problem}" for problem in problems)) from None


def _message(said: str) -> str:
    words = said.removeprefix("Value error, ").replace("Extra inputs are not permitted", "there is no such field")
    return words[:1].lower() + words[1:]


def _problem(tree: yaml.Node | None, loc: Sequence[int | str], message: str) -> str:
    """`line 4, parts[0].prompt.sigma: message`. Steps of `loc` that only name the member of a union are left out."""
    node, line, path = tree, 1, ""
    for position, step in enumerate(loc):
        below = None
        if isinstance(node, yaml.MappingNode):
            below = next((pair for pair in node.value if pair[0].value == str(step)), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            below = (node.value[step], node.value[step])
        if below is not None:
            node, line = below[1], below[0].start_mark.line + 1
        elif not (message.startswith("field required") and position == len(loc) - 1):
            continue
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else str(step)
    return f"line {line}, {path or 'the file'}: {message}"
