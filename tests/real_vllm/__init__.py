"""The product against a running vLLM: docs/real-vllm.md."""
