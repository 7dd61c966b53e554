"""Everything that decides where a request goes: plain synchronous Python without sockets, clocks or randomness.

`fleet.Fleet` is the entry point. The router calls it with real time, the simulator with virtual time.
"""
