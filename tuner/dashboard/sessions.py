"""The sessions of browsers that have shown the token: cookies that end with the dashboard, a day or a sign-out."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable

LIFETIME_S = 24 * 3600


class Sessions:
    """Signs cookies by a key that is drawn at start: nothing of them can be made from the token, nor kept for ever.

    A browser sends its cookies to all ports of a host, so that another program there may see one: it opens this
    dashboard until it ends, and nothing else.
    """

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._key = secrets.token_bytes(32)
        self._now = now
        self._ended: dict[str, float] = {}  # the ids of those that signed out, and when they would have ended

    def start(self) -> str:
        """Return the value of a new session's cookie."""
        text = f"{secrets.token_hex(8)}.{int(self._now()) + LIFETIME_S}"
        return f"{text}.{self._signature(text)}"

    def is_open(self, cookie: str) -> bool:
        """Whether a cookie is one of these sessions', which has neither run out nor signed out."""
        text, _, signature = cookie.rpartition(".")
        if not hmac.compare_digest(signature.encode("utf-8", "replace"), self._signature(text).encode()):
            return False
        its_id, _, end = text.partition(".")
        return self._now() < int(end) and its_id not in self._ended

    def end(self, cookie: str) -> None:
        """Sign out."""
        if self.is_open(cookie):
            its_id, end, _ = cookie.split(".")
            self._ended = {one: at for one, at in self._ended.items() if self._now() < at} | {its_id: float(end)}

    def _signature(self, text: str) -> str:
        return hmac.new(self._key, text.encode("utf-8", "replace"), hashlib.sha256).hexdigest()
