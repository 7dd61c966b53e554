"""The emulated engine: blocks, scheduler and latency, without sockets, clocks or randomness of its own."""

from worker.engine.config import EngineConfig, EngineConfigError
from worker.engine.engine import Engine
from worker.engine.request import (
    EngineRequest,
    FinishedRequest,
    FinishReason,
    Output,
    RequestRefusedError,
    RequestTimes,
    TokenSource,
)
from worker.engine.stats import EngineStats

__all__ = [
    "Engine",
    "EngineConfig",
    "EngineConfigError",
    "EngineRequest",
    "EngineStats",
    "FinishReason",
    "FinishedRequest",
    "Output",
    "RequestRefusedError",
    "RequestTimes",
    "TokenSource",
]
