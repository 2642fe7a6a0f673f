"""Where webhooks may lead, and how a delivery is signed."""

from __future__ import annotations

import hashlib
import hmac

import pytest

from orchestrator.webhook_targets import Guard, url_problem
from orchestrator.webhooks import LONGEST_DELAY_S, retry_delay_s, signature


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.9.1",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "169.254.169.254",
        "192.0.2.1",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd12:3456::1",
        "fec0::1",
        "ff02::1",
        "2001:db8::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::",
        "2001:0:4136:e378:8000:63bf:f5ff:fffe",
    ],
)
def test_what_is_not_public_is_refused(address: str) -> None:
    assert Guard([]).refuses(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.215.14", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses_pass(address: str) -> None:
    assert not Guard([]).refuses(address)


def test_allowed_networks_open_themselves_only() -> None:
    guard = Guard(["10.1.0.0/16", "fd00::/8"])
    for address in ("10.1.2.3", "::ffff:10.1.2.3", "fd12::1", "8.8.8.8"):
        assert not guard.refuses(address)
    for address in ("10.2.0.1", "127.0.0.1", "169.254.169.254", "::1"):
        assert guard.refuses(address)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "x",
        "/hook",
        "//example.com/hook",
        "ftp://example.com/",
        "file:///etc/passwd",
        "gopher://example.com/",
        "http://",
        "http:///path",
        "http://user@example.com/",
        "http://user:password@example.com/",
        "http://example.com/#part",
        "http://example.com:99999/",
        "http://example.com:x/",
        "http://exa mple.com/",
        "http://example.com/\r\nX: y",
        "http://example.com/ü",
        "http://[::1/",
        "http://example.com/" + "a" * 2048,
    ],
)
def test_malformed_urls(url: str) -> None:
    assert url_problem(url) is not None


@pytest.mark.parametrize(
    "url", ["http://example.com", "https://example.com:8443/a/b?c=d%20e", "http://[2606:4700::1]/"]
)
def test_well_formed_urls(url: str) -> None:
    assert url_problem(url) is None


def test_signature_is_what_a_receiver_computes() -> None:
    expected = hmac.new(b"whsec-sept-x", b'1700000000.{"seq":1}', hashlib.sha256).hexdigest()
    assert signature("whsec-sept-x", 1_700_000_000, b'{"seq":1}') == f"t=1700000000,v1={expected}"


def test_pauses_grow_to_an_hour() -> None:
    for attempts, longest in ((1, 1), (2, 2), (5, 16), (12, 2048), (13, LONGEST_DELAY_S), (10_000, LONGEST_DELAY_S)):
        pauses = {retry_delay_s(attempts) for _ in range(50)}
        assert len(pauses) > 1, "without jitter"
        assert all(longest / 2 <= pause <= longest for pause in pauses)
