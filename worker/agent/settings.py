"""Settings of one cache agent: environment variables `AGENT_*`, overridden by kebab-case flags."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator
from pydantic_settings import SettingsConfigDict

from kvcache.ranks import MAX_RANKS
from runtime.settings import ChatSettings
from worker.addresses import BaseUrl

_ZMQ_ADDRESS = re.compile(r"tcp://[^*:]+:\d{1,5}|tcp://\[[0-9a-fA-F:]+\]:\d{1,5}|ipc://[^*]+")


class Settings(ChatSettings):
    """The agent beside one vLLM."""

    model_config = SettingsConfigDict(env_prefix="AGENT_", cli_prog_name="python -m worker.agent.main")

    host: str = Field("::", description="address to listen on; ::, every one of IPv6 and IPv4")
    port: int = Field(8101, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    fd: int | None = Field(
        None, ge=0, description="file descriptor of an inherited listening socket, instead of host and port"
    )
    engine_url: BaseUrl = Field("http://127.0.0.1:8100", description="URL of the engine's API server")
    events_endpoint: str = Field(
        "tcp://127.0.0.1:5557", description="where the engine publishes its KV events (it binds tcp://*:5557)"
    )
    replay_endpoint: str = Field(
        "tcp://127.0.0.1:5558", description="where the engine replays them; empty if it was not told to"
    )
    topic: str = Field(
        "", description="beginning of the topic under which the engine publishes; empty takes every topic"
    )

    data_parallel_size: int | None = Field(
        None,
        ge=1,
        le=MAX_RANKS,
        description="data-parallel ranks of the engine (vLLM: the same flag); default: as many as its metrics name",
    )
    worker_id: str | None = Field(
        None, min_length=1, description="name of this worker in the router; default: this machine's name and the port"
    )
    model: str | None = Field(
        None, min_length=1, description="served model name; default: as the engine's /metrics say"
    )
    tokenizer: str = Field(
        "gpt2", description="the model's, as routers are told: 'gpt2' (bundled), a folder, or a Hugging Face id"
    )
    block_size: PositiveInt | None = Field(
        None, description="tokens of one KV-cache block, of an engine that does not say"
    )
    blocks: PositiveInt | None = Field(None, description="usable KV-cache blocks; default: the engine's")
    cpu_bandwidth: PositiveFloat = Field(
        20e9, description="bytes a second at which the engine loads blocks from the CPU, until that is measured"
    )
    disk_bandwidth: PositiveFloat = Field(
        3e9, description="bytes a second at which the engine reads blocks from a disk"
    )
    adapters_file: Path | None = Field(
        None, description="file with the LoRA adapters that the engine should have loaded, read again when it changes"
    )
    image_token: NonNegativeInt | None = Field(
        None, description="id of the token that stands for an image, of a model in which each takes --image-tokens"
    )
    image_tokens: PositiveInt = Field(1, description="tokens of an image, with --image-token")
    poll_interval: PositiveFloat = Field(
        1.0, le=2.5, description="seconds between two polls of the engine's health and metrics"
    )

    @field_validator("events_endpoint", "replay_endpoint")
    @classmethod
    def _address(cls, value: str) -> str:
        if not value or _ZMQ_ADDRESS.fullmatch(value):
            return value
        raise ValueError(
            "an address to connect to is needed, such as tcp://127.0.0.1:5557 (the engine binds to tcp://*)"
        )

    @field_validator("events_endpoint")
    @classmethod
    def _given(cls, value: str) -> str:
        if not value:
            raise ValueError("the engine's events are needed")
        return value
