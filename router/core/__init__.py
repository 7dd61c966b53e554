"""Everything that decides where a request goes: plain synchronous Python without sockets, clocks or randomness.

`fleet.Fleet` is the only door; the servers drive it with real time, the simulator with virtual time.
"""
