"""A worker: the emulator, or a real engine with an agent beside it. Both publish the cache feed of `worker.feed`."""
