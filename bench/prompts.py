"""The token ids an engine would see for each request of a workload, without sending it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bench.workloads import CHAT, TimedRequest, Workload
from kvcache.keys import CacheScope
from kvcache.prompts import chat_prompt, completion_prompts, request_scope
from kvcache.tokens.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request and its prompt as the router and the worker would tokenise it."""

    request: TimedRequest
    tokens: list[int]
    scope: CacheScope


def prompts(workload: Workload, tokenizer: Tokenizer) -> Iterator[Prompt]:
    """Every request of the workload with its tokens. Raises `PromptError` for a prompt a worker would refuse."""
    for request in workload.requests():
        if request.path == CHAT:
            tokens = chat_prompt(request.body["messages"], tokenizer)
        else:
            (tokens,) = completion_prompts(request.body["prompt"], tokenizer)
        yield Prompt(request, tokens, request_scope(request.body))
