"""A fake vLLM that caches blocks: it publishes what it computes, and reports what it finds in its cache."""

from __future__ import annotations

import json

from kvcache.tokens.tokenizer import Tokenizer
from tests.worker.agent.engine import FakeEngine, packed, stored

BLOCK = 16


class MiniatureEngine(FakeEngine):
    """`POST /v1/completions` of one text, answered without a model; `/tokenize` of a text.

    What it models was checked against vLLM 0.32 (tests/real_vllm): the full blocks of a prompt are stored and published
    as one run, the block of the last token is never reused, `cached_tokens` is what was found. It evicts nothing,
    generates nothing that fills a block, and knows no chats, salts, adapters or streams: other paths are 404, and
    fields that would need one of them are refused.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._names: dict[tuple[int, ...], int] = {}
        """Prefix, to the end of a block -> the engine's name of that block."""
        self.tokenize = self._tokens

    def _tokens(self, body: dict[str, object]) -> list[int] | int:
        prompt = body.get("prompt")
        return self._tokenizer.encode(prompt) if isinstance(prompt, str) else 400

    async def respond(self, path: str, body: bytes) -> tuple[int, bytes]:
        if path != "/v1/completions":
            return 404, b""
        fields = json.loads(body)
        if not fields.keys() <= {"model", "prompt", "max_tokens", "temperature"}:
            return 400, b'{"error":{"message":"the miniature does not know these fields","code":400}}'
        tokens = self._tokenizer.encode(fields["prompt"])
        found = await self._compute(tokens)
        usage = {"prompt_tokens": len(tokens), "completion_tokens": 1, "total_tokens": len(tokens) + 1}
        answer = {
            "object": "text_completion",
            "choices": [{"index": 0, "text": " x", "finish_reason": "length"}],
            "usage": {**usage, "prompt_tokens_details": {"cached_tokens": found * BLOCK}},
        }
        return 200, json.dumps(answer).encode()

    async def _compute(self, tokens: list[int]) -> int:
        """How many blocks were there."""
        prefixes = [tuple(tokens[:end]) for end in range(BLOCK, len(tokens) + 1, BLOCK)]
        known = sum(prefix in self._names for prefix in prefixes)
        new = prefixes[known:]
        if new:
            parent = self._names[prefixes[known - 1]] if known else None
            names = [len(self._names) + at + 1 for at in range(len(new))]
            self._names.update(zip(new, names, strict=True))
            await self.publish(packed(stored(names, tokens[known * BLOCK : len(prefixes) * BLOCK], parent)))
        return min(known, (len(tokens) - 1) // BLOCK)
