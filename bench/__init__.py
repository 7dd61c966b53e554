"""Workloads, load generation, comparison of strategies and simulation on a virtual clock."""
