"""Requests with the answers of a real vLLM, and the rules by which an answer of the emulator equals them."""
