"""Generators: the seeded sampler, and a language model that generates one token at a time, with a fake model.

Not covered: a real model (`test_torch_model.py`), and the format of log probabilities (`test_logprobs.py`).
"""

from __future__ import annotations

import math
import os
import random
import statistics
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.emulator.generators import GeneratorError, make_generator
from worker.emulator.generators.base import AnswerRequest, TokenLogprob
from worker.emulator.generators.causal_lm import CausalLMGenerator, SamplerOutput
from worker.emulator.generators.sampler import Sampler

PROMPT = [10, 20, 30]


def tokens(answer: Any, count: int) -> list[int]:
    return [answer.token(index) for index in range(count)]


def length(answer: Any, eos: int | None) -> int:
    index = 0
    while answer.token(index) != eos:
        index += 1
    return index + 1


# --- the sampler -------------------------------------------------------------------------------------------


def test_the_same_request_gets_the_same_answer_on_every_worker(tokenizer) -> None:
    request = AnswerRequest(PROMPT, 100, ignore_eos=True)
    one, other = (tokens(Sampler(tokenizer, 7, 100).answer(request), 50) for _ in range(2))
    assert one == other


@pytest.mark.parametrize(
    "varied",
    [
        pytest.param(AnswerRequest([10, 20, 31], 100, ignore_eos=True), id="prompt"),
        pytest.param(AnswerRequest(PROMPT, 100, ignore_eos=True, seed=1), id="seed"),
        pytest.param(AnswerRequest(PROMPT, 100, ignore_eos=True, choice=1), id="choice"),
    ],
)
def test_answers_differ_with(varied, tokenizer) -> None:
    sampler = Sampler(tokenizer, 7, 100)
    assert tokens(sampler.answer(varied), 50) != tokens(sampler.answer(AnswerRequest(PROMPT, 100, ignore_eos=True)), 50)


@given(st.lists(st.integers(0, 50_000), min_size=1, max_size=5), st.integers(0, 2**31))
def test_an_answer_that_comes_back_as_text_has_the_same_tokens(tokenizer, prompt, seed) -> None:
    made = tokens(Sampler(tokenizer, seed, 100).answer(AnswerRequest(prompt, 30, ignore_eos=True)), 30)
    text = tokenizer.decode(made)
    assert tokenizer.encode(text) == made
    assert tokenizer.encode("<|assistant|>\n" + text)[-30:] == made


def test_lengths_have_the_mean_that_was_asked_for(tokenizer) -> None:
    sampler = Sampler(tokenizer, 0, 60)
    lengths = [length(sampler.answer(AnswerRequest([n], 10_000)), tokenizer.eos_token_id) for n in range(1500)]
    assert statistics.mean(lengths) == pytest.approx(60, rel=0.1)
    assert statistics.pstdev(lengths) == pytest.approx(60, rel=0.35)


def test_min_tokens_and_ignore_eos_move_the_end(tokenizer) -> None:
    sampler = Sampler(tokenizer, 0, 2)
    assert length(sampler.answer(AnswerRequest(PROMPT, 500, min_tokens=80)), tokenizer.eos_token_id) == 81
    endless = tokens(sampler.answer(AnswerRequest(PROMPT, 500, ignore_eos=True)), 500)
    assert tokenizer.eos_token_id not in endless


class Wordless:
    """A vocabulary without a single token that looks like a word."""

    vocab_size = 5
    special_ids = frozenset({4})
    eos_token_id = 4

    def token_str(self, token_id: int) -> str:
        return "#"


def test_a_vocabulary_without_words_still_gives_plain_tokens() -> None:
    sampler = Sampler(Wordless(), 0, 100)  # type: ignore[arg-type]
    assert set(tokens(sampler.answer(AnswerRequest([1], 200, ignore_eos=True)), 200)) == {0, 1, 2, 3}


# --- a language model --------------------------------------------------------------------------------------


class Counting:
    """A model whose next token is the last one plus 1, and that remembers how it was called."""

    window = 8

    def __init__(self) -> None:
        self.calls: list[tuple[list[int], list[int] | None]] = []

    def step(self, tokens: Sequence[int], past: Any, request: AnswerRequest, rng: random.Random) -> SamplerOutput:
        self.calls.append((list(tokens), past))
        seen = [*(past or []), *tokens]
        assert len(seen) <= self.window
        token = seen[-1] + 1
        if token == 666:
            raise RuntimeError("the model fails")
        token += token in request.banned
        token_logprobs = [TokenLogprob(token, -0.5, 1)] if request.logprobs is not None else []
        prompt = [] if request.prompt_logprobs is None else [[TokenLogprob(one, -1.0, 2)] for one in tokens[1:]]
        return SamplerOutput(request.allowed[0] if request.allowed else token, seen, token_logprobs, prompt)


@pytest.fixture
def turns() -> Any:
    made: list[CausalLMGenerator] = []

    def make(model: Any, eos: int | None = None) -> CausalLMGenerator:
        made.append(CausalLMGenerator(model, eos, seed=0))
        return made[-1]

    yield make
    for generator in made:
        generator.close()


def wait_until(condition: Callable[[], bool]) -> None:
    """Until the model's thread has got there; pytest's time-out bounds it."""
    while not condition():
        os.sched_yield()


def test_a_model_continues_the_prompt_one_token_at_a_time(turns) -> None:
    model = Counting()
    generator = turns(model)
    answer = generator.answer(AnswerRequest([1, 2, 3], 4))
    wait_until(lambda: len(answer.tokens) == 4)
    assert answer.tokens == [4, 5, 6, 7]
    assert model.calls[0] == ([1, 2, 3], None)
    assert [call[0] for call in model.calls[1:]] == [[4], [5], [6]]
    assert answer.token(3) == 7
    assert answer.token(4) is None  # not ready, and never blocking


def test_a_prompt_longer_than_the_window_loses_its_beginning(turns) -> None:
    model = Counting()
    answer = turns(model).answer(AnswerRequest(list(range(100)), 20))
    wait_until(lambda: len(answer.tokens) == 20)
    assert answer.tokens == list(range(100, 120))
    assert model.calls[0][0] == [96, 97, 98, 99]  # half of the window is left for the answer


def test_answers_take_turns(turns) -> None:
    model = Counting()
    generator = turns(model)
    answers = [generator.answer(AnswerRequest([start], 6)) for start in (100, 200, 300)]
    wait_until(lambda: all(len(answer.tokens) == 6 for answer in answers))
    assert [answer.tokens[0] for answer in answers] == [101, 201, 301]


def test_an_answer_ends_with_its_end_of_sequence_token(turns) -> None:
    generator = turns(Counting(), eos=5)
    ends, ignores, outlasts = (
        generator.answer(request)
        for request in (
            AnswerRequest([3], 50),
            AnswerRequest([3], 5, ignore_eos=True),
            AnswerRequest([3], 50, min_tokens=3),
        )
    )
    wait_until(lambda: len(ignores.tokens) == 5 and len(outlasts.tokens) == 50)
    assert ends.tokens == [4, 5]
    assert 5 not in ignores.tokens
    assert 5 not in outlasts.tokens[:3]


def test_an_answer_that_is_given_up_costs_the_model_nothing_more(turns) -> None:
    model = Counting()
    steps = threading.Semaphore(3)
    step, model.step = model.step, lambda *args: (steps.acquire(), step(*args))[1]  # type: ignore[method-assign]
    generator = turns(model)
    answer = generator.answer(AnswerRequest([1], 1000))
    wait_until(lambda: len(answer.tokens) == 3)
    answer.close()
    steps.release(1000)
    generator.close()
    assert len(answer.tokens) == 4  # the one that was being made


def test_a_model_that_fails_ends_its_answer_and_no_other(turns) -> None:
    generator = turns(Counting(), eos=7)
    fails = generator.answer(AnswerRequest([663], 10))
    works = generator.answer(AnswerRequest([100], 10))
    wait_until(lambda: len(works.tokens) == 10 and len(fails.tokens) == 10)
    assert fails.tokens[:2] == [664, 665]
    assert set(fails.tokens[2:]) == {7}


def test_a_model_reports_log_probabilities_of_its_tokens_and_the_prompts(turns) -> None:
    answer = turns(Counting()).answer(AnswerRequest([1, 2, 3], 2, logprobs=0, prompt_logprobs=0))
    wait_until(lambda: len(answer.tokens) == 2)
    assert [answer.logprobs(index) for index in range(2)] == [[TokenLogprob(4, -0.5, 1)], [TokenLogprob(5, -0.5, 1)]]
    assert answer.prompt_logprobs() == [None, [TokenLogprob(2, -1.0, 2)], [TokenLogprob(3, -1.0, 2)]]


def test_a_model_is_held_to_the_text_that_an_answer_must_be(turns) -> None:
    answer = turns(Counting(), eos=9).answer(AnswerRequest([1, 2, 3], 20, forced_tokens=[70, 71]))
    wait_until(lambda: len(answer.tokens) == 3)
    assert answer.tokens == [70, 71, 9]


# --- probabilities of the sampler ------------------------------------------------------------------------------------


def test_the_samplers_probabilities_are_a_distribution(tokenizer) -> None:
    sampler = Sampler(tokenizer, 0, 100)
    answer = sampler.answer(AnswerRequest([1, 2, 3], 50, temperature=0.0, logprobs=20, ignore_eos=True))
    for index in range(20):
        token = answer.token(index)
        chosen, *others = answer.logprobs(index)
        assert (chosen.token, chosen.rank) == (token, 1)
        assert [other.rank for other in others] == list(range(2, 21))
        logprobs = [one.logprob for one in (chosen, *others)]
        assert logprobs == sorted(logprobs, reverse=True)
        assert sum(map(math.exp, logprobs)) < 1
        assert len({one.token for one in (chosen, *others)}) == 20
    total = sum(1 / rank for rank in range(1, tokenizer.vocab_size + 1))
    assert math.exp(-chosen.logprob) == pytest.approx(total, rel=1e-3)


def test_the_rank_of_a_sampled_token_stays_within_top_k(tokenizer) -> None:
    sampler = Sampler(tokenizer, 0, 100)
    request = AnswerRequest([1, 2, 3], 300, logprobs=0, ignore_eos=True)
    free, bound = sampler.answer(request), sampler.answer(replace(request, top_k=5))
    for answer in (free, bound):
        answer.token(299)
    assert max(bound.logprobs(index)[0].rank for index in range(300)) <= 5
    assert max(free.logprobs(index)[0].rank for index in range(300)) > 1000
    assert [free.token(index) for index in range(300)] == [bound.token(index) for index in range(300)]


def test_the_log_probabilities_of_a_prompt_are_the_same_for_each_answer(tokenizer) -> None:
    sampler = Sampler(tokenizer, 0, 100)
    first, second = (sampler.answer(AnswerRequest([5, 6, 7], 5, choice=choice, prompt_logprobs=2)) for choice in (0, 1))
    assert first.prompt_logprobs() == second.prompt_logprobs()
    none, *known = first.prompt_logprobs()
    assert none is None
    assert [entry[0].token for entry in known] == [6, 7]
    assert {len(entry) for entry in known} <= {2, 3}


def test_the_sampler_keeps_to_what_is_allowed_and_off_what_is_banned(tokenizer) -> None:
    sampler = Sampler(tokenizer, 0, 100)
    allowed = sampler.answer(AnswerRequest([1], 100, ignore_eos=True, allowed=(7, 8, 9), banned=frozenset({8})))
    assert set(tokens(allowed, 100)) == {7, 9}
    free = tokens(sampler.answer(AnswerRequest([1], 50, ignore_eos=True)), 50)
    assert not set(free) & set(
        tokens(sampler.answer(AnswerRequest([1], 50, ignore_eos=True, banned=frozenset(free))), 50)
    )


def test_without_torch_the_error_says_what_to_install(tokenizer, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "worker.emulator.generators.torch_model", raising=False)
    with pytest.raises(GeneratorError, match=r"pip install 'kvcluster\[gpt2\]'"):
        make_generator("gpt2", tokenizer, seed=0, mean_tokens=10)
