"""The cache agent: a process beside a real vLLM that turns its KV events into the cache feed routers read."""
