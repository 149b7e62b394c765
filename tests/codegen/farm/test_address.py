from __future__ import annotations

import pytest

from codegen.farm.address import Address, FarmError, family, is_loopback
from passes.errors import UsageError


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("10.1.2.3:9191", "10.1.2.3", 9191),
        ("board-7.lab:80", "board-7.lab", 80),
        ("board-7", "board-7", 9190),
        ("9200", "127.0.0.1", 9200),
        (":9200", "127.0.0.1", 9200),
        ("[::1]:9200", "::1", 9200),
        ("[fe80::2]", "fe80::2", 9190),
    ],
)
def test_an_address_is_read_and_written(text: str, host: str, port: int) -> None:
    address = Address.parse(text)
    assert (address.host, address.port) == (host, port)
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "expected HOST:PORT"),
        ("a b:1", "expected HOST:PORT"),
        ("http://lab:9190", "expected HOST:PORT"),
        ("::1", "expected HOST:PORT"),
        ("[::1", "expected \\[IPV6\\]:PORT"),
        ("[::1]9190", "expected \\[IPV6\\]:PORT"),
        ("lab:0", "'0' is no port, expected 1 to 65535"),
        ("lab:65536", "'65536' is no port"),
        ("lab:port", "'port' is no port"),
        ("lab:-1", "'-1' is no port"),
    ],
)
def test_what_is_no_address_is_named_with_its_option(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as error:
        Address.parse(text, "--tracker")
    assert str(error.value).startswith(f"--tracker {text!r}: ")
    assert "\n" not in str(error.value)


def test_loopback_is_what_no_other_machine_reaches() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "127.3.2.1", "::1", "localhost")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "192.168.1.2", "::", "lab", "localhost.evil")] == [False] * 5


def test_an_unknown_name_is_an_error_of_one_line() -> None:
    with pytest.raises(FarmError, match="'no such host' is no address and no known name"):
        family("no such host", 1)
