"""The text of an answer while its tokens arrive: stop strings end it however they are split into tokens.

Not covered: decoding of tokens to text (`tests/kvcache`).
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvcache.tokens.tokenizer import IncrementalDecoder
from worker.emulator.server.generation import IncrementalDetokenizer


class Spelled:
    """A decoder for which a token is a piece of text, given in advance."""

    def __init__(self, pieces: list[str]) -> None:
        self._pieces = pieces

    def push(self, token: int) -> str:
        return self._pieces[token]

    def flush(self) -> str:
        return ""


def run(pieces: list[str], stop: tuple[str, ...], include: bool, min_tokens: int = 0) -> tuple[list[str], str | None]:
    """Every delta, and what stopped the text."""
    text = IncrementalDetokenizer(Spelled(pieces), stop, include)  # type: ignore[arg-type]
    shown = []
    for token in range(len(pieces)):
        shown.append(text.push(token, may_stop=token + 1 > min_tokens))
        if text.stopped_by is not None:
            return shown, text.stopped_by
    shown.append(text.finish())
    return shown, None


def plainly(pieces: list[str], stop: tuple[str, ...], include: bool, min_tokens: int) -> tuple[str, str | None]:
    """The same by vLLM's rule, looking at the whole text each time."""
    text = ""
    for count, piece in enumerate(pieces, 1):
        text += piece
        if count > min_tokens and piece:
            for string in stop:
                at = text.find(string, max(0, len(text) - len(piece) - len(string) + 1))
                if at >= 0:
                    return text[: at + len(string) if include else at], string
    return text, None


pieces = st.lists(st.text("ab", max_size=4), max_size=12)
stops = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3).map(tuple)


@given(pieces, stops, st.booleans(), st.integers(0, 4))
def test_the_text_ends_where_vllm_ends_it(pieces, stop, include, min_tokens) -> None:
    shown, stopped_by = run(pieces, stop, include, min_tokens)
    assert ("".join(shown), stopped_by) == plainly(pieces, stop, include, min_tokens)


@given(pieces, stops)
def test_nothing_shown_is_ever_part_of_the_stop_string_that_ends_the_text(pieces, stop) -> None:
    shown, stopped_by = run(pieces, stop, include=False)
    if stopped_by is not None:
        before = "".join(shown)
        assert "".join(pieces).startswith(before + stopped_by)


def test_text_that_might_begin_a_stop_string_waits_for_the_next_token() -> None:
    shown, stopped_by = run(["one EN", "tity", " END", " two"], ("END",), include=False)
    assert shown == ["one ", "ENti", "ty "]
    assert stopped_by == "END"


def test_without_stop_strings_every_token_is_shown_at_once(tokenizer) -> None:
    tokens = tokenizer.encode("naïve 🎉 text")
    text = IncrementalDetokenizer(IncrementalDecoder(tokenizer))
    shown = [text.push(token) for token in tokens]
    assert "".join(shown) + text.finish() == "naïve 🎉 text"
    assert "�" not in "".join(shown)
