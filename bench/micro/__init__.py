"""What single parts cost: scripts, each run as `python -m bench.micro.NAME`."""
