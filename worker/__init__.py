"""One engine: a pure core (block cache, scheduler, latency) inside an HTTP shell."""
