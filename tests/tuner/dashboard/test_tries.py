from __future__ import annotations

import pytest

from tuner.dashboard.tries import OF_ONE_ADDRESS, OF_ONE_CLIENT, WINDOW_S, Tries, neighbourhood


class Clock:
    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s


def spend(tries: Tries, address: str, forwarded_for: str = "") -> int:
    """Try until it is refused; how often that went."""
    count = 0
    while not tries.wait_s(address, forwarded_for):
        tries.was_wrong(address, forwarded_for)
        count += 1
    return count


def test_an_address_has_so_many_tries_a_minute() -> None:
    clock = Clock()
    tries = Tries(clock)
    assert spend(tries, "192.0.2.1") == OF_ONE_CLIENT
    assert tries.wait_s("192.0.2.2", "") == 0
    clock.s = WINDOW_S - 1
    assert tries.wait_s("192.0.2.1", "") == 2
    clock.s = WINDOW_S
    assert spend(tries, "192.0.2.1") == OF_ONE_CLIENT


def test_behind_a_proxy_a_client_uses_up_its_own_tries() -> None:
    tries = Tries(Clock())
    for _ in range(1000):
        spend(tries, "192.0.2.1", "forged, 203.0.113.7")
    assert tries.wait_s("192.0.2.1", "203.0.113.8") == 0


def test_naming_oneself_after_others_gives_no_more_than_an_address_has() -> None:
    tries = Tries(Clock())
    clients = [f"203.0.{number // 250}.{number % 250}" for number in range(OF_ONE_ADDRESS)]
    assert sum(spend(tries, "192.0.2.1", client) for client in clients) == OF_ONE_ADDRESS


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("unknown", "unknown", True),
        ("", "192.0.2.1", False),
    ],
)
def test_one_client_has_a_whole_network_of_ipv6_addresses(one: str, other: str, same: bool) -> None:
    assert (neighbourhood(one) == neighbourhood(other)) is same
