"""The router's shell: sockets, clocks and tasks around `router.core`."""
