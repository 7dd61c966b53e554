"""The agent's pure core, without sockets or clocks: vLLM's events, block hashes, sequence numbers and load."""
