"""Where KV events are published (vLLM's `--kv-events-config`), and in which form."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt


class EndpointError(ValueError):
    """An endpoint cannot be bound or is none; the message says which and why."""


class WireFormat(StrEnum):
    """How an event is written."""

    MAP = "map"
    """A map with `type`: vLLM 0.24 and later, here as 0.32."""
    ARRAY = "array"
    """An array that begins with the type: vLLM 0.11 to 0.22, here as 0.19."""


class KVEventsConfig(BaseModel):
    """vLLM's fields with its defaults (`vllm/config/kv_events.py`); it refuses others, too."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enable_kv_cache_events: bool = False
    publisher: Literal["null", "zmq"] | None = None
    """None is `zmq` where events are enabled."""
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: NonNegativeInt = 10_000
    hwm: NonNegativeInt = 100_000
    max_queue_size: NonNegativeInt = 100_000
    topic: str = ""

    @property
    def enabled(self) -> bool:
        """Whether events are published."""
        return self.enable_kv_cache_events and self.publisher != "null"

    def of_rank(self, rank: int) -> KVEventsConfig:
        """The configuration of one data-parallel rank, whose ports follow those of rank 0."""
        replay = self.replay_endpoint and rank_endpoint(self.replay_endpoint, rank)
        return self.model_copy(update={"endpoint": rank_endpoint(self.endpoint, rank), "replay_endpoint": replay})


def rank_endpoint(endpoint: str, rank: int) -> str:
    """The endpoint of a data-parallel rank, whose port follows that of rank 0: as
    `ZmqEventPublisher.offset_endpoint_port` of `vllm/distributed/kv_events.py`. A port of 0 stays 0, and a path stays
    as it is (vLLM has no ranks there)."""
    if not rank:
        return endpoint
    if "inproc" in endpoint:
        return f"{endpoint}_dp{rank}"
    address, colon, port = endpoint.rpartition(":")
    return f"{address}{colon}{int(port) + rank}" if port.isdecimal() and int(port) else endpoint
