"""Stop strings, matched on text wherever the tokens' borders fall."""

from __future__ import annotations

from collections.abc import Sequence

from phimlx.errors import GenerationError, shortened


class StopStrings:
    """Passes text on until one of the strings appears, and holds back what may be its beginning.

    Attributes:
        found: the string that appeared; None while there is none.

    Raises:
        GenerationError: for a stop string that is empty or no string.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        if isinstance(stops, str):
            stops = [stops]
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise GenerationError(
                    f"stop is {shortened(stop)}; it must be a text of at least one letter."
                )
        self.stops = tuple(stops)
        self.found: str | None = None
        self._held = ""

    @property
    def stopped(self) -> bool:
        """Whether one of the strings has appeared."""
        return self.found is not None

    def feed(self, text: str) -> str:
        """The part of the text so far that is certain to belong to the reply."""
        if not self.stops or self.stopped:
            return "" if self.stopped else text
        text = self._held + text
        starts = [(start, stop) for stop in self.stops if (start := text.find(stop)) >= 0]
        if starts:
            start, self.found = min(starts, key=lambda found: found[0])
            self._held = ""
            return text[:start]
        held = max(_overlap(text, stop) for stop in self.stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """Hand over what was held back, now that no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
