"""What the agent knows without sockets or clocks: vLLM's events, block names, sequence numbers and load."""
