"""Settings of one worker process: environment variables `WORKER_*`, overridden by kebab-case flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from kvcache.profiles import DEFAULT_PROFILE, PROFILES, Profile, longest_request, parse_latency, profile
from kvcache.ranks import MAX_RANKS
from runtime.settings import ChatSettings, SettingsError, split_list
from worker.addresses import BaseUrl, base_url
from worker.kv_events import KVEventsConfig
from worker.lora.modules import RANKS, LoraModule, parse_module, repeat_flag, split_modules


class Settings(ChatSettings):
    """One emulated engine and its HTTP server."""

    model_config = SettingsConfigDict(env_prefix="WORKER_", cli_prog_name="python -m worker.main")

    host: str = Field("::", description="address to listen on; ::, every one of IPv6 and IPv4")
    port: int = Field(8100, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    fd: int | None = Field(
        None, ge=0, description="file descriptor of an inherited listening socket, instead of host and port"
    )
    worker_id: str | None = Field(
        None,
        min_length=1,
        description="name of this worker in the router; default: host:port (the machine's name for :: and 0.0.0.0)",
    )

    model: str | None = Field(None, min_length=1, description="served model name; default: the profile's model")
    served_model_name: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="names under which requests may ask for the model, separated by commas; default: --model"
    )
    tokenizer: str = Field("gpt2", description="'gpt2' (bundled), a folder with a tokenizer, or a Hugging Face id")
    profile: str = Field(DEFAULT_PROFILE, description=f"model on a GPU: {', '.join(sorted(PROFILES))}")
    latency: str = Field(
        "", description="times that differ from the profile's: NAME=SECONDS, separated by commas (docs/profiles.md)"
    )
    block_size: PositiveInt = Field(16, description="tokens of one KV-cache block")
    blocks: PositiveInt | None = Field(
        None, description="usable KV-cache blocks; default: what the profile's GPU holds"
    )
    max_model_len: PositiveInt | None = Field(
        None, description="longest prompt plus answer, tokens; default: the profile's, or what the cache can hold"
    )
    max_num_seqs: PositiveInt | None = Field(None, description="sequences that run at once; default: the profile's")
    max_num_batched_tokens: PositiveInt | None = Field(
        None, description="tokens of one engine step; default: the profile's"
    )
    image_tokens: NonNegativeInt = Field(0, description="take images, each as so many tokens of the prompt; 0: do not")
    image_token: str = Field(
        "<|endoftext|>", description="text of the token that stands for an image in a chat, with --image-tokens"
    )
    sliding_window: NonNegativeInt | None = Field(
        None, description="tokens that the sliding layers look back, 0 for a model without; default: the profile's"
    )
    sliding_groups: PositiveInt = Field(1, description="KV-cache groups of sliding layers, with --sliding-window")
    cpu_blocks: NonNegativeInt = Field(0, description="blocks that are kept in the host's memory beside the GPU's")
    cpu_bandwidth: PositiveFloat | None = Field(
        None, description="bytes a second at which blocks are loaded from the host; default: the profile's"
    )
    enable_prefix_caching: bool = Field(True, description="reuse the KV blocks of equal prefixes")
    data_parallel_size: int = Field(
        1, ge=1, le=MAX_RANKS, description="engines of this worker, each with a cache of its own (vLLM: the same flag)"
    )
    speed: PositiveFloat = Field(1.0, description="how many times as fast as the profile's GPU")

    generator: str = Field(
        "sampler", description="'sampler' (seeded words), 'gpt2', or a folder or id of a causal language model (CPU)"
    )
    mean_output_tokens: PositiveInt = Field(
        128, description="mean answer length of the sampler, if max_tokens allows it"
    )
    seed: int = Field(0, description="seed of the answers' text and length")

    router_url: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="management URL of a router to push heartbeats and cache state to; repeat or separate by commas"
    )
    router_token_file: Path | None = Field(
        None, description="file whose first line is a token of these management ports; read for each message"
    )
    advertise_url: BaseUrl | None = Field(None, description="URL under which a router reaches this worker")

    kv_events: Literal["off", "zmq"] = Field(
        "off", description="publish vLLM's KV events over ZMQ, for a cache agent; also by --kv-events-config"
    )
    kv_events_config: KVEventsConfig = Field(
        default_factory=KVEventsConfig, description="where they are published, as JSON (vLLM: the same flag)"
    )
    kv_events_format: Literal["map", "array"] = Field(
        "map", description="how an event is written: 'map' (vLLM 0.24 and later) or 'array' (0.11 to 0.22)"
    )
    enable_lora: bool = Field(False, description="take LoRA adapters (vLLM: the same flag)")
    lora_modules: Annotated[tuple[LoraModule, ...], NoDecode] = Field(
        (), description="adapters to load at start: name=path, or a JSON object; several follow one another"
    )
    max_loras: PositiveInt = Field(1, description="adapters whose sequences run at once (vLLM: the same flag)")
    max_lora_rank: int = Field(16, description="largest rank of an adapter (vLLM: the same flag)")
    allow_runtime_lora_updating: bool = Field(
        False, description="serve /v1/load_lora_adapter and /v1/unload_lora_adapter (vLLM: VLLM_ALLOW_RUNTIME_...)"
    )
    adapters_file: Path | None = Field(
        None, description="file with the adapters that should be loaded, read again when it changes"
    )

    dev_mode: bool = Field(False, description="serve /reset_prefix_cache (vLLM: VLLM_SERVER_DEV_MODE)")
    enable_prompt_tokens_details: bool = Field(True, description="report cached tokens in usage")
    enable_request_id_headers: bool = Field(False, description="answer with an x-request-id header")
    enable_auto_tool_choice: bool = Field(False, description='take requests with tools (`tool_choice` "auto")')
    enable_responses_store: bool = Field(
        False, description="keep responses of /v1/responses (vLLM: VLLM_ENABLE_RESPONSES_API_STORE)"
    )
    max_concurrent_requests: PositiveInt = Field(2048, description="requests in progress before new ones get 503")
    drain_limit: float = Field(
        0.0, ge=0, description="seconds after SIGTERM in which requests are taken at most, as long as any come"
    )
    grace_period: float = Field(
        30.0, ge=0, description="seconds that running requests may take to finish after SIGTERM"
    )

    @field_validator("lora_modules", mode="before")
    @classmethod
    def _each_module(cls, value: Any) -> Any:
        return [parse_module(each) for each in split_modules(value)] if isinstance(value, str) else value

    @field_validator("max_lora_rank")
    @classmethod
    def _known_rank(cls, value: int) -> int:
        if value not in RANKS:
            raise ValueError(f"vLLM takes one of {', '.join(map(str, RANKS))}")
        return value

    @field_validator("router_url", "served_model_name", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return split_list(value)

    @field_validator("router_url")
    @classmethod
    def _router_urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(base_url(url) for url in value)

    @field_validator("profile")
    @classmethod
    def _known_profile(cls, value: str) -> str:
        return profile(value).name

    @field_validator("latency")
    @classmethod
    def _latency_times(cls, value: str) -> str:
        parse_latency(value, profile(DEFAULT_PROFILE).latency)
        return value

    @classmethod
    def load(cls, argv: Sequence[str]) -> Self:
        return super().load(repeat_flag(argv))

    @property
    def gpu(self) -> Profile:
        """The profile that the settings name."""
        named = profile(self.profile)
        return replace(named, latency=parse_latency(self.latency, named.latency))

    @property
    def published_kv_events(self) -> KVEventsConfig | None:
        """Where vLLM's KV events are published, if they are."""
        switched = self.kv_events_config.model_copy(update={"enable_kv_cache_events": True, "publisher": "zmq"})
        chosen = switched if self.kv_events == "zmq" else self.kv_events_config
        return chosen if chosen.enabled else None

    @property
    def served_model(self) -> str:
        """The model name in answers."""
        return self.served_models[0]

    @property
    def served_models(self) -> tuple[str, ...]:
        """The model names that requests may use; the first is `served_model`."""
        return self.served_model_name or (self.model or self.gpu.model,)

    @property
    def usable_blocks(self) -> int:
        """KV blocks without the null block (vLLM rule 5)."""
        return self.blocks or self.gpu.blocks(self.block_size)

    @property
    def cpu_block_seconds(self) -> float:
        """Seconds that loading one block from the host takes, at the speed asked for."""
        return self.gpu.load_seconds(self.block_size, self.cpu_bandwidth) / self.speed

    @property
    def window_and_groups(self) -> tuple[int, int]:
        """The sliding window in tokens, and the number of KV-cache groups that have it; zeros: there are none."""
        geometry = self.gpu.geometry
        if self.sliding_window is None:
            return geometry.sliding_window, geometry.sliding_groups
        return (self.sliding_window, self.sliding_groups) if self.sliding_window else (0, 0)

    @property
    def _longest_held(self) -> int:
        """Tokens of the longest request whose blocks fit into the cache."""
        step = self.max_num_batched_tokens or self.gpu.max_num_batched_tokens
        return longest_request(self.usable_blocks, self.block_size, *self.window_and_groups, step)

    def model_len(self) -> int:
        """Longest prompt plus answer, in tokens. Raises `SettingsError` if the cache cannot hold that many."""
        held = self._longest_held
        if self.max_model_len is None:
            return min(self.gpu.max_model_len, held)
        if self.max_model_len > held:
            needed = -(-self.max_model_len // self.block_size)
            raise SettingsError(
                f"--max-model-len {self.max_model_len} needs {needed} blocks of {self.block_size} tokens, but the "
                f"cache has {self.usable_blocks} ({held} tokens): use --max-model-len {held} or less, or --blocks "
                f"{needed} or more"
            )
        return self.max_model_len
