"""Options that several commands share: how a router is named, and those of the laboratory. Each group of these is a
dataclass, and a command that `takes` it gets its options and an instance of it in their place."""

from __future__ import annotations

import inspect
import os
import ssl
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from runtime.http.hosts import PROGRAM_HEADERS
from runtime.http.tokens import token_headers

_LOAD = "Workload"
_MEASURE = "Measurement"
_ENDPOINT = "Endpoint"

CA_VARIABLE = "KVCLUSTER_CA"
"""Environment variable with a file of authorities, for what `--ca` is for."""
API_KEY_VARIABLE = "KVCLUSTER_API_KEY"
"""Environment variable with an API key of the data port. An option would be seen in the list of processes."""

TOKEN_VARIABLE = "KVCLUSTER_MANAGEMENT_TOKEN"  # noqa: S105  its name, not its value
"""Environment variable with a token of the management port. An option would be seen in the list of processes."""
LOCAL_ROUTER = "http://127.0.0.1:9000"
"""Management URL of the router in local mode."""


Ca = Annotated[
    Path | None,
    typer.Option("--ca", envvar=CA_VARIABLE, metavar="FILE", help="Authorities to trust an https:// URL by, in PEM."),
]


def tls_context(ca: Path | None) -> ssl.SSLContext:
    """How servers' certificates are checked: by the authorities in this file, or in that of `CA_VARIABLE`, or else by
    those of this machine. Raises `ValueError`."""
    ca = ca or (Path(named) if (named := os.environ.get(CA_VARIABLE)) else None)
    try:
        return ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise ValueError(
            f"--ca (or {CA_VARIABLE}) {ca}: {error.strerror or error}; it takes certificates in PEM"
        ) from None


def management_headers() -> dict[str, str]:
    """What the commands send to a management port: that they are programs, and the token in the environment, if any."""
    return {**PROGRAM_HEADERS, **token_headers(os.environ.get(TOKEN_VARIABLE, "").strip())}


def management_url(text: str) -> str:
    """The base of a router's management port: with a scheme, and without the path of its metrics."""
    url = text if "://" in text else f"http://{text}"
    return url.rstrip("/").removesuffix("/metrics")


def takes(name: str, group: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replaces the parameter `name` of a command by the options that the dataclass `group` declares."""
    hints = get_type_hints(group, include_extras=True)
    options = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]
    names = [option.name for option in options]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(**given: Any) -> None:
            made = group(**{each: given.pop(each) for each in names})
            command(**given, **{name: made})

        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            kept = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            parameters += options if parameter.name == name else [kept]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _option(help_text: str, *names: str, panel: str = _LOAD, **more: Any) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=panel, **more)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Which requests come, and when. None stands for the workload's own default."""

    workload: Annotated[
        str | None,
        _option(
            "rag, chat, uniform, hot, answers, adapters, agents or trace, or a YAML file. Default: rag, or trace with "
            "--trace.",
            "--workload",
            "-w",
            metavar="NAME|FILE",
        ),
    ] = None
    trace: Annotated[
        Path | None,
        _option(
            "Recorded requests: of Mooncake, BurstGPT, Azure, vLLM or `kvcluster record`; also as .gz.", metavar="FILE"
        ),
    ] = None
    format: Annotated[
        str | None,
        _option(
            "Of the trace: mooncake, burstgpt, azure, vllm-dataset or vllm-result. Default: what its content shows.",
            metavar="NAME",
        ),
    ] = None
    limit: Annotated[int | None, _option("Send this many requests only.", min=1, metavar="N")] = None
    rate: Annotated[
        float | None,
        _option("Mean arrivals per emulated second; default: the workload's own rate.", metavar="R"),
    ] = None
    time_scale: Annotated[
        float | None, _option("Replay the trace this many times as fast.", "--time-scale", metavar="X")
    ] = None
    arrivals: Annotated[
        str | None,
        _option("constant, poisson or gamma. Default: poisson; for a trace, its recorded arrivals.", metavar="PROCESS"),
    ] = None
    cv: Annotated[
        float | None,
        _option(
            "Coefficient of variation of gamma's gaps; above 1, requests come in bursts. Default: 2.", metavar="CV"
        ),
    ] = None
    shared_prefix: Annotated[
        int,
        _option("Tokens that prompts of a trace share, where it records only lengths.", min=0, metavar="TOKENS"),
    ] = 0
    prefixes: Annotated[
        int, _option("How many different shared prefixes there are; each request has one.", min=1, metavar="N")
    ] = 1
    share_sessions: Annotated[
        bool,
        _option("Prompts of one session of the trace begin alike, where it names sessions.", "--share-sessions"),
    ] = False
    as_text: Annotated[
        bool,
        _option("Send prompts of token ids as text: some routers and engines take no ids.", "--as-text"),
    ] = False
    seed: Annotated[int, _option("Seed of the workload.", min=0, metavar="K")] = 0
    context: Annotated[
        int | None,
        _option(
            "Longest request, for agents and the sessions of a file; default: the manifest's.", min=1, metavar="TOKENS"
        ),
    ] = None
    api: Annotated[str, _option("How agents is sent: chat or messages.", metavar="NAME")] = "chat"


@dataclass(frozen=True, slots=True)
class EndpointOptions:
    """How requests are let in, and whom they trust."""

    api_key_file: Annotated[
        Path | None,
        _option(
            f"File with the API key to send, in place of the variable {API_KEY_VARIABLE}.",
            panel=_ENDPOINT,
            metavar="FILE",
        ),
    ] = None
    ca: Annotated[
        Path | None,
        _option(
            "Authorities to trust an https:// URL by, in PEM.", panel=_ENDPOINT, envvar=CA_VARIABLE, metavar="FILE"
        ),
    ] = None

    def headers(self) -> dict[str, str]:
        """With the API key, if there is one. Raises `OSError` or `ValueError`."""
        if self.api_key_file is None:
            key = os.environ.get(API_KEY_VARIABLE, "").strip()
            return {"authorization": f"Bearer {key}"} if key else {}
        key = self.api_key_file.read_text(encoding="utf-8").strip()
        if not key or len(key.split()) > 1:
            raise ValueError(f"--api-key-file {self.api_key_file} does not hold one API key and nothing else")
        return {"authorization": f"Bearer {key}"}


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """What is measured, and how often."""

    warm_up: Annotated[
        str,
        _option(
            "Leave the first requests out of the figures: a number of them, or a time such as 30s.",
            panel=_MEASURE,
            metavar="N|TIME",
        ),
    ] = "0"
    repeats: Annotated[
        int,
        _option(
            "Run as often, with the seeds K, K+1, ..., for confidence intervals.", min=1, panel=_MEASURE, metavar="N"
        ),
    ] = 1
    slo_ttft: Annotated[
        str | None,
        _option("Most time to first token of a request, for example 500ms.", panel=_MEASURE, metavar="TIME"),
    ] = None
    slo_tpot: Annotated[
        str | None,
        _option("Most time per output token of a request, for example 50ms.", panel=_MEASURE, metavar="TIME"),
    ] = None
    find_rate: Annotated[
        bool,
        _option(
            "Search for the highest rate that meets the SLO, from --rate or the workload's own on.",
            "--find-rate",
            panel=_MEASURE,
        ),
    ] = False
    attainment: Annotated[
        float,
        _option("Share of the requests that must meet the SLO, for --find-rate.", panel=_MEASURE, metavar="SHARE"),
    ] = 0.9
    tolerance: Annotated[
        float,
        _option(
            "--find-rate ends when a rate that fails is above one that passes by at most this share.",
            panel=_MEASURE,
            metavar="SHARE",
        ),
    ] = 0.05
    raw: Annotated[
        Path | None,
        _option(
            "Also write one line of JSON per request: FILE with the contender's name before its ending.",
            panel=_MEASURE,
            metavar="FILE",
        ),
    ] = None
