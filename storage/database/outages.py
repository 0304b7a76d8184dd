"""What is told of an outage while it lasts."""

from __future__ import annotations

from storage.database.errors import AuthenticationError


class Told:
    """What was told of an outage so far: that the server is away, or that it lets us in no more; each once."""

    def __init__(self) -> None:
        self._kinds: set[bool] = set()

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def is_news(self, error: BaseException) -> bool:
        """Whether nothing of the kind was told yet; from now on it was."""
        kind = isinstance(error, AuthenticationError)
        is_news = kind not in self._kinds
        self._kinds.add(kind)
        return is_news

    def over(self) -> None:
        """The outage is over: the next is told of again."""
        self._kinds.clear()
