"""Requests on their way to workers: the connections that carry them, and which of them are in flight where."""
