"""Bringing what is in line with what should be: pure planning, and the loop that carries plans out."""
