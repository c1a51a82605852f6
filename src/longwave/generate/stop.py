"""Stop strings: cut the text where one begins, and hold back what may be the beginning of one."""

from collections.abc import Sequence

from longwave.errors import UsageError


class StopText:
    """Passes text through until a stop string is complete. How the text is cut into pieces makes no difference.

    The stop string that is complete first counts; of several complete at the same character, the longest. Neither it
    nor anything after it is passed on. Raises UsageError for an empty stop string.
    """

    def __init__(self, stop: str | Sequence[str] = ()):
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self._stop:
            raise UsageError(f"stop {self._stop!r} holds an empty string, which would stop at once; leave it out")
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """Take in some text; return what can be said by now."""
        if self.hit:
            return ""
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.hit, self._held = True, ""
            return text[: min(found)[1]]
        cut = len(text) - self._overlap(text)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """The end of the text: return what was held back."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for n in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-n:]) for stop in self._stop):
                return n
        return 0
