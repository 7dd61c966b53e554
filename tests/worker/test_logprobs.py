"""Log probabilities of answers and prompts, echoes, and restrictions of the tokens that may be chosen.

Not covered: the distribution of the sampler's probabilities (`test_generators.py`).
"""

from __future__ import annotations

import itertools

import pytest

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODY = {"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True, "return_token_ids": True}


async def test_a_completions_tokens_come_with_their_alternatives(start) -> None:
    (choice,) = (await start(speed=1000).client.post(COMPLETIONS, BODY | {"logprobs": 3, "temperature": 0})).json()[
        "choices"
    ]
    shown = choice["logprobs"]
    assert "".join(shown["tokens"]) == choice["text"]
    lengths = [len(token) for token in shown["tokens"]]
    assert shown["text_offset"] == [0, *itertools.accumulate(lengths)][:4]
    for token, logprob, top in zip(shown["tokens"], shown["token_logprobs"], shown["top_logprobs"], strict=True):
        assert top[token] == logprob == max(top.values())
        assert len(top) == 3


async def test_a_chats_tokens_come_with_bytes(start) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "logprobs": True, "top_logprobs": 2}
    (choice,) = (await start(speed=1000).client.post(CHAT, body | {"temperature": 0})).json()["choices"]
    for entry in choice["logprobs"]["content"]:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert entry["top_logprobs"][0] == {name: entry[name] for name in ("token", "logprob", "bytes")}
        assert len(entry["top_logprobs"]) == 2


@pytest.mark.looptime
async def test_a_streams_logprobs_are_those_of_the_whole_answer(start) -> None:
    client = start().client
    body = BODY | {"logprobs": 2, "seed": 3, "echo": True}
    del body["return_token_ids"]
    whole = (await client.post(COMPLETIONS, body)).json()["choices"][0]["logprobs"]
    chunks = (await client.post(COMPLETIONS, body | {"stream": True})).chunks
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    for name in whole:
        assert [entry for part in parts for entry in part[name]] == whole[name]


async def test_an_echo_shows_the_prompt_first_and_alone_when_nothing_is_generated(start) -> None:
    client = start(speed=1000).client
    body = {"prompt": "Hello world", "echo": True, "max_tokens": 0, "logprobs": 1}
    answer = (await client.post(COMPLETIONS, body)).json()
    (choice,) = answer["choices"]
    assert choice["text"] == "Hello world"
    assert choice["logprobs"]["tokens"] == ["Hello", " world"]
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["prompt_logprobs"][0] is None
    assert answer["usage"]["completion_tokens"] == 1  # as in vLLM, whose engine makes one token at least


async def test_a_prompt_that_is_scored_is_not_taken_from_the_cache(start) -> None:
    client = start(speed=1000).client
    body = {"prompt": list(range(100, 200)), "max_tokens": 1}
    cached = []
    for extra in ({}, {"prompt_logprobs": 0}, {}):
        usage = (await client.post(COMPLETIONS, body | extra)).json()["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert cached == [0, 0, 96]


async def test_only_what_is_allowed_is_generated(start) -> None:
    client = start(speed=1000).client
    for extra, tokens in (
        ({"allowed_token_ids": [7, 8]}, {7, 8}),
        ({"logit_bias": {"9": 100}}, {9}),
        ({"allowed_token_ids": [7, 8], "logit_bias": {"8": -100}}, {7}),
    ):
        (choice,) = (await client.post(COMPLETIONS, BODY | {"max_tokens": 30} | extra)).json()["choices"]
        assert set(choice["token_ids"]) == tokens


async def test_a_word_that_one_token_spells_with_and_without_its_space_can_be_banned(start, tokenizer) -> None:
    client = start(speed=1000).client
    body = BODY | {"max_tokens": 100}
    words = (await client.post(COMPLETIONS, body)).json()["choices"][0]["text"].split()
    word = next(word for word in words if len(tokenizer.encode(word)) == len(tokenizer.encode(f" {word}")) == 1)
    without = (await client.post(COMPLETIONS, body | {"bad_words": [word]})).json()["choices"][0]["text"]
    assert word not in without.split()


async def test_log_probabilities_of_named_tokens(start) -> None:
    body = BODY | {"logprobs": 0, "logprob_token_ids": [11, 12, 13], "return_tokens_as_token_ids": True}
    (choice,) = (await start(speed=1000).client.post(COMPLETIONS, body)).json()["choices"]
    for token, top in zip(choice["logprobs"]["tokens"], choice["logprobs"]["top_logprobs"], strict=True):
        assert list(top) == [token, "token_id:11", "token_id:12", "token_id:13"]


async def test_a_choice_among_texts_is_made(start) -> None:
    body = {"prompt": "x", "max_tokens": 9, "structured_outputs": {"choice": ["red", "green"]}, "n": 8}
    answer = (await start(speed=1000).client.post(COMPLETIONS, body)).json()
    assert {choice["text"] for choice in answer["choices"]} == {"red", "green"}
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
