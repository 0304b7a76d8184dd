"""How often an address may show a wrong token."""

from __future__ import annotations

import ipaddress
import time
from collections import Counter
from collections.abc import Callable

WINDOW_S = 60
OF_ONE_CLIENT = 20
# Whoever asks a dashboard without a proxy can name itself after many clients.
OF_ONE_ADDRESS = 1000


class Tries:
    """Counts wrong tokens by address, and behind a proxy by the client that the proxy names; forgets each minute.

    A try that is refused is not looked at and does not count, so that one client's tries leave the rest of a proxy's
    alone.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._wrong: Counter[tuple[str, ...]] = Counter()
        self._end = now() + WINDOW_S

    def wait_s(self, address: str, forwarded_for: str) -> int:
        """How many seconds no token of this client is looked at; 0 for one that may try."""
        left = self._end - self._now()
        if left <= 0:
            self._wrong.clear()
            self._end = self._now() + WINDOW_S
            return 0
        by_client, by_address = self._of(address, forwarded_for)
        full = self._wrong[by_client] >= OF_ONE_CLIENT or self._wrong[by_address] >= OF_ONE_ADDRESS
        return int(left) + 1 if full else 0

    def was_wrong(self, address: str, forwarded_for: str) -> None:
        """Count one."""
        self._wrong.update(self._of(address, forwarded_for))

    @staticmethod
    def _of(address: str, forwarded_for: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        network = neighbourhood(address)
        return (network, neighbourhood(forwarded_for.rpartition(",")[2].strip()[:64])), (network,)


def neighbourhood(address: str) -> str:
    """What one client has of addresses: an IPv4 address, or the /64 of an IPv6 one."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is None:
        return str(ipaddress.ip_network((ip, 64), strict=False))
    return str(getattr(ip, "ipv4_mapped", None) or ip)
