"""Micro-benchmarks: one hot path each, by hand, on whatever machine is at hand."""
