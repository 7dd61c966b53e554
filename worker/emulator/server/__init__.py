"""The worker's HTTP side: vLLM's API, the cache feed, metrics."""
