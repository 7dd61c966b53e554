"""LoRA adapters as every worker has them: which should be loaded, and what has to be done about it."""
