"""The agent's micro-benchmark runs; what it measures is for people to read, not for a test to judge."""

from __future__ import annotations

from bench.micro.agent import measure


def test_it_measures_every_operation() -> None:
    figures = measure(500)
    assert set(figures) == {"store_us", "remove_us", "list_us", "bytes", "bytes_with_tokens_instead"}
    assert min(figures["store_us"], figures["remove_us"], figures["list_us"]) > 0
