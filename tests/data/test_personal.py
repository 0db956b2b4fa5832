"""Personal data: what counts, what only looks like it, and that no text takes long."""

from __future__ import annotations

import time

import pytest

from alignment.data.personal import KINDS, personal

HEX36, LETTERS48 = "aB3" * 12, "aB3x" * 12
THERE = {
    "email": ["jane.doe+news@mail.example.co.uk", "<a_b@c.de>", "Write to me@here.org.", "jürgen@buecher.example"],
    "phone": [
        *("+49 30 901820", "+4915112345678", "+1 (212) 555-0123", "+44 (0)20 7946 0958", "1-212-555-0123"),
        *("(212) 555-0123", "call 212-555-0123.", "212.555.0123"),
    ],
    "ip_address": [
        *("8.8.4.4", "from 192.168.1.17:8080", "at 10.1.2.3.", "2001:db8::8a2e:370:7334"),
        "[2001:0db8:0000:0000:0000:ff00:0042:8329]",
    ],
    "credit_card": [
        *("4111 1111 1111 1111", "4111111111111111", "5500-0055-5555-5559", "2223003122003222", "6011111111111117"),
        *("3782 822463 10005", "378282246310005", "30569309025904"),
    ],
    "iban": [
        *("DE89 3704 0044 0532 0130 00", "DE89370400440532013000", "GB82 WEST 1234 5698 7654 32 AND MORE"),
        *("NO93 8601 1117 947", "FR1420041010050500013M02606"),
    ],
    "us_ssn": ["078-05-1120", "SSN: 219-09-9999."],
    "secret": [
        *("AKIAIOSFODNN7EXAMPLE", f"token=ghp_{HEX36}", f"github_pat_{'a' * 22}_{'B' * 59}", f"'sk-{LETTERS48}'"),
        *(f"sk-proj-{LETTERS48}", f"hf_{'aBcD' * 8}xY", "xoxb-123456789012-1234567890123-AbCdEf"),
        *("-----BEGIN PRIVATE KEY-----", "-----BEGIN OPENSSH PRIVATE KEY-----\n"),
        "-----BEGIN PGP PRIVATE KEY BLOCK-----",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind in THERE for text in THERE[kind]])
def test_each_counts_once_as_its_kind(kind: str, text: str) -> None:
    assert personal(text) == {**dict.fromkeys(KINDS, 0), kind: 1}
    assert personal(f"Well ({text}), and {text}") == {**dict.fromkeys(KINDS, 0), kind: 2}


@pytest.mark.parametrize(
    "text",
    [
        *("", "10:30:45:12", "Python 3.11.7 and 1.2.3", "version 10.4.18.305", "version 1.2.3.4", "package==2.0.0.1"),
        "v1.2.3.4",
        *("2024-05-12", "12/05/2024 10:30:45", "2024-05-12T10:30:45.123Z", "1999-2004", "20240512103045"),
        *("$1,234,567.89", "1 234 567,89 €", "1.234.567,89", "3.141592653589793", "0.4111111111111111", "6.02e23"),
        *("1234567890", "1715508645", "1715508645123", "123456789012345678", "1 2 3 4 5 6 7 8 9 10", "100-200-3000"),
        *("+5", "a +1.23456789012", "+100 200 300", "C++ 2011", "2 +212 = 214", "+1 2 3 4 5 6 7 8 9", "x+49309018200"),
        *("4111 1111 1111 1112", "1234 5678 9012 3456", "0000 0000 0000 0000", "4111 1111-1111 1111"),
        "14111111111111111",
        *("DE88 3704 0044 0532 0130 00", "DE89 3704 0044 0532 0130 0", "XX89370400440532013000", "NO REASON AT ALL"),
        *("000-12-3456", "666-12-3456", "912-12-3456", "123-00-4567", "123-45-0000", "123-45-67890", "1123-45-6789"),
        *("ISBN 978-0-306-40615-7", "550e8400-e29b-41d4-a716-446655440000", "00:1B:44:11:3A:B7", "std::vector", "a::b"),
        *("::1", "127.0.0.1", "0.0.0.0", "256.1.1.1", "1.2.3.4.5", "@property", "a@b", "user@localhost", "x @ y.com"),
        *("sk-learn is scikit-learn", "sk-" + "word-" * 12, "hf_hub_download", "xoxo-love"),
        *("AKIA", "-----BEGIN PUBLIC KEY-----", "ghp_short", "-----BEGIN CERTIFICATE-----"),
    ],
)  # fmt: skip
def test_what_only_looks_like_it(text: str) -> None:
    assert personal(text) == dict.fromkeys(KINDS, 0)


@pytest.mark.parametrize(
    "unit",
    [
        *(
            "a",
            "1",
            "1 ",
            "1.",
            "1-",
            "a@",
            "a.",
            "a@a.",
            "+1",
            "+1 ",
            "+1 ()",
            "(2",
            "212-",
            "::",
            "1:",
            "f:",
            "4111 ",
        ),
        *(
            "DE89 ",
            "DE89",
            "A ",
            "sk-",
            "sk-proj-",
            "xoxb-1",
            "xoxb-1-",
            "-",
            "-----BEGIN ",
            "AKIA",
            "ghp_",
            " ",
            "=",
            "é",
        ),
        *("a%", "(212) ", "1.1.1.1.", "github_pat_", "3", "version "),
    ],
)
def test_hostile_texts_take_no_longer(unit: str) -> None:
    text = (unit * 100_000)[:100_000]
    start = time.process_time()
    personal(text)
    assert time.process_time() - start < 2  # 0.1 in practice; what grows with the square takes minutes
