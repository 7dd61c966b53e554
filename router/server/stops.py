"""Stop strings across the seam of two engines. An engine holds back the last characters of its text, in which a stop
string may begin; the next engine does not know them."""

from __future__ import annotations

from collections.abc import Sequence


class SeamStops:
    """The text that one engine held back and the text of the next one, up to where the next one watches alone.

    Both engines find what lies in their own text; what begins in the one and ends in the other is found here.
    """

    __slots__ = ("_seam", "_stops", "_text", "_window", "stopped_by")

    def __init__(self, held: str, stops: Sequence[str]) -> None:
        self._text = held
        self._seam = len(held)
        """How many characters of the text are the first engine's."""
        self._stops = stops
        self._window = max(map(len, stops)) - 1
        self.stopped_by: str | None = None
        """The stop string that ended the text."""

    @property
    def watching(self) -> bool:
        """Whether a stop string may still begin in the first engine's text."""
        return self._seam > 0 and self.stopped_by is None

    def push(self, text: str, *, last: bool) -> str:
        """The next engine's text; `last`: it ends with this. Returns the text that can be shown."""
        if not self.watching:
            return text
        self._text += text
        for stop in self._stops:
            at = self._text.find(stop)
            if 0 <= at < self._seam:
                self.stopped_by = stop
                return self._text[:at]
        shown = len(self._text) if last else max(len(self._text) - self._window, 0)
        if shown >= self._seam:
            shown = len(self._text)
        passed, self._text = self._text[:shown], self._text[shown:]
        self._seam -= shown
        return passed
