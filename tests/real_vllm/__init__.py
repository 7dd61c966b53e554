"""Tests of the product against a running vLLM: see docs/real-vllm.md."""
