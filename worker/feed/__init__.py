"""The cache feed's publishing side, which the emulated worker and the cache agent share."""
