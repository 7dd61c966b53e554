"""The emulated engine: blocks, scheduler and latency, without sockets, clocks or randomness of its own."""

from worker.emulator.engine.config import EngineConfig, EngineConfigError
from worker.emulator.engine.engine import Engine
from worker.emulator.engine.request import (
    EngineRequest,
    EngineStats,
    FinishedRequest,
    FinishReason,
    Output,
    RequestRefusedError,
    RequestTimes,
    TokenSource,
)

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
