"""Requests with the answers that a real vLLM gave, and the rules by which an emulator's answer equals them."""
