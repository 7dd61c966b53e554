"""The text of one answer while its tokens arrive: what may be shown already, and where a stop string ends it."""

from __future__ import annotations

from kvcache.tokens.tokenizer import IncrementalDecoder


class IncrementalDetokenizer:
    """Tokens in, text out. Text that may be the beginning of a stop string is held back, as in vLLM.

    A call looks at the new text and at no more than the longest stop string before it.
    """

    __slots__ = ("_decoder", "_held", "_include_stop", "_recent", "_stop", "_window", "stopped_by")

    def __init__(self, decoder: IncrementalDecoder, stop: tuple[str, ...] = (), include_stop: bool = False) -> None:
        self._decoder = decoder
        self._stop = stop
        self._include_stop = include_stop
        self._window = max(map(len, stop), default=1) - 1
        self._recent = ""
        """The last `_window` characters: a stop string that ends later may begin here."""
        self._held = 0
        """How many of them have not been shown."""
        self.stopped_by: str | None = None
        """The stop string that ended the text."""

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """Text to show after this token. Sets `stopped_by` when a stop string is complete, unless not `may_stop`."""
        delta = self._decoder.push(token)
        if not self._stop:
            return delta
        before = len(self._recent)
        text = self._recent + delta
        unshown = before - self._held
        if may_stop and delta:
            for stop in self._stop:  # in the order of the request: the first that is found ends the text
                at = text.find(stop, max(0, before + 1 - len(stop)))
                if at >= 0:
                    self.stopped_by = stop
                    self._recent, self._held = "", 0
                    return text[unshown : at + len(stop) if self._include_stop else at]
        self._recent = text[len(text) - min(self._window, len(text)) :]
        self._held = 0 if self._include_stop else len(self._recent)
        return text[unshown : len(text) - self._held]

    def finish(self) -> str:
        """What is still held back, when the answer ends without a stop string."""
        held = self._recent[len(self._recent) - self._held :]
        self._recent, self._held = "", 0
        return held + self._decoder.flush()
