"""Sends each request to the engine where it starts soonest: a pure core inside asynchronous shells."""
