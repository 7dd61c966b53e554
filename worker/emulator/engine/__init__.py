"""The emulated engine: blocks, scheduler and latency, without sockets, clocks or randomness of its own."""
