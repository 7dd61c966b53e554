"""The emulated engine behind vLLM's HTTP API: a pure core (`engine`) inside an HTTP shell. `worker.main` starts it."""
