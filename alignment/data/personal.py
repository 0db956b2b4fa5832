"""Personal data and secrets in a text: how many of each kind, never what they are.

By shapes that computers agree on, with check digits where there are any, so that versions, dates, prices and plain
numbers do not count. What has no such shape is not found: names, postal addresses, telephone numbers without the
country's code outside North America. Each pattern takes a time linear in the text: repeats are bounded, or can end in
one way alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import AddressValueError, IPv4Address, IPv6Address

_EMAIL = re.compile(
    r"(?<![\w.+%-])[\w+%-][\w.+%-]{0,63}@(?:[A-Za-z0-9][A-Za-z0-9-]{0,62}\.){1,8}[A-Za-z]{2,24}(?![\w-])"
)
_PHONE = re.compile(  # international, E.164; or North American: 212-555-0123, 212.555.0123, (212) 555-0123
    r"(?<![\w+.])\+[1-9](?:[ ()-]{0,2}\d){8,14}(?![\w-]|[.,]\d)"
    r"|(?<![\w.+/-])(?:\+?1[ .-])?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}(?=([.-])\d{3}\1)[.-])"
    r"[2-9]\d{2}[.-]\d{4}(?![\w-]|[.,/]\d)"
)
_IPV4 = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\w)")
_VERSION = re.compile(
    r"(?:\b(?:version|release|build|ver\.?|v\.)|[=<>~!]=|[<>^~])\s{0,2}$", re.I
)  # what follows is one
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
_CARD = re.compile(
    r"(?<![\w.,+-])(?:\d{4}([ -]?)\d{4}\1\d{4}\1\d{4}|3\d{3}([ -]?)\d{6}\2\d{4,5})(?![\w-]|[.,]\d|[ ]\d{4}\b)"
)
_BRAND = re.compile(  # Visa, Mastercard, Discover, JCB, UnionPay; American Express; Diners Club
    r"(?:4|5[1-5]|2(?:2[2-9]|[3-6]\d|7[0-2])|6011|64[4-9]|65|35(?:2[89]|[3-8]\d)|62)\d+"
    r"|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}"
)
_IBAN_LENGTHS = {  # of the registry (ISO 13616): characters -> countries
    15: "NO", 16: "BE", 18: "DK FI FO GL NL", 19: "MK SI", 20: "AT BA EE KZ LT LU XK", 21: "CH HR LI LV",
    22: "BG BH CR DE GB GE IE ME RS", 23: "AE GI IL IQ TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG",
    25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MC MR SM", 28: "AL AZ BY CY DO EG GT HU LB PL SV",
    29: "BR PS QA UA", 30: "JO KW MU", 31: "MT SC", 32: "LC",
}  # fmt: skip
_IBAN = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    + "|".join(
        rf"(?:{names.replace(' ', '|')})\d\d(?: ?[A-Z0-9]){{{length - 4}}}(?![A-Za-z0-9])"
        for length, names in _IBAN_LENGTHS.items()
    )
    + ")"
)
_DIGIT = re.compile(r"\d")
_US_SSN = re.compile(r"(?<![\w.-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])")
_SECRET = re.compile(
    r"(?<![A-Za-z0-9_-])(?:"
    r"(?:AKIA|ASIA)[A-Z0-9]{16}"  # AWS
    r"|gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}"
    r"|sk-[A-Za-z0-9]{48}|sk-(?:proj|svcacct|admin)-[A-Za-z0-9_-]{40,200}"  # OpenAI
    r"|hf_[A-Za-z0-9]{34}"
    r"|xox[abeoprs]-\d[A-Za-z0-9-]{15,200}"  # Slack
    r")(?![A-Za-z0-9_-])"
    r"|-----BEGIN (?:[A-Z0-9]{1,20} ){0,3}PRIVATE KEY(?: BLOCK)?-----"
)


def personal(text: str) -> dict[str, int]:
    """How many of each kind of KINDS are in the text, 0 included; a thing that is there twice counts twice."""
    digits = _DIGIT.search(text) is not None
    possible = {"email": "@" in text, "secret": True}  # most texts have neither, and need no further look
    return {
        kind: sum(is_one(found) for pattern, is_one in shapes for found in pattern.finditer(text))
        if possible.get(kind, digits)
        else 0
        for kind, shapes in _SHAPES.items()
    }


def _always(found: re.Match[str]) -> bool:
    return True


def _is_phone(found: re.Match[str]) -> bool:
    """Of an international one: numbers of North America begin with 2 to 9 there, and digits stand in up to 6 groups."""
    if not found[0].startswith("+"):
        return True
    digits = re.findall(r"\d+", found[0])
    number = "".join(digits)
    return len(digits) <= 6 and (number[0] != "1" or (len(number) == 11 and number[1] > "1" and number[4] > "1"))


def _is_ipv4(found: re.Match[str]) -> bool:
    """Neither a version nor a machine's name for itself."""
    try:
        address = IPv4Address(found[0])
    except AddressValueError:
        return False
    before = found.string[max(found.start() - 12, 0) : found.start()]
    return not (address.is_unspecified or address.is_loopback or found[0].startswith("0.") or _VERSION.search(before))


def _is_ipv6(found: re.Match[str]) -> bool:
    """With three groups at least, and a digit: `a::b` is a name in many programming languages."""
    try:
        IPv6Address(found[0])
    except AddressValueError:
        return False
    return sum(map(bool, found[0].split(":"))) >= 3 and any(letter.isdigit() for letter in found[0])


def _is_card(found: re.Match[str]) -> bool:
    """Of a brand, and with the check digit of Luhn's."""
    digits = re.sub(r"\D", "", found[0])
    doubled = [sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2]]
    return bool(_BRAND.fullmatch(digits)) and (sum(doubled) + sum(map(int, digits[-1::-2]))) % 10 == 0


def _is_iban(found: re.Match[str]) -> bool:
    """The remainder by 97 is 1 (ISO 7064), with the first four characters at the end and letters as 10 to 35."""
    compact = found[0].replace(" ", "")
    return int("".join(str(int(letter, 36)) for letter in compact[4:] + compact[:4])) % 97 == 1


_SHAPES: dict[str, tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], bool]], ...]] = {
    "email": ((_EMAIL, _always),),
    "phone": ((_PHONE, _is_phone),),
    "ip_address": ((_IPV4, _is_ipv4), (_IPV6, _is_ipv6)),
    "credit_card": ((_CARD, _is_card),),
    "iban": ((_IBAN, _is_iban),),
    "us_ssn": ((_US_SSN, _always),),
    "secret": ((_SECRET, _always),),
}
KINDS = tuple(_SHAPES)
