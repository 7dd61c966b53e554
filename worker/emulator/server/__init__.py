"""The emulator's HTTP API, which is vLLM's."""
