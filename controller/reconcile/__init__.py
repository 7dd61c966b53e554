"""Bringing what runs in line with the spec: pure planning, and the loop that carries the plans out."""
