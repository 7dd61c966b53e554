"""vLLM's KV events, as the emulated engine publishes them over ZMQ."""
