"""Settings of one router process: environment variables `ROUTER_*`, overridden by kebab-case flags."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, Field, PositiveFloat, PositiveInt, SecretStr, StringConstraints, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from kvcache.profiles import DEFAULT_PROFILE, PROFILES, Profile, parse_latency, profile
from router.core.flow import FlowPolicy, check_classes, parse_class
from router.core.strategies import STRATEGIES, find_strategy
from router.discovery.sources import entries, listed_workers, worker_url
from router.server.cors import ANY
from router.server.paths import is_plain
from runtime.settings import ChatSettings, SettingsError, split_list

ORIGIN = r"[a-z][a-z0-9+.-]*://[^/?#\s,]+"
"""The form of the header `Origin` that a browser sends."""
DNS_LABEL = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
"""The form of the names of Services and namespaces."""


POOL_NAME = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
"""The form of the name of an InferencePool."""

DnsLabel = Annotated[str, StringConstraints(pattern=DNS_LABEL)]
HostName = Annotated[
    str, StringConstraints(to_lower=True, max_length=253, pattern=r"^(\*|\.?[a-zA-Z0-9_-]+(\.[a-zA-Z0-9_-]+)*)$")
]
_NUMBER = re.compile(r"-?[0-9]{1,9}")


class Settings(ChatSettings):
    """The settings of one router."""

    model_config = SettingsConfigDict(env_prefix="ROUTER_", cli_prog_name="python -m router.main")

    host: str = Field("::", description="address of the data port; ::, every one of IPv6 and IPv4")
    port: int = Field(8000, ge=0, le=65535, description="data port (the OpenAI API); 0 takes a free one")
    fd: int | None = Field(None, ge=0, description="file descriptor of an inherited listening socket for the data port")
    management_host: str = Field("::", description="address of the management port; ::, every one of IPv6 and IPv4")
    management_port: int = Field(
        9000, ge=0, le=65535, description="management port (health, metrics, /workers, /internal); 0 takes a free one"
    )
    management_fd: int | None = Field(
        None, ge=0, description="file descriptor of an inherited listening socket for the management port"
    )
    management_names: Annotated[tuple[HostName, ...], NoDecode] = Field(
        (),
        description="names by which the management port may be asked (router.example.com; .example.com: all under it; "
        "*: any), beside addresses, names of one label and those of a cluster; separate by commas",
    )

    management_token_file: Path | None = Field(
        None,
        description="file with a token a line, or folder of such files, one of which every request to the management "
        "port must show, probes and the page's files excepted (docs/security.md); read again when it changes. The "
        "first (in a folder, of the file `token`) is shown to `--peers`",
    )
    management_open_metrics: bool = Field(
        False, description="whether `GET /metrics` needs no token, for a Prometheus that cannot show one"
    )

    strategy: str = Field(
        "cache_aware",
        validation_alias=AliasChoices("ROUTING_STRATEGY", "ROUTER_STRATEGY"),
        description=f"how a worker is chosen: {', '.join(STRATEGIES)} (environment: ROUTING_STRATEGY)",
    )
    workers: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="workers: URL, or URL,feed=URL beside an agent; repeat or separate by commas"
    )
    workers_file: Path | None = Field(
        None, description="file with one worker a line (URL or URL,feed=URL), read again when it changes"
    )
    kubernetes_service: Annotated[tuple[DnsLabel, ...], NoDecode] = Field(
        (), description="Services whose EndpointSlices name the workers, separated by commas; they are watched"
    )
    inference_pool: str | None = Field(
        None,
        pattern=POOL_NAME,
        max_length=253,
        description="InferencePool whose pods are the workers, one for each of its target ports; it is watched",
    )
    objectives_pool: str | None = Field(
        None,
        pattern=POOL_NAME,
        max_length=253,
        description="InferencePool whose InferenceObjectives give priorities, where another source names the workers",
    )
    kubernetes_namespace: str | None = Field(
        None, pattern=DNS_LABEL, description="its namespace; default: the pod's own, else the kubeconfig context's"
    )
    kubernetes_kubeconfig: Path | None = Field(
        None, description="how to reach the API server; default: as a pod does, else $KUBECONFIG or ~/.kube/config"
    )

    model: str | None = Field(None, min_length=1, description="served model; default: whatever the workers serve")
    model_tokenizers: Annotated[tuple[tuple[str, str], ...], NoDecode] = Field(
        (), description="tokenizers of further models that workers serve: MODEL=TOKENIZER; separate by commas"
    )
    tokenizer: str = Field("gpt2", description="'gpt2' (bundled), a folder with a tokenizer, or a Hugging Face id")
    block_size: PositiveInt = Field(16, description="tokens of a block; those of the workers are multiples of it")
    history_blocks: PositiveInt | None = Field(
        None, description="blocks that a worker without a cache feed is taken to hold; default: the profile's"
    )
    profile: str = Field(DEFAULT_PROFILE, description=f"whose latencies to expect: {', '.join(sorted(PROFILES))}")
    latency: str = Field(
        "", description="times that differ from the profile's: NAME=SECONDS, separated by commas (docs/profiles.md)"
    )
    speed: PositiveFloat = Field(1.0, description="how many times as fast as the profile's GPU the workers are")

    liveness_timeout: PositiveFloat = Field(2.0, description="seconds of silence after which a worker is left out")
    view_timeout: PositiveFloat = Field(
        10.0, description="seconds after which a view of a cache that nothing confirms is not matched against"
    )
    connect_timeout: PositiveFloat = Field(2.0, description="seconds to connect to a worker")
    answer_timeout: PositiveFloat = Field(600.0, description="seconds a live worker may take to begin its answer")
    idle_timeout: PositiveFloat = Field(
        600.0, description="seconds between two pieces of an answer, while its worker gives signs of life"
    )
    stall_timeout: PositiveFloat = Field(
        10.0,
        description="seconds without a sign of life after which what a worker has not begun to answer goes elsewhere",
    )
    cut_timeout: PositiveFloat = Field(
        60.0, description="seconds without a sign of life after which answers that a worker has begun are cut off"
    )
    retry_attempts: PositiveInt = Field(4, description="workers a request is sent to at most, one after another")
    retry_deadline: float = Field(
        10.0, ge=0, description="seconds in which another worker is looked and waited for after a failure"
    )
    retry_share: float = Field(0.2, ge=0, le=1, description="retries allowed, as a share of the requests of 10 s")
    retry_floor: float = Field(10.0, ge=0, description="retries a second that are allowed beside that share")
    eject_after: int = Field(5, ge=0, description="failures in a row after which a worker is ejected; 0: never")
    eject_rate_gap: float = Field(
        0.5, gt=0, le=1, description="a worker is ejected when its success rate lies so far below the others'"
    )
    eject_seconds: PositiveFloat = Field(10.0, description="duration of a first ejection; each further one doubles it")
    eject_longest: PositiveFloat = Field(300.0, description="longest duration of an ejection, in seconds")
    eject_share: float = Field(0.5, ge=0, le=1, description="largest share of the workers that is ejected at once")
    longest_pause: PositiveFloat = Field(
        30.0, description="seconds that a worker's Retry-After is honoured for at most"
    )
    resume_streams: bool = Field(
        False, description="let a stream whose worker fails go on at another one (docs/router.md says which streams)"
    )
    session_ttl: float = Field(
        600.0,
        ge=0,
        description="seconds after its last request in which a session breaks ties; 0: none does",
    )
    session_limit: int = Field(65_536, ge=0, description="most sessions that are remembered")

    flow_control: bool = Field(
        False, description="let requests wait in the router while all workers are busy (docs/flow-control.md)"
    )
    flow_queue_limit: PositiveFloat = Field(
        0.02, description="a worker is busy when a new request would wait there for more seconds than these"
    )
    flow_classes: Annotated[tuple[str, ...], NoDecode] = Field(
        ("high=1", "standard=0", "sheddable=-1"),
        description="classes of requests by priority, NAME=PRIORITY[:TTL[:MIB]]: the lowest priority of the class, "
        "seconds that its requests wait at most (30) and what they may take (128 MiB); separate by commas",
    )
    flow_max_bytes: PositiveInt = Field(256 * 2**20, description="largest total of all requests that wait")
    hold_seconds: float = Field(
        0.0,
        ge=0,
        description="seconds for which requests are held while no worker is ready, such as while a first one starts; "
        "0: those of --retry-deadline",
    )
    flow_max_requests: PositiveInt = Field(4096, description="most requests that wait")
    flow_overtaken: float = Field(
        1.0, ge=0, description="seconds after it was first overtaken by which a request takes any worker with room"
    )
    flow_quantum: PositiveInt = Field(2048, description="tokens that each tenant may compute in one round")
    tenant_header: str = Field(
        "",
        pattern=r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?)?$",
        description="the one header that names a request's tenant; default: x-llm-d-inference-fairness-id and its "
        "older name",
    )
    objectives: Annotated[tuple[tuple[str, int], ...], NoDecode] = Field(
        (), description="priorities of objectives that requests may name: NAME=PRIORITY; separate by commas"
    )

    access_log: Literal["off", "text", "json"] = Field(
        "off", description="write a line for each request to standard output: key=value (text) or JSON"
    )
    access_log_blocks: bool = Field(
        False, description="each line names the blocks of the prompt by salted digests, for kvcluster record"
    )
    access_log_salt: SecretStr | None = Field(
        None, description="salt of these digests, the same for routers whose lines belong together; default: random"
    )

    api_keys_file: Path | None = Field(
        None,
        description="file with the API keys of the data port (docs/security.md), read again when it changes; default: "
        "no key is asked for, and workers get what clients send",
    )

    tls_cert_path: Path | None = Field(
        None,
        description="directory with tls.crt and tls.key: the data port speaks HTTPS (docs/security.md). They are read "
        "again when they change",
    )
    tls_client_ca: Path | None = Field(
        None,
        description="file with the certificates (PEM) of the authorities one of which must have signed each client's",
    )
    tls_handshake_timeout: PositiveFloat = Field(10.0, description="seconds that a TLS handshake may take")
    tls_max_handshakes: PositiveInt = Field(
        512, description="TLS handshakes at once; one more takes the place of the oldest"
    )

    allowed_paths: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="paths passed on beside those of inference APIs, such as /v1/load_lora_adapter; separate by commas",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="origins (https://chat.example.com, or *) whose pages may use the data port from a browser; "
        "separate by commas. Default: none, and the workers answer preflights",
    )
    max_body_bytes: PositiveInt = Field(64 * 2**20, description="largest request body")
    max_total_body_bytes: PositiveInt | None = Field(
        None,
        description="largest total of the bodies of requests in progress, each until its answer begins; "
        "default: 512 MiB, or 4 of the largest",
    )
    max_header_bytes: PositiveInt = Field(65_536, description="largest total of a request's headers")
    max_headers: PositiveInt = Field(256, description="most headers of a request")
    max_concurrent_requests: PositiveInt = Field(4096, description="requests in progress before new ones get 503")
    header_timeout: PositiveFloat = Field(10.0, description="seconds a request's headers may take to arrive")
    body_timeout: PositiveFloat = Field(30.0, description="seconds of silence allowed within a request's body")
    write_timeout: PositiveFloat = Field(30.0, description="seconds a client may leave its answer unread")
    keep_alive: PositiveFloat = Field(75.0, description="seconds a client's connection may be idle")
    drain_delay: float = Field(
        0.0, ge=0, description="seconds after SIGTERM in which new requests are still taken in any case"
    )
    drain_limit: float = Field(
        0.0, ge=0, description="seconds after SIGTERM in which they are taken at most, while no other router serves"
    )
    kubernetes_own_service: str | None = Field(
        None, pattern=DNS_LABEL, description="Service in front of the routers: says whether another one serves"
    )
    peers: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="base URLs of the management ports of other routers, which the live page shows too; separate by "
        "commas",
    )
    kubernetes_management_service: str | None = Field(
        None, pattern=DNS_LABEL, description="headless Service of the routers' management ports: finds these routers"
    )
    grace_period: float = Field(30.0, ge=0, description="seconds that answers in progress may take after that")

    mode: Literal["proxy", "picker", "both"] = Field(
        "proxy",
        description="what it serves: the data port (proxy), gateways that ask over ext_proc where a request goes "
        "(picker), or both",
    )
    picker_port: int = Field(
        9002, ge=-1, le=65535, description="port of the endpoint picker (gRPC); 0 takes a free one, -1: none"
    )
    picker_host: str = Field("::", description="address of the picker's ports; ::, every one of IPv6 and IPv4")
    picker_socket: Path | None = Field(
        None, description="Unix socket of the picker, without TLS, for a gateway in the same pod"
    )
    picker_health_port: int = Field(
        9003,
        ge=-1,
        le=65535,
        description="port of the picker's gRPC health checks, without TLS; 0 takes a free one, -1: none",
    )
    envoy_endpoints: Path | None = Field(
        None, description="file in which an Envoy that is this router's data plane finds the workers (docs/envoy.md)"
    )
    envoy_admin: Path | None = Field(
        None, description="Unix socket of that Envoy's administration interface: it drains with this router"
    )
    picker_tls: bool = Field(
        True, description="serve the picker's port with TLS, as gateways expect, if need be self-signed"
    )
    cert_path: Path | None = Field(
        None, description="directory with tls.crt and tls.key for the picker, read again when they change"
    )
    response_processing: Literal["headers", "full"] = Field(
        "headers",
        description="how far the picker follows an answer: its headers, or its whole body (tokens and times of each)",
    )
    picker_fallbacks: int = Field(
        2, ge=0, le=16, description="workers that the picker names beside the chosen one, best first"
    )
    picker_ticket_limit: PositiveFloat = Field(
        600.0, description="seconds after which a picked request counts as over, whatever the worker reports"
    )
    picker_streams: PositiveInt = Field(20_000, description="open streams of gateways before new ones are refused")
    picker_conformance: bool = Field(
        False,
        description="obey test-epp-endpoint-selection, for the conformance tests of gateways; not in production",
    )

    @field_validator(
        "workers",
        "allowed_paths",
        "cors_origins",
        "kubernetes_service",
        "management_names",
        "peers",
        "flow_classes",
        mode="before",
    )
    @classmethod
    def _split(cls, value: Any) -> Any:
        return split_list(value)

    @field_validator("model_tokenizers", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        pairs = [entry.partition("=") for entry in split_list(value)]
        if wrong := next(("".join(pair) for pair in pairs if not (pair[0] and pair[2])), None):
            raise ValueError(f"{wrong!r} is no MODEL=TOKENIZER")
        return [(name, tokenizer) for name, _, tokenizer in pairs]

    @field_validator("flow_classes")
    @classmethod
    def _classes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        check_classes([parse_class(text) for text in value])
        return value

    @field_validator("objectives", mode="before")
    @classmethod
    def _priorities(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        pairs = [entry.rpartition("=") for entry in split_list(value)]
        if wrong := next(("".join(pair) for pair in pairs if not (pair[0] and _NUMBER.fullmatch(pair[2]))), None):
            raise ValueError(f"{wrong!r} is no NAME=PRIORITY with a whole number")
        return [(name, int(priority)) for name, _, priority in pairs]

    @field_validator("workers")
    @classmethod
    def _worker_urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(entries(listed_workers(value)))

    @field_validator("peers")
    @classmethod
    def _peer_urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(worker_url, value))

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != ANY and not re.fullmatch(ORIGIN, origin):
                raise ValueError(
                    f"{origin!r} is no origin: write scheme, host and port, as in https://chat.example.com"
                )
        return value

    @field_validator("allowed_paths")
    @classmethod
    def _plain_paths(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for path in value:
            if not is_plain(path) or path.endswith("/"):
                raise ValueError(f"{path!r} is no path that can be allowed: write it out, as in /v1/load_lora_adapter")
        return value

    @field_validator("profile")
    @classmethod
    def _known_profile(cls, value: str) -> str:
        return profile(value).name

    @field_validator("latency")
    @classmethod
    def _latency_times(cls, value: str) -> str:
        parse_latency(value, profile(DEFAULT_PROFILE).latency)
        return value

    @field_validator("strategy")
    @classmethod
    def _known_strategy(cls, value: str) -> str:
        find_strategy(value)
        return value

    @classmethod
    def load(cls, argv: Sequence[str]) -> Self:
        settings = super().load(argv)
        lists = {
            "--workers": bool(settings.workers),
            "--workers-file": settings.workers_file is not None,
            "--kubernetes-service": bool(settings.kubernetes_service),
            "--inference-pool": settings.inference_pool is not None,
        }
        if settings.total_body_bytes < settings.max_body_bytes:
            raise SettingsError("--max-total-body-bytes must have room for one body of --max-body-bytes")
        if settings.tls_client_ca is not None and settings.tls_cert_path is None:
            raise SettingsError("--tls-client-ca goes with --tls-cert-path, the router's own certificate")
        if settings.mode != "proxy" and settings.picker_port < 0 and settings.picker_socket is None:
            raise SettingsError("--picker-port -1 leaves the picker no way to be asked: give --picker-socket, too")
        if (settings.envoy_endpoints is None) != (settings.envoy_admin is None):
            raise SettingsError("--envoy-endpoints and --envoy-admin are two ends of one Envoy: give both")
        given = [flag for flag, used in lists.items() if used]
        if len(given) > 1:
            raise SettingsError(f"{' and '.join(given)} name {len(given)} lists of workers: use one of them")
        for name in (
            "kubernetes_namespace", "kubernetes_kubeconfig", "kubernetes_own_service", "kubernetes_management_service",
        ):  # fmt: skip
            if getattr(settings, name) is not None and not settings.in_kubernetes:
                flag = "--" + name.replace("_", "-")
                raise SettingsError(
                    f"{flag} goes with --kubernetes-service or --inference-pool, which name the workers: give one of "
                    "them, too"
                )
        return settings

    def router_name(self, host: str) -> str:
        """How the live page names this router: by its pod in a cluster, else by host and management port."""
        return host if self.in_kubernetes else f"{host}:{self.management_port}"

    @property
    def in_kubernetes(self) -> bool:
        """Whether an API server names the workers."""
        return bool(self.kubernetes_service) or self.inference_pool is not None

    @property
    def total_body_bytes(self) -> int:
        """Bytes that the bodies of all requests in flight may take together."""
        return self.max_total_body_bytes or max(512 * 2**20, 4 * self.max_body_bytes)

    @property
    def queues(self) -> bool:
        """Whether requests may have to wait in this router."""
        return self.flow_control or self.hold_seconds > 0

    @property
    def flow_policy(self) -> FlowPolicy:
        """What flow control holds to. Where it is off, but requests are held, every ready worker has room."""
        return FlowPolicy(
            tuple(map(parse_class, self.flow_classes)),
            self.flow_max_bytes,
            self.flow_max_requests,
            self.flow_queue_limit if self.flow_control else math.inf,
            self.flow_quantum,
            self.flow_overtaken,
            self.hold_seconds,
        )

    @property
    def gpu(self) -> Profile:
        """The profile whose latencies the routing decisions start from."""
        named = profile(self.profile)
        return replace(named, latency=parse_latency(self.latency, named.latency))
