"""From a chat request to the text of its prompt, as vLLM renders it."""
