"""Service level objectives (SLO) of time to first token and time per output token, and the goodput of a run under one.

*Goodput* is the rate of the requests that meet every objective (Zhong et al., DistServe, OSDI '24); `vllm bench serve
--goodput` reports the same. *Attainment* is their share of all requests. A request that failed meets no objective.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


class Answered(Protocol):
    """What an objective asks of one request; `bench.result.Record` is one. Seconds, of one clock."""

    @property
    def scheduled(self) -> float:
        """When it was due."""

    @property
    def finished(self) -> float | None:
        """When its answer ended; None: it did not."""

    @property
    def ttft(self) -> float | None:
        """Time to first token."""

    @property
    def tpot(self) -> float | None:
        """Mean time per output token after the first; None for an answer of one token."""

    @property
    def error(self) -> object | None:
        """None: it was answered in full."""


@dataclass(frozen=True, slots=True)
class Slo:
    """The most that each request may take, in seconds; None: anything will do.

    Raises `ValueError` for a bound that is not above 0.
    """

    ttft: float | None = None
    tpot: float | None = None

    def __post_init__(self) -> None:
        for name, bound in (("TTFT", self.ttft), ("TPOT", self.tpot)):
            if bound is not None and not bound > 0:
                raise ValueError(f"the SLO's {name} must be above 0 seconds, not {bound:g}")

    def __bool__(self) -> bool:
        """Whether it bounds anything."""
        return self.ttft is not None or self.tpot is not None

    def __str__(self) -> str:
        bounds = (("TTFT", self.ttft), ("TPOT", self.tpot))
        return ", ".join(f"{name} <= {bound * 1e3:g} ms" for name, bound in bounds if bound is not None) or "none"

    def met_by(self, request: Answered) -> bool:
        """Whether it was answered in full and in time. An answer of one token has no TPOT to miss."""
        return request.error is None and not self._late(request) and not self._slow(request)

    def _late(self, request: Answered) -> bool:
        return self.ttft is not None and (request.ttft is None or request.ttft > self.ttft)

    def _slow(self, request: Answered) -> bool:
        return self.tpot is not None and request.tpot is not None and request.tpot > self.tpot

    def goodput(self, requests: Iterable[Answered]) -> Goodput | None:
        """The goodput of a run; None for a run without requests. O(n); the order does not matter."""
        count = met = failed = late = slow = 0
        begins, ends = float("inf"), float("-inf")
        for request in requests:
            count += 1
            begins = min(begins, request.scheduled)
            ends = max(ends, request.scheduled if request.finished is None else request.finished)
            if request.error is not None:
                failed += 1
                continue
            is_late, is_slow = self._late(request), self._slow(request)
            late += is_late
            slow += is_slow
            met += not (is_late or is_slow)
        if not count:
            return None
        lasts = ends - begins
        return Goodput(self, count, met, failed, late, slow, lasts, met / count, met / lasts if lasts > 0 else 0.0)


@dataclass(frozen=True, slots=True)
class Goodput:
    """How well the requests of a run met an SLO. A request can be both late and slow."""

    slo: Slo
    requests: int
    met: int
    failed: int
    late: int
    """Answered, with a first token after the bound."""
    slow: int
    """Answered, with more time per output token than the bound."""
    seconds: float
    """From the first arrival to the end of the last answer."""
    attainment: float
    """`met` over `requests`."""
    requests_per_second: float
    """`met` over `seconds`: the goodput. At the end of a run the last answers are waited for, so that even a run that
    meets the SLO throughout has a goodput somewhat below its rate of arrival."""


def parse_duration(text: str) -> float:
    """Seconds of a duration such as `500ms`, `1.5s`, `2m` or `0.5` (seconds). Raises `ValueError`."""
    units = {"ms": 1e-3, "s": 1.0, "m": 60.0, "": 1.0}
    number = text.strip().rstrip("ms")
    unit = text.strip()[len(number) :]
    try:
        value = float(number) * units[unit]
    except (ValueError, KeyError):
        raise ValueError(f"{text!r} is no duration; write for example 500ms or 0.5s") from None
    if not 0 <= value < float("inf"):
        raise ValueError(f"{text!r} is no duration; it must be 0 or more, and finite")
    return value
