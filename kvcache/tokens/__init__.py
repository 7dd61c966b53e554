"""Tokenizers: from text to token ids and back, the same in the router and the worker."""
