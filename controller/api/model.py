"""KVCluster, apiVersion kvcluster.dev/v1alpha1: the one source of the manifest's fields, defaults and rules.

Names are camelCase in a manifest and snake_case here. The docstring under a field, or else that of its class, is its
documentation everywhere: `docs/manifest.md` is generated from it. Types are strict, as an API server's are: neither "4"
nor `true` is a whole number. A field marked `CLUSTER_ONLY` means something to Kubernetes alone; local mode accepts it,
names it and ignores it.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from controller.api import flags
from controller.api.adapters import Adapter
from controller.api.autoscaling import Autoscaling, Scaler
from controller.api.common import (
    CLUSTER_ONLY,
    EnvVar,
    Placement,
    PullPolicy,
    RawObject,
    SpecModel,
    check_unique_names,
    first_repeated,
    rule_broken,
)
from controller.api.cpu_cache import CpuCache
from controller.api.envoy import LONGEST_START, STARTS_LONG, Envoy, check_envoy
from controller.api.exposure import (
    Auth,
    HttpRoute,
    Ingress,
    Management,
    ManagementAuth,
    Monitoring,
    Network,
    NetworkPolicy,
    Service,
    Tls,
)
from controller.api.external import External, check_external
from controller.api.flow_control import FlowControl
from controller.api.gateway import Gateway
from controller.api.latency import Latency
from controller.api.routing import (
    AccessLog,
    DataPlaneType,
    Ejection,
    Limits,
    Liveness,
    Retries,
    ServedCluster,
    Sessions,
    Strategy,
    Timeouts,
)
from kvcache.profiles import DEFAULT_PROFILE, PROFILES, Profile, UnknownProfileError, profile

API_VERSION: Final = "kvcluster.dev/v1alpha1"
KIND: Final = "KVCluster"

ORIGIN_PATTERN = r"^([a-z][a-z0-9+.-]*://[^/?#\s,]+|\*)$"
PATH_PATTERN = r"^/[^\s,%]*[^\s,%/]$"
NAME_PATTERN = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
SCRATCH_VOLUME = "tmp"
"""Every pod has a volume of this name."""
CPU_CACHE_VOLUME = "cpu-cache"
"""The pods of vLLM with `engine.cpuCache` have one of this name."""
ADAPTERS_VOLUME = "kvcluster-adapters"
"""Worker pods have a volume of this name where the spec lists adapters."""
KEYS_VOLUME, TLS_VOLUME = "kvcluster-keys", "kvcluster-tls"
"""Router pods have volumes of these names where the spec names API keys and a certificate."""
MANAGEMENT_VOLUME = "kvcluster-management"
"""Router pods have a volume of this name where their management port asks for a token."""
ENVOY_VOLUME, ENVOY_CONFIG_VOLUME = "kvcluster-envoy", "kvcluster-envoy-config"
"""Router pods with an Envoy have volumes of these names: what the two share, and Envoy's configuration."""
MAX_DATA_PARALLEL = 64
"""Each engine has a port for its events in the pod."""
MAX_NAME_LENGTH = 45
"""The longest object name is `<name>-router-management`, and a Service's name has at most 63 characters."""


class EngineType(StrEnum):
    """What a worker runs."""

    EMULATOR = "emulator"
    VLLM = "vllm"
    EXTERNAL = "external"


START_SECONDS = {EngineType.EMULATOR: 30, EngineType.VLLM: 900, EngineType.EXTERNAL: 30}
"""How long an engine takes to start at most, including the loading of its model."""


def _known_profile(name: str) -> str:
    try:
        return profile(name).name
    except UnknownProfileError:
        raise PydanticCustomError(
            "one_of", "must be a profile of docs/profiles.md", {"choices": list(PROFILES)}
        ) from None


# --- the spec -------------------------------------------------------------------------------------------


class Model(SpecModel):
    """The model that is served."""

    name: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    """What `vllm` loads, a Hugging Face id or a path, and the name under which requests ask for it unless `servedNames`
    says otherwise. Default: the profile's."""
    served_names: list[Annotated[str, Field(min_length=1, max_length=253)]] = Field(default_factory=list, max_length=16)
    """Names under which requests may ask for the model; answers carry the first. Default: `name`."""
    tokenizer: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    """`gpt2` (bundled, works offline), a folder with a tokenizer.json, or a Hugging Face id. Default: `gpt2` for the
    emulator, otherwise the model's own."""
    adapters: list[Adapter] = Field(default_factory=list, max_length=64)
    """LoRA adapters that every worker loads at its start, and when this list changes: see `docs/operator.md`."""
    profile: Annotated[
        str, AfterValidator(_known_profile), Field(json_schema_extra={"enum": list(PROFILES), "type": "string"})
    ] = DEFAULT_PROFILE
    """Model and GPU whose memory and speed the latency estimates (and the emulator) take: see `docs/profiles.md`."""
    latency: Latency = Latency()
    max_model_len: Annotated[int, Field(ge=2, le=10_000_000)] | None = None
    """Tokens of the longest request, prompt and answer together. Default: the profile's, or what the cache holds."""
    env: list[EnvVar] = Field(default_factory=list, max_length=64)
    """Environment variables of everything that loads the model or its tokenizer, workers and routers alike: a hub's
    token from a Secret (`HF_TOKEN`), a mirror (`HF_ENDPOINT`)."""
    volumes: Annotated[list[RawObject], CLUSTER_ONLY] = Field(default_factory=list, max_length=64)
    """Volumes of everything that loads the model or its tokenizer, workers and routers alike: for a `name` or
    `tokenizer` that is a path. Pods on several nodes need one that all can mount (ReadOnlyMany, NFS, `hostPath`)."""
    volume_mounts: Annotated[list[RawObject], CLUSTER_ONLY] = Field(default_factory=list, max_length=64)
    """Where their containers mount them."""

    @model_validator(mode="after")
    def _env_names_are_unique(self) -> Model:
        check_unique_names(self.env)
        return self

    @model_validator(mode="after")
    def _served_names_are_unique(self) -> Model:
        if (index := first_repeated(self.served_names)) is not None:
            raise rule_broken(f"servedNames[{index}]", "is given twice: remove one of the two")
        return self


class DataParallel(SpecModel):
    """Engines of a worker that run side by side, each with a cache of its own (vLLM's data-parallel ranks)."""

    size: Annotated[int, Field(ge=1, le=MAX_DATA_PARALLEL)] = 1
    """Engines in each worker's pod, behind one port. Routers choose among the engines of all pods; `workers.replicas`,
    autoscaling and the status count pods. vLLM takes this many GPUs times those of one engine: request all of them in
    `workers.resources`."""


class Engine(SpecModel):
    """What runs in each worker."""

    type: Annotated[EngineType, Field(strict=False)] = EngineType.EMULATOR
    """`emulator` (no GPU), `vllm` (needs a cluster), or `external`: pods that somebody else runs."""
    external: Annotated[External | None, CLUSTER_ONLY] = None
    image: Annotated[Annotated[str, Field(min_length=1, max_length=1024)] | None, CLUSTER_ONLY] = None
    """Container image of the workers. Default: the release's own for `emulator`, a pinned vLLM for `vllm`."""
    image_pull_policy: Annotated[PullPolicy | None, CLUSTER_ONLY] = None
    """When the image is pulled. Default: the controller's setting for its own image, else Kubernetes' default."""
    image_pull_secrets: Annotated[list[Annotated[str, Field(min_length=1)]], CLUSTER_ONLY] = Field(
        default_factory=list, max_length=16
    )
    """Names of Secrets to pull images with, for workers and routers."""
    speed: Annotated[float, Field(gt=0, le=10_000, allow_inf_nan=False)] = 1.0
    """Emulator: divides every latency; 10 is ten times as fast as the real engine."""
    generator: Annotated[str, Field(min_length=1, max_length=1024)] = "sampler"
    """Emulator: where text comes from: `sampler` (seeded), `gpt2`, or a causal language model's path or id."""
    seed: Annotated[int, Field(ge=0, le=2**53 - 1)] = 0
    """Emulator: seed of the sampler; the same seed gives the same answers."""
    mean_output_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 128
    """Emulator: mean length of the sampler's answers where a request does not bound it, tokens."""
    data_parallel: DataParallel = DataParallel()
    cpu_cache: CpuCache | None = None
    max_loras: Annotated[int, Field(ge=1, le=1_024)] | None = None
    """Adapters whose requests run in one batch (`--max-loras`); each takes memory. Default: the number of adapters,
    rounded up to a power of two. Workers are restarted when it changes."""
    args: list[Annotated[str, Field(min_length=1, max_length=1_024)]] = Field(default_factory=list, max_length=256)
    """Further flags of the engine, as its command line takes them."""
    env: list[EnvVar] = Field(default_factory=list, max_length=256)
    """Environment variables of the engine."""

    @model_validator(mode="after")
    def _args_do_not_contradict_fields(self) -> Engine:
        for index, argument in enumerate(self.args):
            if (wrong := flags.flag_problem(argument)) is not None:
                raise rule_broken(f"args[{index}]", wrong)
            if self.cpu_cache is not None and re.match(flags.pattern("--kv-transfer-config"), argument):
                raise rule_broken(f"args[{index}]", "spec.engine.cpuCache sets this flag: remove one of the two")
        return self

    @model_validator(mode="after")
    def _env_names_are_unique(self) -> Engine:
        check_unique_names(self.env)
        return self


class Cache(SpecModel):
    """The KV cache of each worker."""

    block_size: Annotated[int, Field(ge=1, le=1024)] = 16
    """Tokens of a block. Workers and routers must agree, so it is set once, here."""
    blocks: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    """Blocks an engine can hold. Default: what the profile's GPU leaves after weights and overhead."""


class Workers(Placement):
    """The workers."""

    replicas: Annotated[int, Field(ge=0, le=10_000)] = 1
    """How many workers run."""
    drain_seconds: Annotated[int, Field(ge=0, le=86_400)] = 30
    """How long a worker that is told to stop may take to finish what runs."""
    volumes: Annotated[list[RawObject], CLUSTER_ONLY] = Field(default_factory=list, max_length=64)
    """Further volumes of each pod, as Kubernetes writes them: a model cache, shared memory."""
    volume_mounts: Annotated[list[RawObject], CLUSTER_ONLY] = Field(default_factory=list, max_length=64)
    """Where the engine's container mounts them."""
    runtime_class_name: Annotated[Annotated[str, Field(max_length=253)] | None, CLUSTER_ONLY] = None
    """RuntimeClass of the pods (`nvidia`, on some clusters)."""
    security_context: Annotated[RawObject, CLUSTER_ONLY] = Field(default_factory=dict)
    """Security context of the engine's container, over its default: `{runAsNonRoot: true, runAsUser: 1000}` lets vLLM,
    whose image runs as root, into a namespace that enforces the `restricted` profile. `fsGroup`, `fsGroupChangePolicy`
    and `supplementalGroups` go to the pod."""


class Router(Placement):
    """The routers."""

    replicas: Annotated[int, Field(ge=1, le=1_000), CLUSTER_ONLY] = 1
    """How many routers share the traffic. Local mode runs one."""
    strategy: Annotated[Strategy, Field(strict=False)] = Strategy.CACHE_AWARE
    """How a worker is chosen: see `docs/routing.md`."""
    data_plane: Annotated[DataPlaneType, Field(strict=False)] = DataPlaneType.ROUTER
    """Who receives requests and passes them on: the `router` itself, or an `envoy` beside it, which asks the router
    where each request goes: see `docs/envoy.md`."""
    envoy: Annotated[Envoy, CLUSTER_ONLY] = Envoy()
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    """How long a router waits."""
    retries: Retries = Retries()
    liveness: Liveness = Liveness()
    ejection: Ejection = Ejection()
    sessions: Sessions = Sessions()
    flow_control: FlowControl = FlowControl()
    access_log: AccessLog = AccessLog()
    env: list[EnvVar] = Field(default_factory=list, max_length=64)
    """Environment variables of the routers: `OTEL_*` for traces (see `docs/tracing.md`), a proxy, a salt from a Secret.
    They overrule those of `spec.model.env` with the same name."""
    resume_streams: bool = False
    """Whether a stream whose worker fails goes on at another one: see `docs/router.md`."""
    cors_origins: list[Annotated[str, Field(pattern=ORIGIN_PATTERN, max_length=256)]] = Field(
        default_factory=list, max_length=32
    )
    """Origins whose pages may use the routers from a browser, such as https://chat.example.com, or "*"."""
    allowed_paths: list[Annotated[str, Field(pattern=PATH_PATTERN, max_length=256)]] = Field(
        default_factory=list, max_length=32
    )
    """Paths that routers forward in addition to inference APIs, such as /v1/load_lora_adapter: see `docs/router.md`."""
    serves: Annotated[list[ServedCluster], CLUSTER_ONLY] = Field(default_factory=list, max_length=32)
    """Other KVClusters behind the same endpoint: the `model` of a request decides. See `docs/operator.md`."""
    auth: Annotated[Auth, CLUSTER_ONLY] = Auth()
    """API keys of the data port."""
    tls: Annotated[Tls, CLUSTER_ONLY] = Tls()
    """HTTPS at the data port."""
    management: Annotated[Management, CLUSTER_ONLY] = Management()
    service: Annotated[Service, CLUSTER_ONLY] = Service()
    """The Service in front of the routers."""
    ingress: Annotated[Ingress | None, CLUSTER_ONLY] = None
    """An Ingress to that Service."""
    http_route: Annotated[HttpRoute | None, CLUSTER_ONLY] = None
    """A Gateway API HTTPRoute to that Service, where the Gateway API is installed."""
    image: Annotated[Annotated[str, Field(min_length=1)] | None, CLUSTER_ONLY] = None
    """Container image of the routers. Default: the release's own."""
    image_pull_policy: Annotated[PullPolicy | None, CLUSTER_ONLY] = None
    """When the image is pulled. Default: the controller's setting for its own image, else Kubernetes' default."""

    @property
    def is_behind_envoy(self) -> bool:
        """Whether an Envoy receives the requests, and the router only decides."""
        return self.data_plane is DataPlaneType.ENVOY

    @model_validator(mode="after")
    def _env_names_are_unique(self) -> Router:
        check_unique_names(self.env)
        return self

    @model_validator(mode="after")
    def _suits_the_data_plane(self) -> Router:
        check_envoy(self)
        return self


class KVClusterSpec(SpecModel):
    """What should run."""

    model: Model = Model()
    engine: Engine = Engine()
    cache: Cache = Cache()
    workers: Workers = Workers()
    router: Router = Router()
    autoscaling: Annotated[Autoscaling | None, CLUSTER_ONLY] = None
    """Let an autoscaler decide how many workers run; workers.replicas then only says how many there are at first."""
    monitoring: Annotated[Monitoring, CLUSTER_ONLY] = Monitoring()
    gateway: Annotated[Gateway, CLUSTER_ONLY] = Gateway()
    network: Annotated[Network, CLUSTER_ONLY] = Network()
    """IP families of all Services."""
    network_policy: Annotated[NetworkPolicy, CLUSTER_ONLY] = NetworkPolicy()

    @property
    def profile(self) -> Profile:
        """The named profile of model and GPU, with the times that are given beside it."""
        return self.model.latency.applied(profile(self.model.profile))

    @property
    def management_auth(self) -> ManagementAuth:
        """Whom the routers' management port lets in: as given, else the default."""
        default: ManagementAuth = "tokenExceptMetrics" if self.monitoring.scrape_annotations else "token"
        return self.router.management.auth or default

    @property
    def model_name(self) -> str:
        """The served name, the first if there are several: as given, else what is loaded."""
        return self.served_names[0]

    @property
    def served_names(self) -> list[str]:
        """All names under which requests may ask for the model, the first one first."""
        return self.model.served_names or [self.loaded_model]

    @property
    def loaded_model(self) -> str:
        """The Hugging Face id or path of what is loaded: as given, else the profile's."""
        return self.model.name if self.model.name is not None else self.profile.model

    @property
    def tokenizer(self) -> str:
        """What turns prompts into token ids: as given, else `gpt2`, or the model's own where that is loaded."""
        if self.model.tokenizer is not None:
            return self.model.tokenizer
        return "gpt2" if self.engine.type is EngineType.EMULATOR else self.loaded_model

    @property
    def is_external(self) -> bool:
        """Whether somebody else runs the engines."""
        return self.engine.type is EngineType.EXTERNAL

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest request: as given, else the profile's or what the cache holds, if that is less."""
        if self.model.max_model_len is not None:
            return self.model.max_model_len
        return min(self.profile.max_model_len, self.profile.longest_request(self.blocks, self.cache.block_size))

    @property
    def cpu_blocks(self) -> int:
        """Blocks that fit into the CPU cache of each engine."""
        cache = self.engine.cpu_cache
        return cache.size_bytes // self.profile.geometry.bytes_per_block(self.cache.block_size) if cache else 0

    @property
    def cpu_bandwidth(self) -> float:
        """Bytes a second at which blocks are loaded from the host: as given, else the profile's."""
        cache = self.engine.cpu_cache
        return (cache.bandwidth_bytes if cache else None) or self.profile.host_bandwidth

    @property
    def blocks(self) -> int:
        """Usable blocks of each worker: as given, else the profile's at this block size."""
        return self.cache.blocks if self.cache.blocks is not None else self.profile.blocks(self.cache.block_size)

    @property
    def scales_to_zero(self) -> bool:
        """Whether no worker runs while nobody asks."""
        return self.autoscaling is not None and self.autoscaling.min == 0

    @property
    def start_seconds(self) -> int:
        """How long a worker takes to start at most: as given, else by its engine."""
        given = self.autoscaling.start_seconds if self.autoscaling is not None else None
        return given if given is not None else START_SECONDS[self.engine.type]

    @model_validator(mode="after")
    def _autoscaler_sees_what_waits(self) -> KVClusterSpec:
        scaling = self.autoscaling
        if scaling is not None and scaling.type is Scaler.HPA and self.router.flow_control.enabled:
            raise rule_broken(
                "autoscaling.type",
                "hpa sees the workers' queues alone, which stay empty with flow control: use type keda",
            )
        if self.scales_to_zero and self.router.serves:
            raise rule_broken(
                "autoscaling.min",
                "0 cannot be used beside spec.router.serves: the others' workers would be asked for this model",
            )
        return self

    @model_validator(mode="after")
    def _envoy_waits_for_the_first_worker(self) -> KVClusterSpec:
        if self.router.is_behind_envoy and self.scales_to_zero and self.start_seconds > LONGEST_START:
            raise rule_broken("autoscaling.startSeconds", STARTS_LONG)
        return self

    @model_validator(mode="after")
    def _longest_request_suits_model(self) -> KVClusterSpec:
        if self.max_model_len > self.profile.max_model_len:
            raise rule_broken(
                "model.maxModelLen",
                f"profile {self.profile.name} handles at most {self.profile.max_model_len} tokens: lower maxModelLen, "
                "or choose another spec.model.profile",
            )
        return self

    @model_validator(mode="after")
    def _longest_request_fits_cache(self) -> KVClusterSpec:
        # An engine refuses to start in this state: the request could be admitted but never run to its end.
        size, needed = self.cache.block_size, self.profile.blocks_of(self.max_model_len, self.cache.block_size)
        if self.blocks < needed:
            held = self.profile.longest_request(self.blocks, size)
            raise rule_broken(
                "model.maxModelLen",
                f"needs {needed} blocks of {size} tokens, but the cache has {self.blocks} ({held} "
                f"tokens): set spec.cache.blocks to {needed} or more, or spec.model.maxModelLen to {held} or less",
            )
        return self

    @model_validator(mode="after")
    def _cpu_cache_holds_a_block(self) -> KVClusterSpec:
        if self.engine.cpu_cache is not None and not self.cpu_blocks:
            size = self.profile.geometry.bytes_per_block(self.cache.block_size)
            raise rule_broken("engine.cpuCache.size", f"a block takes {size:,} bytes: give it more, such as 32Gi")
        return self

    @model_validator(mode="after")
    def _volumes_have_names_of_their_own(self) -> KVClusterSpec:
        own = "the pods' own: call yours otherwise"
        seen = dict.fromkeys((SCRATCH_VOLUME, ADAPTERS_VOLUME, KEYS_VOLUME, TLS_VOLUME, MANAGEMENT_VOLUME), own)
        seen |= dict.fromkeys((ENVOY_VOLUME, ENVOY_CONFIG_VOLUME), own)
        seen |= {CPU_CACHE_VOLUME: own} if self.engine.cpu_cache else {}
        for part, volumes in (("model", self.model.volumes), ("workers", self.workers.volumes)):
            for index, volume in enumerate(volumes):
                name, where = volume.get("name"), f"{part}.volumes[{index}].name"
                if isinstance(name, str) and name in seen:
                    raise rule_broken(where, f"is the name of another volume, {seen[name]}")
                seen[str(name)] = f"spec.{where}: rename one of the two"
        return self

    @model_validator(mode="after")
    def _adapters_have_names_of_their_own(self) -> KVClusterSpec:
        names = [adapter.name for adapter in self.model.adapters]
        if (index := first_repeated(names)) is not None:
            raise rule_broken(f"model.adapters[{index}].name", "is given twice: remove one of the two")
        for index, name in enumerate(names):
            if name in self.served_names:
                raise rule_broken(
                    f"model.adapters[{index}].name", "is a name of the model itself: call the adapter otherwise"
                )
        return self

    @model_validator(mode="after")
    def _suits_whose_engines_they_are(self) -> KVClusterSpec:
        check_external(self)
        return self

    @model_validator(mode="after")
    def _vllm_is_complete(self) -> KVClusterSpec:
        if self.engine.type is not EngineType.VLLM:
            return self
        if self.model.name is None:
            raise rule_broken("model.name", "engine type vllm needs a Hugging Face id or a path to load")
        for name in ("speed", "generator", "seed", "mean_output_tokens"):
            if getattr(self.engine, name) != Engine.model_fields[name].default:
                raise rule_broken(
                    f"engine.{to_camel(name)}", "means something to the emulator alone: remove it for engine type vllm"
                )
        return self


class Metadata(SpecModel):
    """Name and labels of the object."""

    name: Annotated[str, Field(pattern=NAME_PATTERN, max_length=MAX_NAME_LENGTH)]
    """Name of the cluster: a letter, then lower-case letters, digits and hyphens. Objects and processes carry it."""
    namespace: Annotated[str | None, CLUSTER_ONLY] = None
    """Namespace of the object."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels of the object."""
    annotations: dict[str, str] = Field(default_factory=dict)
    """Annotations of the object."""


class KVCluster(SpecModel):
    """One LLM served by workers behind cache-aware routers."""

    api_version: Literal["kvcluster.dev/v1alpha1"]
    """Version of this schema."""
    kind: Literal["KVCluster"]
    """Always KVCluster."""
    metadata: Metadata
    spec: KVClusterSpec = KVClusterSpec()

    @property
    def name(self) -> str:
        """Name of the cluster."""
        return self.metadata.name
