"""The seeded sampler: a pure function of its name, with the promised mean."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.engine import SeededSource, request_name

EOS = 2
WORDS = list(range(100, 400))


def source(seed: int = 1, name: bytes = b"a", **fields: object) -> SeededSource:
    settings = {"vocabulary": WORDS, "mean_tokens": 50, "eos_token_id": EOS, **fields}
    return SeededSource(seed, name, **settings)


def length(answer: SeededSource) -> int:
    return next(index for index in range(100_000) if answer.token(index) == EOS) + 1


@given(seed=st.integers(-(2**70), 2**70), name=st.binary(max_size=40), indices=st.lists(st.integers(0, 500)))
def test_any_order_of_asking_gives_the_same_tokens(seed: int, name: bytes, indices: list[int]) -> None:
    straight = source(seed, name)
    tokens = [straight.token(index) for index in range(501)]
    again = source(seed, name)
    assert [again.token(index) for index in indices] == [tokens[index] for index in indices]


def test_seed_and_name_tell_answers_apart() -> None:
    answers = {
        tuple(source(seed, name, ignore_eos=True).token(i) for i in range(20))
        for seed in range(10)
        for name in (b"a", b"b", b"c")
    }
    assert len(answers) == 30


def test_names_tell_prompt_seed_and_choice_apart() -> None:
    prompts = ([1], [1, 2], [258])
    names = {request_name(p, s, c) for p in prompts for s in (None, 0, 1) for c in (0, 1)}
    assert len(names) == 18
    assert request_name([1, 2], 3, 1) == request_name((1, 2), 3, 1)


@pytest.mark.parametrize("expected", [1, 5, 50, 300])
def test_lengths_have_the_given_mean(expected: int) -> None:
    lengths = [length(source(name=b"%d" % i, mean_tokens=expected)) for i in range(800)]
    assert mean(lengths) == pytest.approx(expected, rel=0.12)
    assert min(lengths) >= 1


def test_tokens_are_spread_over_the_vocabulary() -> None:
    answer = source(ignore_eos=True)
    tokens = [answer.token(i) for i in range(3000)]
    assert set(tokens) <= set(WORDS)
    assert len(set(tokens)) > 295


def test_min_tokens_and_ignore_eos_are_honoured() -> None:
    for i in range(50):
        assert length(source(name=b"%d" % i, mean_tokens=3, min_tokens=20)) > 20
        endless = source(name=b"%d" % i, mean_tokens=3, ignore_eos=True)
        assert EOS not in [endless.token(k) for k in range(100)]
    without = source(eos_token_id=None, mean_tokens=1)
    assert None not in [without.token(k) for k in range(100)]


def test_refuses_an_empty_vocabulary_and_a_mean_below_one() -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        source(vocabulary=[])
    with pytest.raises(ValueError, match="mean_tokens"):
        source(mean_tokens=0.5)


def test_an_engine_runs_it(engine: Callable, request_of: Callable, serve: Callable) -> None:
    outputs = serve(engine(), [request_of(10, max_tokens=500, source=source())])
    assert [output.token for output in outputs] == [source().token(i) for i in range(len(outputs))]
    assert outputs[-1].finish_reason == "stop"
