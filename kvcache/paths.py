"""The paths of engines that clients may reach. Every data plane of ours holds to this list."""

from __future__ import annotations

RESOURCES = frozenset(
    {
        "audio", "batches", "chat", "classify", "completions", "embeddings", "files", "images", "messages", "models",
        "moderations", "pooling", "realtime", "rerank", "responses", "score", "systemone", "videos",
    }
)  # fmt: skip
"""First segments under /v1/ that belong to an inference API: OpenAI's, Anthropic's, and what vLLM 0.32 adds.

The list names what is open and not what is closed: vLLM has management endpoints under /v1/ too (`load_lora_adapter`,
`unload_lora_adapter`), and an endpoint that a later release or a plugin adds must not be open to clients by oversight.
"""

COMPUTED = frozenset(
    {
        "/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses", "/invocations",
        "/v1/chat/completions/batch", "/v1/messages/count_tokens", "/v1/completions/render",
        "/v1/chat/completions/render", "/v1/responses/render", "/v1/messages/render", "/v1/completions/derender",
        "/v1/chat/completions/derender", "/v1/embeddings", "/v1/rerank", "/v1/score", "/v1/classify", "/v1/pooling",
        "/v1/moderations", "/v1/systemone", "/v1/audio/transcriptions", "/v1/audio/translations", "/v1/audio/speech",
        "/v1/images/generations", "/tokenize", "/detokenize", "/rerank", "/v2/rerank", "/score", "/pooling",
        "/classify", "/v2/embed", "/generative_scoring", "/cohere/v2/chat", "/cohere/v2/chat/render",
    }
)  # fmt: skip
"""Paths at which POST computes an answer and changes nothing, so that it is idempotent in spite of its method. Those
that vLLM 0.32 serves outside of /v1/ are open to clients because they are here; its management endpoints are not."""
