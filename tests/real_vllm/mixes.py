"""Random requests of every kind that a router reads, drawn so that many of them find something in the cache.

Images all have a `uuid`: what identifies one without is the engine's alone.

Not covered: prompts given as embeddings, and what nobody can predict: an engine that computes several sequences
for one request states the cached tokens of one of them. In a stream of several prompts it is the one that was answered
first, and in a whole answer the one that ended last: here all end alike.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.real_vllm.agent_requests import AgentRequests
from tests.real_vllm.requests import Requests
from tests.real_vllm.served import Served
from tests.worker.images import image_request

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
_CONVERSATION = {CHAT: "messages", MESSAGES: "messages", RESPONSES: "input"}
_PASSING = (
    "continue_final_message", "add_generation_prompt", "n", "temperature", "stream", "stream_options", "ignore_eos",
)  # fmt: skip
"""Fields that a request's continuation does not take over."""
REMEMBERED = 16
"""Requests that may come again."""


@dataclass
class Request:
    kind: str
    path: str
    body: dict[str, Any]


class EveryKind:
    """Requests for the models and adapters of one engine, reproducible by `seed` and the answers' texts."""

    def __init__(
        self,
        seed: int,
        model: str,
        adapters: tuple[str, ...],
        *,
        prompt_logprobs: bool,
        responses: bool = True,
        images: bool = False,
    ) -> None:
        self._rng = random.Random(seed)
        self._made = Requests(seed, model, templates=False)
        self._agents = AgentRequests(seed, model)
        self._adapters = adapters
        self._prompt_logprobs = prompt_logprobs
        self._before: list[Request] = []
        self._kinds: dict[str, Callable[[], Request]] = {
            "plain": self._plain,
            "chat": lambda: Request("chat", CHAT, self._made.chat()),
            "completion": lambda: Request("completion", COMPLETIONS, self._made.completion()),
            "messages": lambda: Request("messages", MESSAGES, self._agents.messages()),
        }
        if images:
            self._kinds["images"] = lambda: Request("images", CHAT, image_request(self._rng, model, named=True))
        if responses:
            self._kinds["responses"] = lambda: Request("responses", RESPONSES, self._agents.responses())

    @classmethod
    def of(cls, served: Served, seed: int) -> EveryKind:
        """Without those of the Responses API if there are several ranks: vLLM chooses the rank of these itself."""
        return cls(
            seed,
            served.model,
            served.adapters,
            prompt_logprobs=served.prompt_logprobs,
            responses=served.ranks == 1,
            images=served.images is not None,
        )

    def next(self) -> Request:
        """The next request."""
        rng = self._rng
        if self._before and rng.random() < 0.55:
            request = copy.deepcopy(rng.choice(self._before))
        else:
            request = rng.choice(list(self._kinds.values()))()
            if rng.random() < 0.2:
                request.body["cache_salt"] = rng.choice(["a", "b"])
            if self._adapters and rng.random() < 0.3:
                request.body["model"] = rng.choice(self._adapters)
            self._before = [*self._before[-REMEMBERED:], copy.deepcopy(request)]
        self._vary(request)
        return request

    def answered(self, request: Request, text: str) -> None:
        """The answer's text, if there is one. Some conversations go on after it."""
        name = _CONVERSATION.get(request.path, "")
        turns = request.body.get(name)
        if not turns or not isinstance(turns, list) or self._rng.random() < 0.6:
            return
        longer = copy.deepcopy(request)
        longer.kind = f"{request.kind}, continued" if not request.kind.endswith("continued") else request.kind
        for passing in _PASSING:
            longer.body.pop(passing, None)
        if text:
            longer.body[name].append({"role": "assistant", "content": text})
        longer.body[name].append({"role": "user", "content": self._rng.choice(["Go on.", "And why?"])})
        self._before = [*self._before[-REMEMBERED:], longer]

    def _vary(self, request: Request) -> None:
        """What may change from one sending to the next, because it is no part of the prompt."""
        rng, body = self._rng, request.body
        if request.path in (MESSAGES, RESPONSES):
            if rng.random() < 0.3:
                body["stream"] = True
            return
        body["max_tokens"] = rng.randint(1, 24)
        if rng.random() < 0.2:
            body |= {"n": rng.randint(2, 3), "temperature": 1, "ignore_eos": True}
        if rng.random() < 0.3 and not _several_prompts(body):
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        elif rng.random() < 0.08 and self._prompt_logprobs:
            body["prompt_logprobs"] = 0

    def _plain(self) -> Request:
        """A prompt that begins with one of a few long texts: what is evicted first, and hit most."""
        rng = self._rng
        shared = rng.randrange(6)
        text = " ".join(str(random.Random(shared).random()) for _ in range(12 + shared))
        text += f" {rng.randrange(4)} and {rng.randrange(3)}"
        fields: dict[str, Any] = {"temperature": 0}
        if rng.random() < 0.5:
            return Request("plain", COMPLETIONS, fields | {"prompt": text})
        return Request("plain", CHAT, fields | {"messages": [{"role": "user", "content": text}]})


def _several_prompts(body: dict[str, Any]) -> bool:
    prompt = body.get("prompt")
    return isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)
